"""The activations of a worker's prompts: captured when first needed, kept where they fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from lunar_tune.engine.cache import ActivationCache, CacheEntry, content_key
from lunar_tune.engine.streams import (
    BlockReads,
    PrefixTree,
    block_reads,
    capture_last_tokens,
    capture_streams,
    sweep_batch,
)
from lunar_tune.models.device import DeviceMemory, host_free_bytes
from lunar_tune.models.lineage import fingerprint
from lunar_tune.models.loading import LoadedModel

__all__ = ["ActivationSource", "PromptActivations"]

_FORMAT = 1  # raise it when what is kept changes and the key does not say so
# Of what is free on a device, the share that blocks' reads may take, the rest being for batches.
READS_SHARE = 0.4
# Of the host memory that is free, the share that streams of one sweep may take.
SWEEP_SHARE = 0.5


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

    def entry(self, kind: str, sequences: Sequence[Sequence[int]]) -> CacheEntry | None:
        """Return the cache's entry for something captured on sequences; None without a cache."""
        if self.cache is None:
            return None
        digest = hashlib.sha256()
        for sequence in sequences:
            digest.update(f"{','.join(map(str, sequence))};".encode())
        dtype = str(self.loaded.model.dtype)
        parts = {
            "format": _FORMAT,
            "kind": kind,
            "model": self.model_key,
            "prompts": digest.hexdigest(),
            "positions": "from 0, no padding",
            "dtype": dtype,
        }
        shown = {"kind": kind, "model": self.loaded.spec.name, "rows": len(sequences)}
        about = shown | {"dtype": dtype.removeprefix("torch.")}
        return self.cache.entry(content_key(parts), about)

    def load_or_capture(
        self,
        kind: str,
        sequences: Sequence[Sequence[int]],
        name: str,
        capture: Callable[[], dict[str, Tensor]],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a tensor from disk or captured, and what was captured but is not on disk.

        `capture` gives it, and others that are worth keeping, by name.
        """
        entry = self.entry(kind, sequences)
        if entry is None:
            captured = capture()
            return captured[name], captured
        if (kept := entry.load(name)) is not None:
            return kept, {}
        with entry.locked():
            if (kept := entry.load(name)) is not None:  # another process was faster
                return kept, {}
            captured = capture()
            unsaved = {
                other: tensor for other, tensor in captured.items() if not entry.save(other, tensor)
            }
        return captured[name], unsaved

    def last_tokens(
        self, prompts: Sequence[Sequence[int]]
    ) -> Float[Tensor, "n_points rows d_model"]:
        """Return the stream of each prompt's last token at every point."""

        def capture() -> dict[str, Tensor]:
            batch = sweep_batch(self.loaded, self.memory, self.loaded.n_layers + 1)
            return {"last": capture_last_tokens(self.loaded, prompts, batch)}

        return self.load_or_capture("last tokens", prompts, "last", capture)[0]


class PromptActivations:
    """What the base model computes on the rows of a study: prompts, each with its draft.

    Drafts are the base model's answers by prompt, as far as they are known. The inputs of `layers`,
    which may be edited, are captured together; others when they are asked for.
    """

    def __init__(
        self,
        source: ActivationSource,
        prompts: Sequence[Sequence[int]],
        *,
        drafts: Mapping[tuple[int, ...], tuple[int, ...]] | None = None,
        layers: Sequence[int] = (),
    ) -> None:
        self.source = source
        unique = tuple(dict.fromkeys(map(tuple, prompts)))
        known = drafts or {}
        self.drafts = tuple(known.get(prompt, ()) for prompt in unique)
        self.tree = PrefixTree([p + d for p, d in zip(unique, self.drafts, strict=True)])
        self.prompt_lengths = tuple(map(len, unique))
        self._rows = {prompt: row for row, prompt in enumerate(unique)}
        self._layers = tuple(layers)
        self._streams: dict[str, Tensor] = {}
        self._reads: dict[int, BlockReads] = {}

    def rows_of(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Return the rows of prompts that were given at the beginning."""
        return [self._rows[tuple(prompt)] for prompt in prompts]

    def prompt_nodes(self, rows: Sequence[int]) -> Tensor:
        """Return the nodes of some rows' prompt tokens, row after row: `[tokens]`."""
        return self.tree.nodes_of(rows, [self.prompt_lengths[row] for row in rows])

    def reads(self, layer: int) -> BlockReads:
        """Return what block `layer`'s MLP works on; computed once while it fits on the device."""
        if layer not in self._reads:
            loaded = self.source.loaded
            stream = self._stream(layer)
            batch = sweep_batch(loaded, self.source.memory, 0)
            weight = loaded.layout.down_projection_of(loaded.model, layer).weight
            size = self.tree.n_nodes * sum(weight.shape) * weight.element_size()
            while self._reads and size > self.source.memory.free_bytes() * READS_SHARE:
                self._reads.pop(next(iter(self._reads)))
            self._reads[layer] = block_reads(loaded, self.tree, stream, layer, batch)
        self._reads[layer] = self._reads.pop(layer)  # the one used longest ago goes first
        return self._reads[layer]

    def _stream(self, point: int) -> Float[Tensor, "nodes d_model"]:
        """Return the stream at a point, from memory, from disk, or captured with its neighbours."""
        name = _file_name(point)
        if name in self._streams:
            return self._streams[name]
        stream, unsaved = self.source.load_or_capture(
            "streams", self.tree.sequences, name, lambda: self._capture(point)
        )
        self._streams |= unsaved
        return stream

    def _capture(self, point: int) -> dict[str, Tensor]:
        """Sweep for a stream and for as many of the others as host memory holds.

        What finds no room on disk afterwards stays in memory, oldest out first.
        """
        loaded = self.source.loaded
        size = self.tree.n_nodes * loaded.model.config.hidden_size * loaded.model.dtype.itemsize
        room = host_free_bytes() * SWEEP_SHARE
        while self._streams and size > room:
            self._streams.pop(next(iter(self._streams)))
        others = [
            layer
            for layer in self._layers
            if layer != point and _file_name(layer) not in self._streams
        ]
        others.sort(key=lambda layer: abs(layer - point))
        points = [point, *others[: max(0, int(room // max(1, size)) - 1)]]
        batch = sweep_batch(loaded, self.source.memory, len(points))
        captured = capture_streams(loaded, self.tree, sorted(points), batch)
        return {_file_name(where): stream for where, stream in captured.items()}


def _file_name(point: int) -> str:
    return f"point-{point:03d}"
