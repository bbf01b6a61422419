"""Distinct prefixes of prompts, and what the base model computes at them in batched sweeps.

What a decoder computes at a token depends on that token and those before it, so a prefix that many
rows share is computed once: on PISTOL 40 % of all prompt tokens repeat a prefix of another row.

Shapes: `nodes` counts the distinct prefixes of a `PrefixTree`; point l is the input of block l and
point n_layers the output of the last block, before the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lunar_tune.models.device import BatchSize, DeviceMemory
from lunar_tune.models.layout import decoder_slice
from lunar_tune.models.loading import LoadedModel

__all__ = [
    "BlockReads",
    "PrefixTree",
    "batches_by_length",
    "block_reads",
    "capture_last_tokens",
    "capture_streams",
    "sweep_batch",
]

Key = TypeVar("Key")

# Tokens in one batch of a sweep. On a CPU it matters little (a trial on a small model spent
# .38 s on prompts in batches of 256, .30 s in 2,048); on a GPU the sweep of a 7B model is
# compute-bound from a few thousand tokens on.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


class PrefixTree:
    """Token sequences, one a row, and the numbers of their distinct prefixes, the nodes."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = tuple(map(tuple, sequences))
        self.lengths = tuple(map(len, self.sequences))
        self.offsets = (0, *accumulate(self.lengths))
        """Where each row begins among all tokens, and their number."""
        numbers: dict[tuple[int, int], int] = {}
        nodes: list[int] = []
        first: list[bool] = []
        for sequence in self.sequences:
            node = -1
            for token in sequence:
                new = len(numbers)
                node = numbers.setdefault((node, token), new)
                nodes.append(node)
                first.append(node == new)
        self.n_nodes = len(numbers)
        self.nodes: Int[Tensor, " tokens"] = torch.tensor(nodes, dtype=torch.int64)
        """The node of each token, row after row."""
        self.first: Bool[Tensor, " tokens"] = torch.tensor(first, dtype=torch.bool)
        """Whether a token is the first one with its node."""

    @property
    def n_rows(self) -> int:
        """Number of sequences."""
        return len(self.sequences)

    def token_index(
        self, rows: Sequence[int], lengths: Sequence[int] | None = None
    ) -> Int[Tensor, " tokens_of_rows"]:
        """Return where the first `lengths` tokens of some rows, or all, stand among all tokens."""
        if lengths is None:
            lengths = [self.lengths[row] for row in rows]
        starts = [self.offsets[row] for row in rows]
        pieces = [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)

    def nodes_of(
        self, rows: Sequence[int], lengths: Sequence[int] | None = None
    ) -> Int[Tensor, " tokens_of_rows"]:
        """Return the nodes of some rows' tokens, row after row; see `token_index`."""
        return self.nodes[self.token_index(rows, lengths)]


class BlockReads(NamedTuple):
    """What a block's MLP works on, at every distinct prefix; on the model's device."""

    inputs: Float[Tensor, "nodes d_ff"]
    """h: what the down-projection reads."""
    residual: Float[Tensor, "nodes d_model"]
    """The stream to which the down-projection's output is added."""


def sweep_batch(loaded: LoadedModel, memory: DeviceMemory, points: int) -> BatchSize:
    """Return the tokens of a sweep's batch, estimated from what a block holds for a token.

    `points` is the number of streams that are held until the batch ends.
    """
    config = loaded.model.config
    width = 4 * config.intermediate_size + (12 + points) * config.hidden_size
    affordable = memory.free_bytes() // (width * loaded.model.dtype.itemsize)
    most = TOKENS_PER_BATCH.get(loaded.device.type, TOKENS_PER_BATCH["cpu"])
    return BatchSize(min(most, affordable), "the prompts' tokens")


def capture_streams(
    loaded: LoadedModel, tree: PrefixTree, points: Sequence[int], batch: BatchSize
) -> dict[int, Float[Tensor, "nodes d_model"]]:
    """Sweep the base model once over all rows and keep the residual stream at some points.

    Streams are in the model's number format, in host memory.
    """
    shape = (tree.n_nodes, loaded.model.config.hidden_size)
    values = {point: torch.empty(shape, dtype=loaded.model.dtype) for point in points}

    def keep(rows: Sequence[int], mask: Tensor, seen: Mapping[int, Tensor]) -> None:
        index = tree.token_index(rows)
        first = tree.first[index]
        chosen = mask.masked_scatter(mask, first).to(loaded.device)
        for point, stream in seen.items():
            values[point][tree.nodes[index[first]]] = stream[chosen].cpu()

    batch.fit(lambda budget: _sweep(loaded, tree.sequences, points, budget, keep))
    return values


