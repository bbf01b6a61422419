"""Attention keys and values of rows under way, in place: slot p of a row holds its token p.

A token's slot is its position, so what was written for a rejected draft is simply overwritten, and
one mask serves every block: a query at position p sees slots 0 to p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["SlotCache"]


class SlotCache:
    """Keys and values `[rows, slots, kv_heads, head_dim]` of every block.

    Args:
        rows: How many rows.
        slots: Tokens of the longest row.
    """

    def __init__(self, rows: int, slots: int) -> None:
        self.rows, self.slots = rows, slots
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._positions: Tensor | None = None
        self._row_index: Tensor | None = None
        self._width = slots

    def at(
        self, positions: Int[Tensor, "batch seq"], *, width: int
    ) -> Bool[Tensor, "batch 1 seq width"]:
        """Say which tokens the next forward computes, and return its attention mask.

        Args:
            positions: Of each token; each row of the cache has a line.
            width: Slots that any query looks at.
        """
        self._positions, self._width = positions, width
        self._row_index = torch.arange(len(positions), device=positions.device)[:, None]
        return torch.arange(width, device=positions.device) <= positions[:, None, :, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a block's new keys and values; return all that its queries may look at."""
        if self._positions is None:
            raise AssertionError("`at` comes first")
        seen = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            slots = kept[layer_idx]
            slots[self._row_index, self._positions] = new.transpose(1, 2)
            seen.append(slots[: len(new), : self._width].transpose(1, 2))
        return seen[0], seen[1]

    def allocate(self, kept: dict[int, Tensor], layer: int, like: Tensor) -> None:
        """Make room for a block; zeros, since what is masked is still multiplied by 0."""
        kept[layer] = like.new_zeros((self.rows, self.slots, *like.shape[-2:]))

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Return the width; positions are given, so nothing is derived from it."""
        return self._width

    def fill(
        self,
        layer: int,
        rows: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Write keys and values `[tokens, kv_heads, head_dim]` that were computed before."""
        for kept, new in ((self.keys, keys), (self.values, values)):
            if layer not in kept:
                self.allocate(kept, layer, new)
            kept[layer][rows, positions] = new.to(kept[layer].device)

    def keep(self, holes: Sequence[int], movers: Sequence[int], rows: int) -> None:
        """Let rows leave: `movers` take the places of `holes`, and `rows` of them stay."""
        for kept in (self.keys, self.values):
            for tensor in kept.values():
                if holes:
                    tensor[torch.tensor(holes)] = tensor[torch.tensor(movers)]
        self.rows = rows

    def grow(self, slots: int) -> None:
        """Make rows longer; what is beyond `rows` is given up."""
        for kept in (self.keys, self.values):
            for layer, tensor in kept.items():
                longer = tensor.new_zeros((self.rows, slots, *tensor.shape[2:]))
                longer[:, : self.slots] = tensor[: self.rows, : self.slots]
                kept[layer] = longer
        self.slots = slots
