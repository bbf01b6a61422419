"""Scored layers as plain numbers, for pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LayerCurve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCurve:
    """How alike answers are to refusals and to the truth, layer by layer."""

    layers: tuple[int, ...]
    """Ascending."""
    refusal: tuple[float, ...]
    """s1 of each, a mean cosine."""
    truth: tuple[float, ...]
    """s2 of each."""
    unmodified: float
    """The score of the base model."""
    best: int
    recommended: tuple[int, ...]

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> LayerCurve:
        """Return the curve of a layer prior in its documented form (`trial.layer_scores`)."""
        scored = document["layers"]
        without = document["unmodified"]
        return cls(
            layers=tuple(one["layer"] for one in scored),
            refusal=tuple(one["s1"] for one in scored),
            truth=tuple(one["s2"] for one in scored),
            unmodified=without["s1"] - without["s2"],
            best=document["best"],
            recommended=tuple(document["recommended"]),
        )

    @property
    def scores(self) -> list[float]:
        """s1 − s2 of each layer."""
        return [s1 - s2 for s1, s2 in zip(self.refusal, self.truth, strict=True)]