def capture_last_tokens(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], batch: BatchSize
) -> Float[Tensor, "n_points rows d_model"]:
    """Return the stream of each prompt's last token at every point, in host memory."""
    points = range(loaded.n_layers + 1)
    shape = (len(points), len(prompts), loaded.model.config.hidden_size)
    values = torch.empty(shape, dtype=loaded.model.dtype)

    def keep(rows: Sequence[int], mask: Tensor, seen: Mapping[int, Tensor]) -> None:
        last = (torch.arange(len(rows)), mask.sum(1) - 1)
        for point, stream in seen.items():
            values[point, rows] = stream[last].cpu()

    batch.fit(lambda budget: _sweep(loaded, prompts, points, budget, keep))
    return values


@torch.inference_mode()
def block_reads(
    loaded: LoadedModel,
    tree: PrefixTree,
    stream: Float[Tensor, "nodes d_model"],
    layer: int,
    batch: BatchSize,
) -> BlockReads:
    """Return what block `layer`'s MLP works on: a forward of that block, from its kept input."""
    projection = loaded.layout.down_projection_of(loaded.model, layer)
    norm = loaded.layout.mlp_norm_of(loaded.model, layer)

    def empty(width: int) -> Tensor:
        return torch.empty((tree.n_nodes, width), dtype=loaded.model.dtype, device=loaded.device)

    reads = BlockReads(empty(projection.in_features), empty(projection.out_features))

    def sweep(budget: int) -> None:
        with decoder_slice(loaded.model, loaded.layout, layer, layer + 1) as decoder:
            for rows in batches_by_length(tree.lengths, budget):
                index = tree.token_index(rows)
                nodes, first = tree.nodes[index], tree.first[index]
                mask = _mask([tree.lengths[row] for row in rows])
                embeds = torch.zeros((*mask.shape, stream.shape[1]), dtype=stream.dtype)
                embeds[mask] = stream[nodes]
                with _recording({"inputs": projection, "residual": norm}, {}) as seen:
                    decoder(inputs_embeds=embeds.to(loaded.device), use_cache=False)
                chosen = mask.masked_scatter(mask, first).to(loaded.device)
                there = nodes[first].to(loaded.device)
                reads.inputs[there] = seen["inputs"][chosen]
                reads.residual[there] = seen["residual"][chosen]

    batch.fit(sweep)
    return reads


@torch.inference_mode()
def _sweep(
    loaded: LoadedModel,
    sequences: Sequence[Sequence[int]],
    points: Sequence[int],
    budget: int,
    keep: Callable[[list[int], Tensor, Mapping[int, Tensor]], None],
) -> None:
    """Run the blocks below the last point; `keep` gets each batch's rows, mask and streams.

    Padding on the right needs no attention mask: a causal model's real tokens never see it, and
    their positions count from 0 as in an unpadded prompt.
    """
    with decoder_slice(loaded.model, loaded.layout, 0, max(1, *points)) as decoder:
        blocks = loaded.layout.blocks_of(loaded.model)
        inputs = {0: blocks[0]} if 0 in points else {}
        outputs = {point: blocks[point - 1] for point in points if point}
        for rows in batches_by_length([len(sequence) for sequence in sequences], budget):
            mask = _mask([len(sequences[row]) for row in rows])
            width = mask.shape[1]
            ids = [
                [*sequences[row], *[loaded.pad_id] * (width - len(sequences[row]))] for row in rows
            ]
            with _recording(inputs, outputs) as seen:
                decoder(input_ids=torch.tensor(ids, device=loaded.device), use_cache=False)
            keep(rows, mask, seen)


@contextmanager
def _recording(
    inputs: Mapping[Key, nn.Module], outputs: Mapping[Key, nn.Module]
) -> Iterator[dict[Key, Tensor]]:
    """Inside, what some modules read and others give stands under their keys."""
    seen: dict[Key, Tensor] = {}

    def record_as(key: Key) -> Callable[..., None]:
        def record(_module: nn.Module, args: Any, output: Any = None) -> None:
            recorded = args if output is None else output
            seen[key] = recorded[0] if isinstance(recorded, tuple) else recorded

        return record

    with ExitStack() as stack:
        for key, module in inputs.items():
            stack.callback(module.register_forward_pre_hook(record_as(key)).remove)
        for key, module in outputs.items():
            stack.callback(module.register_forward_hook(record_as(key)).remove)
        yield seen


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


def _mask(lengths: Sequence[int]) -> Bool[Tensor, "batch seq"]:
    """Return which places of a right-padded batch hold a token."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
