"""Settings of LUNAR, apart from the method so that reading options needs no torch.

Covers: what is fixed over a search.
Does not cover: layer, coefficient and the solver's parameter, which are searched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lunar_tune.config.adamw_settings import AdamWSettings
from lunar_tune.errors import InputError

__all__ = ["POSITIONS", "SOLVERS", "LunarSettings"]

SOLVERS = ("adamw", "closed_form", "lora")
POSITIONS = ("all", "last")


@dataclass(frozen=True, slots=True, kw_only=True)
class LunarSettings:
    """What is fixed over a search."""

    solver: str = "adamw"
    """adamw (as published), closed_form (ridge regression) or lora (a product of low rank)."""
    positions: str = "all"
    """Which tokens of a forget prompt are moved: all (as published) or only the last. Tokens that
    are not moved are kept where they are."""
    retain_points: float | None = None
    """Retain tokens in the fit, drawn at random, for each forget token (the paper takes as many,
    1.0); None takes all of them, as the published code does."""
    adamw: AdamWSettings = field(default_factory=AdamWSettings)
    """Settings of the iterative solvers, adamw and lora."""
    rank: int = 8
    """Of lora's product; 8 as published."""

    def __post_init__(self) -> None:
        """Reject values that mean nothing."""
        if self.solver not in SOLVERS:
            raise InputError(f"--solver {self.solver}: lunar has {', '.join(SOLVERS)}.")
        if self.positions not in POSITIONS:
            raise InputError(f"--positions {self.positions}: there are {', '.join(POSITIONS)}.")
        if self.retain_points is not None and not 0 < self.retain_points < math.inf:
            raise InputError(f"--retain-points {self.retain_points}: more than 0, or all.")
        if self.rank < 1:
            raise InputError(f"--rank {self.rank}: at least 1.")
        if self.solver == "lora" and self.adamw.master_dtype != "float32":
            raise InputError("--master-dtype: lora trains in float32.")
