"""Settings of the solvers, apart from them so that reading options needs no torch.

Covers: what is fixed over a search.
Does not cover: the searched parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lunar_tune.errors import InputError

__all__ = ["MASTER_DTYPES", "AdamWSettings"]

MASTER_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """The iterative solver's fixed settings; the learning rate is searched."""

    epochs: int = 20
    """Passes over all tokens; 20 as published."""
    batch_size: int = 64
    """Tokens in a step; 64 as published."""
    master_dtype: str = "float32"
    """Number format of the trained matrix: float32, or bfloat16 as published."""
    weight_decay: float | None = None
    """Decoupled weight decay; None means 0 for float32, torch's 0.01 for bfloat16 as published.
    In float32 the difference from W₀ is trained, so decay pulls towards the original matrix."""

    def __post_init__(self) -> None:
        """Reject values that mean nothing."""
        if self.epochs < 1:
            raise InputError(f"--epochs {self.epochs}: at least 1.")
        if self.batch_size < 1:
            raise InputError(f"a batch of {self.batch_size} tokens: at least 1.")
        if self.master_dtype not in MASTER_DTYPES:
            raise InputError(
                f"--master-dtype {self.master_dtype}: there are {', '.join(MASTER_DTYPES)}."
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise InputError(f"--weight-decay {self.weight_decay}: 0 or more.")

    @property
    def decay(self) -> float:
        """The weight decay in force."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.0 if self.master_dtype == "float32" else 0.01
