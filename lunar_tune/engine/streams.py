"""What the base model computes on prompts, in batched sweeps: streams and what follows.

Shapes: `nodes` counts the distinct prefixes of a `PrefixTree`; point l is the input of block l and
point n_layers the output of the last block, before the final norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lunar_tune.engine.prefixes import PrefixTree
from lunar_tune.models.device import BatchSize, DeviceMemory
from lunar_tune.models.layout import decoder_slice

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = [
    "BlockReads",
    "block_reads",
    "capture_last_tokens",
    "capture_streams",
    "sweep_batch",
]

# Tokens in one batch of a sweep. On a CPU it matters little (a trial on a small model spent
# .38 s on prompts in batches of 256, .30 s in 2,048); on a GPU the sweep of a 7B model is
# compute-bound from a few thousand tokens on.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


class BlockReads(NamedTuple):
    """What a block's MLP works on, at every distinct prefix; on the model's device."""

    inputs: Float[Tensor, "nodes d_ff"]
    """h: what the down-projection reads."""
    residual: Float[Tensor, "nodes d_model"]
    """The stream to which the down-projection's output is added."""


def sweep_batch(loaded: LoadedModel, memory: DeviceMemory, points: int) -> BatchSize:
    """Return the tokens of a sweep's batch, estimated from what a block holds for a token.

    Args:
        loaded: The model.
        memory: What may be used.
        points: Streams that are held until the batch ends.
    """
    config = loaded.model.config
    width = 4 * config.intermediate_size + (12 + points) * config.hidden_size
    affordable = memory.free_bytes() // (width * loaded.model.dtype.itemsize)
    most = TOKENS_PER_BATCH.get(loaded.device.type, TOKENS_PER_BATCH["cpu"])
    return BatchSize(min(most, affordable), "the prompts' tokens")


@torch.inference_mode()
def capture_streams(
    loaded: LoadedModel, tree: PrefixTree, points: Sequence[int], batch: BatchSize
) -> dict[int, Float[Tensor, "nodes d_model"]]:
    """Sweep all rows once and keep the residual stream at some points.

    Args:
        loaded: The base model.
        tree: The rows.
        points: Which points, each from 0 to n_layers.
        batch: Padded tokens of a batch.

    Returns:
        Streams by point, in the model's number format, in host memory.
    """
    shape = (tree.n_nodes, loaded.model.config.hidden_size)
    values = {point: torch.empty(shape, dtype=loaded.model.dtype) for point in points}
    if not points:
        return values

    def sweep(budget: int) -> None:
        with decoder_slice(loaded.model, loaded.layout, 0, max(1, *points)) as decoder:
            for rows in _batches(tree.lengths, budget):
                ids, mask = _right_padded([tree.sequences[row] for row in rows], loaded.pad_id)
                index = _token_index(tree.offsets, rows)
                first = tree.first[index]
                keep = mask.masked_scatter(mask, first).to(loaded.device)
                with _recording(loaded, points) as seen:
                    decoder(input_ids=ids.to(loaded.device), use_cache=False)
                for point, x in seen.items():
                    values[point][tree.nodes[index[first]]] = x[keep].cpu()

    batch.fit(sweep)
    return values


