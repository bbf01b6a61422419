"""What the base model computes at distinct prefixes of prompts: captured when it is first needed.

Point l is the input of block l and point n_layers the output of the last block, before the final
norm. `nodes` counts the distinct prefixes of a `PrefixTree`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import NamedTuple

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lunar_tune.engine.cache import ActivationCache, CacheEntry, content_key
from lunar_tune.engine.forward import PrefixTree
from lunar_tune.models.device import BatchSize, DeviceMemory
from lunar_tune.models.fingerprint import fingerprint
from lunar_tune.models.layout import decoder_slice
from lunar_tune.models.loading import LoadedModel

_FORMAT = 2  # raise it when what is kept changes and the key does not say so
# Tokens in one batch of a sweep. On a CPU it matters little (a trial on a small model spent
# .38 s on prompts in batches of 256, .30 s in 2,048); on a GPU the sweep of a 7B model is
# compute-bound from a few thousand tokens on.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
# Of what is free on a device, the share that blocks' reads may take, the rest being for batches.
READS_SHARE = 0.4
# Of the host memory that is free, the share that streams of one sweep may take.
SWEEP_SHARE = 0.5


class BlockReads(NamedTuple):
    """What a block's MLP works on, at every distinct prefix; on the model's device."""

    inputs: Float[Tensor, "nodes d_ff"]  # h: what the down-projection reads
    residual: Float[Tensor, "nodes d_model"]
    """The stream to which the down-projection's output is added."""


def sweep_batch(loaded: LoadedModel, memory: DeviceMemory, points: int) -> BatchSize:
    """Return the tokens of a sweep's batch, estimated from what a block holds for a token.

    `points` is the number of streams that are held until the batch ends.
    """
    config = loaded.model.config
    width = 4 * config.intermediate_size + (12 + points) * config.hidden_size
    affordable = memory.free_bytes() // (width * loaded.model.dtype.itemsize)
    most = min(TOKENS_PER_BATCH[loaded.device.type], affordable)
    return BatchSize(most, "the prompts' tokens")


def capture_streams(
    loaded: LoadedModel,
    tree: PrefixTree,
    points: Sequence[int],
    batch: BatchSize,
    *,
    places: Int[Tensor, " tokens"] | None = None,
) -> dict[int, Float[Tensor, "nodes d_model"]]:
    """Sweep the base model once over all rows and keep the residual stream at some points.

    Streams are in the model's number format, in host memory; `places` is as in `_sweep`.
    """
    run, host = range(max(1, *points)), torch.device("cpu")
    blocks, norm = loaded.layout.blocks_of(loaded.model), loaded.layout.final_norm_of(loaded.model)
    modules = [blocks[point] if point in run else norm for point in points]
    streams = _sweep(loaded, tree, run, modules, tree.ids, batch=batch, device=host, places=places)
    return dict(zip(points, streams, strict=True))


def block_reads(
    loaded: LoadedModel,
    tree: PrefixTree,
    stream: Float[Tensor, "nodes d_model"],
    layer: int,
    batch: BatchSize,
) -> BlockReads:
    """Return what block `layer`'s MLP works on: a forward of that block, from its kept input."""
    layout, run = loaded.layout, range(layer, layer + 1)
    projection = layout.down_projection_of(loaded.model, layer)
    modules = [projection, layout.mlp_norm_of(loaded.model, layer)]
    reads = _sweep(loaded, tree, run, modules, stream, batch=batch, device=loaded.device)
    return BlockReads(*reads)


@torch.inference_mode()
def _sweep(
    loaded: LoadedModel,
    tree: PrefixTree,
    run: range,
    modules: Sequence[nn.Module],
    given: Tensor,
    *,
    batch: BatchSize,
    device: torch.device,
    places: Int[Tensor, " tokens"] | None = None,
) -> list[Float[Tensor, "places width"]]:
    """Run some blocks on all rows and return what `modules` read, held on `device`.

    `given` is each node's token, or the stream that the first of the blocks reads. What is read at
    a token stands at its place in the result, -1 for nowhere; without `places` that is its node.

    Padding on the right needs no attention mask: a causal model's real tokens never see it, and
    their positions count from 0 as in an unpadded prompt.
    """
    if places is None:
        places = torch.where(tree.first, tree.nodes, -1)
    name = "inputs_embeds" if given.is_floating_point() else "input_ids"

    def work(budget: int) -> list[Tensor]:
        values: list[Tensor] = []
        seen: dict[nn.Module, Tensor] = {}

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[module] = args[0]

        with ExitStack() as stack:
            slice_of = decoder_slice(loaded.model, loaded.layout, run.start, run.stop)
            decoder = stack.enter_context(slice_of)
            for module in modules:
                stack.enter_context(module.register_forward_pre_hook(record))
            for rows in batches_by_length(tree.lengths, budget):
                index = tree.token_index(rows)
                lengths = torch.tensor([tree.lengths[row] for row in rows])
                mask = torch.arange(int(lengths.max())) < lengths[:, None]
                padded = given.new_zeros((*mask.shape, *given.shape[1:]))
                padded[mask] = given[tree.nodes[index]]
                decoder(**{name: padded.to(loaded.device)}, use_cache=False)
                kept = places[index] >= 0
                chosen = mask.masked_scatter(mask, kept).to(loaded.device)
                into = places[index[kept]].to(device)
                read = [seen[module] for module in modules]
                if not values:
                    shape = int(places.max()) + 1
                    values = [one.new_empty((shape, one.shape[-1]), device=device) for one in read]
                for value, one in zip(values, read, strict=True):
                    value[into] = one[chosen].to(device)
        return values

    return batch.fit(work)


def batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield row indices in batches of similar length, bounded in padded tokens."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batch and (len(batch) + 1) * lengths[row] > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class ActivationSource:
    """The base model as a source of activations; without a cache they stay in memory."""

    def __init__(
        self,
        loaded: LoadedModel,
        cache: ActivationCache | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        self.loaded, self.cache = loaded, cache
        self.memory = memory or DeviceMemory(loaded.device)

    @cached_property
    def model_key(self) -> str:
        """The model's fingerprint, taken before anything is edited."""
        return fingerprint(self.loaded)

    def entry(
        self, kind: str, sequences: Sequence[Sequence[int]], fitted: Sequence[int] = ()
    ) -> CacheEntry | None:
        """Return the cache's entry for something captured on sequences; None without a cache.

        The first sequences begin with prompts of `fitted` tokens, captured by themselves.
        """
        if self.cache is None:
            return None
        rows = "".join(f"{','.join(map(str, sequence))};" for sequence in sequences)
        dtype, name = str(self.loaded.model.dtype), self.loaded.spec.name
        parts = {
            "format": _FORMAT,
            "kind": kind,
            "model": self.model_key,
            "prompts": hashlib.sha256(rows.encode()).hexdigest(),
            "fitted": hashlib.sha256(repr(tuple(fitted)).encode()).hexdigest(),
            "positions": "from 0, no padding",
            "dtype": dtype,
        }
        about = {"kind": kind, "model": name, "rows": len(sequences)}
        return self.cache.entry(content_key(parts), about | {"dtype": dtype.removeprefix("torch.")})

    def load_or_capture(
        self,
        kind: str,
        sequences: Sequence[Sequence[int]],
        name: str,
        capture: Callable[[], dict[str, Tensor]],
        fitted: Sequence[int] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a tensor from disk or captured, and what to keep: mapped, or not on disk.

        `capture` gives it, and others that are worth keeping, by name; see `entry`.
        """
        entry = self.entry(kind, sequences, fitted)
        if entry is None:
            captured = capture()
            return captured[name], captured
        if (loaded := entry.load(name)) is not None:
            return loaded, {name: loaded}
        with entry.locked():
            if (loaded := entry.load(name)) is not None:  # another process was faster
                return loaded, {name: loaded}
            captured = capture()
            return captured[name], {n: one for n, one in captured.items() if not entry.save(n, one)}

    def last_tokens(
        self, prompts: Sequence[Sequence[int]]
    ) -> Float[Tensor, "n_points rows d_model"]:
        """Return the stream of each prompt's last token at every point."""

        def capture() -> dict[str, Tensor]:
            tree, points = PrefixTree(prompts), range(self.loaded.n_layers + 1)
            batch = sweep_batch(self.loaded, self.memory, len(points))
            places = torch.full_like(tree.nodes, -1)
            places[torch.tensor(tree.offsets[1:]) - 1] = torch.arange(tree.n_rows)
            streams = capture_streams(self.loaded, tree, points, batch, places=places)
            return {"last": torch.stack(list(streams.values()))}

        return self.load_or_capture("last tokens", prompts, "last", capture)[0]


class PromptActivations:
    """What the base model computes on the rows of a study: prompts, each with its draft.

    Drafts are the base model's answers by prompt, as far as they are known. The inputs of `layers`,
    which may be edited, are captured together; others when they are asked for. What the first
    `fitted` prompts give is computed by themselves, so that a fit is the same, bit for bit,
    whatever else is asked and however long the drafts are.
    """

    def __init__(
        self,
        source: ActivationSource,
        prompts: Sequence[Sequence[int]],
        *,
        drafts: Mapping[tuple[int, ...], tuple[int, ...]] | None = None,
        layers: Sequence[int] = (),
        fitted: int = 0,
    ) -> None:
        self.source = source
        unique = tuple(dict.fromkeys(map(tuple, prompts)))
        known = drafts or {}
        self.drafts = tuple(known.get(prompt, ()) for prompt in unique)
        self.tree = PrefixTree([p + d for p, d in zip(unique, self.drafts, strict=True)])
        self.prompt_lengths = tuple(map(len, unique))
        self._rows = {prompt: row for row, prompt in enumerate(unique)}
        fit_rows = range(len(dict.fromkeys(map(tuple, prompts[:fitted]))))
        self._fit = PrefixTree([unique[row] for row in fit_rows])
        nodes = self.tree.nodes_of(fit_rows, self.prompt_lengths[: len(fit_rows)])
        self._fit_nodes = nodes[self._fit.first]
        """Of each node of `_fit`, its node in `tree`."""
        self._layers = tuple(layers)
        self._streams: dict[str, Tensor] = {}
        self._reads: dict[int, BlockReads] = {}

    def rows_of(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Return the rows of prompts that were given at the beginning."""
        return [self._rows[tuple(prompt)] for prompt in prompts]

    def reads(self, layer: int) -> BlockReads:
        """Return what block `layer`'s MLP works on; computed once while it fits on the device."""
        if layer not in self._reads:
            loaded = self.source.loaded
            stream = self._stream(layer)
            batch = sweep_batch(loaded, self.source.memory, 0)
            weight = loaded.layout.down_projection_of(loaded.model, layer).weight
            size = self._held_nodes * sum(weight.shape) * weight.element_size()
            while self._reads and size > self.source.memory.free_bytes() * READS_SHARE:
                self._reads.pop(next(iter(self._reads)))
            reads = block_reads(loaded, self.tree, stream, layer, batch)
            if self._is_apart:
                own = block_reads(loaded, self._fit, stream[self._fit_nodes], layer, batch)
                self._put_fitted(reads, own)
            self._reads[layer] = reads
        self._reads[layer] = self._reads.pop(layer)  # the one used longest ago goes first
        return self._reads[layer]

    def _stream(self, point: int) -> Float[Tensor, "nodes d_model"]:
        """Return the stream at a point, from memory, from disk, or captured with its neighbours."""
        name, rows = _file_name(point), self.tree.sequences
        if name in self._streams:
            return self._streams[name]
        load = self.source.load_or_capture
        fitted = self._fit.lengths
        stream, kept = load("streams", rows, name, lambda: self._capture(point), fitted)
        self._streams |= kept
        return stream

    @property
    def _is_apart(self) -> bool:
        """Whether there is more than what a fit reads."""
        return self._fit.n_rows > 0 and self._fit.sequences != self.tree.sequences

    @property
    def _held_nodes(self) -> int:
        """The nodes whose values are held at a time: of all rows, then of the fit's as well."""
        return self.tree.n_nodes + (self._fit.n_nodes if self._is_apart else 0)

    @torch.inference_mode()
    def _put_fitted(self, whole: Iterable[Tensor], fitted: Iterable[Tensor]) -> None:
        """Put what was computed of the fit's prompts by themselves in its places."""
        for tensor, own in zip(whole, fitted, strict=True):
            tensor[self._fit_nodes.to(tensor.device)] = own

    def _capture(self, point: int) -> dict[str, Tensor]:
        """Sweep for a stream and for as many of the others as host memory holds.

        What finds no room on disk afterwards stays in memory, oldest out first.
        """
        loaded = self.source.loaded
        size = self._held_nodes * loaded.model.config.hidden_size * loaded.model.dtype.itemsize
        room = psutil.virtual_memory().available * SWEEP_SHARE
        while self._streams and size > room:
            self._streams.pop(next(iter(self._streams)))
        others = {one for one in self._layers if _file_name(one) not in self._streams} - {point}
        near = sorted(sorted(others), key=lambda layer: abs(layer - point))
        points = [point, *near[: max(0, int(room // max(1, size)) - 1)]]
        batch = sweep_batch(loaded, self.source.memory, len(points))
        captured = capture_streams(loaded, self.tree, sorted(points), batch)
        if self._is_apart:
            own = capture_streams(loaded, self._fit, sorted(points), batch)
            self._put_fitted(captured.values(), own.values())
        return {_file_name(where): stream for where, stream in captured.items()}


def _file_name(point: int) -> str:
    return f"point-{point:03d}"
