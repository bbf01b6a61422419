"""What holds for all answers of one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["AnswerRules"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRules:
    """What holds for all answers of one evaluation."""

    edited_layer: int | None
    """The block whose down-projection is changed, with nothing below it and nothing else in it;
    None computes everything anew."""
    max_new_tokens: int
    """Token budget of an answer."""
    stop: Callable[[Sequence[int], Sequence[Sequence[int]]], list[bool]] | None = None
    """Says of each row, from row numbers and tokens so far, whether it need not go on; None lets
    all of them go on."""