@torch.inference_mode()
def capture_last_tokens(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], batch: BatchSize
) -> Float[Tensor, "n_points rows d_model"]:
    """Return the stream of each prompt's last token at every point, in host memory.

    Args:
        loaded: The base model.
        prompts: Token ids of each prompt.
        batch: Padded tokens of a batch.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
    points = range(loaded.n_layers + 1)
    shape = (len(points), len(prompts), loaded.model.config.hidden_size)
    values = torch.empty(shape, dtype=loaded.model.dtype)

    def sweep(budget: int) -> None:
        decoder = loaded.layout.decoder_of(loaded.model)
        for rows in _batches(lengths, budget):
            ids, _ = _right_padded([prompts[row] for row in rows], loaded.pad_id)
            with _recording(loaded, points) as seen:
                decoder(input_ids=ids.to(loaded.device), use_cache=False)
            last = (torch.arange(len(rows)), lengths[rows] - 1)
            for point, x in seen.items():
                values[point, rows] = x[last].cpu()

    batch.fit(sweep)
    return values


@torch.inference_mode()
def block_reads(
    loaded: LoadedModel,
    tree: PrefixTree,
    stream: Float[Tensor, "nodes d_model"],
    layer: int,
    batch: BatchSize,
) -> BlockReads:
    """Return what block `layer`'s MLP works on at every distinct prefix.

    One forward of that block alone, from its kept input.

    Args:
        loaded: The base model.
        tree: The rows.
        stream: The block's input.
        layer: Which block.
        batch: Padded tokens of a batch.
    """
    projection = loaded.layout.down_projection_of(loaded.model, layer)
    norm = loaded.layout.mlp_norm_of(loaded.model, layer)

    def empty(width: int) -> Tensor:
        return torch.empty((tree.n_nodes, width), dtype=loaded.model.dtype, device=loaded.device)

    reads = BlockReads(empty(projection.in_features), empty(projection.out_features))

    def sweep(budget: int) -> None:
        with decoder_slice(loaded.model, loaded.layout, layer, layer + 1) as decoder:
            for rows in _batches(tree.lengths, budget):
                index = _token_index(tree.offsets, rows)
                nodes, first = tree.nodes[index], tree.first[index]
                mask = _mask(tree.lengths[rows])
                embeds = torch.zeros((*mask.shape, stream.shape[1]), dtype=stream.dtype)
                embeds[mask] = stream[nodes]
                keep = mask.masked_scatter(mask, first).to(loaded.device)
                with _inputs_of(projection, norm) as seen:
                    decoder(inputs_embeds=embeds.to(loaded.device), use_cache=False)
                there = nodes[first].to(loaded.device)
                reads.inputs[there] = seen[projection][keep]
                reads.residual[there] = seen[norm][keep]

    batch.fit(sweep)
    return reads


@contextmanager
def _recording(loaded: LoadedModel, points: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, a forward keeps its streams at some points by their number."""
    seen: dict[int, Tensor] = {}
    blocks = loaded.layout.blocks_of(loaded.model)

    def on_input(_module: Any, args: tuple[Tensor, ...]) -> None:
        seen[0] = args[0]

    def on_output(point: int) -> Any:
        def hook(_module: Any, _args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[point] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack:
        for point in points:
            handle = (
                blocks[point - 1].register_forward_hook(on_output(point))
                if point
                else blocks[0].register_forward_pre_hook(on_input)
            )
            stack.callback(handle.remove)
        yield seen


@contextmanager
def _inputs_of(*modules: torch.nn.Module) -> Iterator[dict[torch.nn.Module, Tensor]]:
    """Inside, what each module read last stands in the dictionary."""
    seen: dict[torch.nn.Module, Tensor] = {}

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module] = args[0]

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield seen


def _batches(lengths: Int[Tensor, " rows"], budget: int) -> Iterator[list[int]]:
    """Yield row indices in batches of similar length, bounded in padded tokens."""
    batch: list[int] = []
    for row in torch.argsort(lengths, stable=True).tolist():
        if batch and (len(batch) + 1) * int(lengths[row]) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _token_index(
    offsets: Int[Tensor, " rows_and_one"], rows: Sequence[int]
) -> Int[Tensor, " tokens_of_rows"]:
    """Return where the tokens of some rows stand among all tokens."""
    return torch.cat([torch.arange(int(offsets[row]), int(offsets[row + 1])) for row in rows])


def _mask(lengths: Int[Tensor, " batch"]) -> Bool[Tensor, "batch seq"]:
    """Return which places of a right-padded batch hold a token."""
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _right_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and a mask of real tokens, both `[batch, seq]`.

    Padding on the right needs no attention mask: a causal model's real tokens never see it, and
    their positions count from 0 as in an unpadded prompt.
    """
    mask = _mask(torch.tensor([len(prompt) for prompt in prompts]))
    width = mask.shape[1]
    ids = torch.tensor([[*prompt, *[pad_id] * (width - len(prompt))] for prompt in prompts])
    return ids, mask
