"""LUNAR (arXiv 2502.07218): its settings; the fit of a down-projection and the edit beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lunar_tune.errors import Problems

__all__ = ["SOLVERS", "LunarSettings"]

SOLVERS = ("adamw", "closed_form", "lora")
CHOICES = {
    "solver": SOLVERS,
    "positions": ("all", "last"),
    "master_dtype": ("float32", "bfloat16"),
}
UNUSED = {
    "adamw": frozenset({"rank"}),
    "closed_form": frozenset({"rank", "epochs", "batch_size", "master_dtype", "weight_decay"}),
    "lora": frozenset[str](),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LunarSettings:
    """What is fixed over a search; a space may search the numbers among it."""

    solver: str = "adamw"
    """adamw (as published), closed_form (ridge regression) or lora (a product of low rank)."""
    positions: str = "all"
    """Which tokens of a forget prompt are moved: all (as published) or only the last. Tokens that
    are not moved are kept where they are."""
    retain_points: float | None = None
    """Retain tokens in the fit, drawn at random, for each forget token (the paper takes as many,
    1.0); None takes all of them, as the published code does."""
    rank: int = 8
    """Rank of lora's product; 8 as published."""
    epochs: int = 20
    """Passes of adamw and lora over all tokens; 20 as published."""
    batch_size: int = 64
    """Tokens in a step of theirs; 64 as published."""
    master_dtype: str = "float32"
    """Number format of the trained matrix: float32, or bfloat16 as published."""
    weight_decay: float | None = None
    """Decoupled weight decay; None means 0 for float32, torch's 0.01 for bfloat16 as published.
    In float32 the difference from W₀ is trained, so decay pulls towards the original matrix."""

    def __post_init__(self) -> None:
        """Reject values that mean nothing; all of them at once."""
        problems = Problems()
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                problems.add(f"{name} {value}: there are {', '.join(known)}.")
        for name in ("rank", "epochs", "batch_size"):
            if (number := getattr(self, name)) < 1:
                problems.add(f"{name} {number}: at least 1.")
        if self.retain_points is not None and not 0 < self.retain_points < math.inf:
            problems.add(f"retain_points {self.retain_points}: more than 0, or none.")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            problems.add(f"weight_decay {self.weight_decay}: 0 or more.")
        if self.solver == "lora" and self.master_dtype != "float32":
            problems.add("master_dtype: lora trains in float32.")
        problems.raise_if_any()

    @property
    def decay(self) -> float:
        """The weight decay in force."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.0 if self.master_dtype == "float32" else 0.01

    @property
    def without_use(self) -> frozenset[str]:
        """The settings that the solver does not look at."""
        return UNUSED[self.solver]
