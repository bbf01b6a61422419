"""Residual streams of all prompts at every block, in one batched sweep, and a block's MLP input.

Covers: capture by forward hooks (prompt tokens only, padding removed), the last-token rows that
directions need, and the input of a block's down-projection recomputed from that block's kept
input, which is the same in a full forward: a block is a function of its input, positions and mask.
Does not cover: keeping streams on disk, or decoding.

Shapes: `tokens` is all prompts' tokens one after the other; `n_points` = n_layers + 1, point l
being the input of block l and point n_layers the output of the last block, before the final norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lunar_tune.models.layout import decoder_slice

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = ["ResidualStreams", "capture_streams", "down_projection_inputs"]

# Padded tokens in one batch of a sweep. On a CPU small batches stay in cache; on a GPU the sweep
# of a 7B model is compute-bound from a few thousand tokens on.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True, slots=True)
class ResidualStreams:
    """The residual stream of every prompt token at every point, kept in host memory."""

    values: Float[Tensor, "n_points tokens d_model"]
    offsets: Int[Tensor, " rows_and_one"]
    """Row i's tokens are `offsets[i]` to `offsets[i + 1] - 1`."""

    @property
    def n_rows(self) -> int:
        """Number of prompts."""
        return len(self.offsets) - 1

    def last_tokens(self, rows: Sequence[int], point: int) -> Float[Tensor, "rows d_model"]:
        """Return the stream of the last prompt token of some rows at one point."""
        return self.values[point, self.offsets[torch.as_tensor(rows) + 1] - 1]

    def token_rows(self, rows: Sequence[int]) -> Int[Tensor, " tokens_of_rows"]:
        """Return the indices of all tokens of some rows, row after row."""
        pieces = [torch.arange(int(self.offsets[row]), int(self.offsets[row + 1])) for row in rows]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)


@torch.inference_mode()
def capture_streams(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> ResidualStreams:
    """Sweep all prompts once and keep the residual stream at every point.

    Args:
        loaded: The unmodified model.
        prompts: Token ids of each prompt.

    Returns:
        Streams in the model's number format, in host memory, rows in the order of `prompts`.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    config = loaded.model.config
    values = torch.empty(
        (loaded.n_layers + 1, int(offsets[-1]), config.hidden_size), dtype=loaded.model.dtype
    )
    streams = ResidualStreams(values=values, offsets=offsets)
    decoder = loaded.layout.decoder_of(loaded.model)
    for rows in _batches(lengths, loaded.device):
        ids, mask = _right_padded([prompts[row] for row in rows], loaded.pad_id)
        index = streams.token_rows(rows)
        keep = mask.to(loaded.device)
        with _recording(loaded) as points:
            decoder(input_ids=ids.to(loaded.device), use_cache=False)
        for point, x in enumerate(points):
            values[point, index] = x[keep].cpu()
    return streams


@torch.inference_mode()
def down_projection_inputs(
    loaded: LoadedModel, streams: ResidualStreams, layer: int, rows: Sequence[int]
) -> Float[Tensor, "tokens_of_rows d_ff"]:
    """Return what block `layer`'s down-projection reads at every prompt token of some rows.

    One forward of that block alone, from its kept input. The result is on the model's device in
    the model's number format, row after row.
    """
    lengths = streams.offsets.diff()[torch.as_tensor(rows)]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    projection = loaded.layout.down_projection_of(loaded.model, layer)
    result = torch.empty(
        (int(starts[-1]), projection.in_features), dtype=loaded.model.dtype, device=loaded.device
    )
    with decoder_slice(loaded.model, loaded.layout, layer, layer + 1) as decoder:
        for batch in _batches(lengths, loaded.device):
            embeds, mask = _padded_streams(streams, layer, [rows[i] for i in batch])
            index = torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in batch])
            with _input_of(projection) as seen:
                decoder(inputs_embeds=embeds.to(loaded.device), use_cache=False)
            result[index.to(loaded.device)] = seen[0][mask.to(loaded.device)]
    return result


@contextmanager
def _recording(loaded: LoadedModel) -> Iterator[list[Tensor]]:
    """Inside, a forward appends every block's input and the last block's output, in this order."""
    points: list[Tensor] = []

    def on_input(_module: Any, args: tuple[Tensor, ...]) -> None:
        points.append(args[0])

    def on_output(_module: Any, _args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        points.append(output[0] if isinstance(output, tuple) else output)

    blocks = loaded.layout.blocks_of(loaded.model)
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(on_input).remove)
        stack.callback(blocks[-1].register_forward_hook(on_output).remove)
        yield points


@contextmanager
def _input_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the module's inputs are appended to the list that is yielded."""
    seen: list[Tensor] = []

    def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _batches(lengths: Int[Tensor, " rows"], device: torch.device) -> Iterator[list[int]]:
    """Yield row indices in batches of similar length, bounded in padded tokens."""
    budget = TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cpu"])
    batch: list[int] = []
    for row in torch.argsort(lengths, stable=True).tolist():
        if batch and (len(batch) + 1) * int(lengths[row]) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _right_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and a mask of real tokens, both `[batch, seq]`.

    Padding on the right needs no attention mask: a causal model's real tokens never see it, and
    their positions count from 0 as in an unpadded prompt.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[*prompt, *[pad_id] * (width - len(prompt))] for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(width) < lengths[:, None]


def _padded_streams(
    streams: ResidualStreams, point: int, rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return one point's streams as `[batch, seq, d_model]`, right-padded, and the mask."""
    lengths = streams.offsets.diff()[torch.as_tensor(rows)]
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    embeds = torch.zeros((*mask.shape, streams.values.shape[-1]), dtype=streams.values.dtype)
    embeds[mask] = streams.values[point, streams.token_rows(rows)]
    return embeds, mask
