"""Settings of LUNAR: what is fixed over a search."""

from __future__ import annotations

from dataclasses import dataclass

from lunar_tune.errors import InputError
from lunar_tune.training import CheckedSettings, setting

SOLVERS = ("adamw", "closed_form", "lora")
# Settings that a solver does not look at.
UNUSED = {
    "adamw": frozenset({"rank"}),
    "closed_form": frozenset({"rank", "epochs", "batch_size", "master_dtype", "weight_decay"}),
    "lora": frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class LunarSettings(CheckedSettings):
    """What is fixed over a search; a space may search the numbers among it."""

    solver: str = setting("adamw", choices=SOLVERS)
    """adamw (as published), closed_form (ridge regression) or lora (a product of low rank)."""
    positions: str = setting("all", choices=("all", "last"))
    """Which tokens of a forget prompt are moved: all (as published) or only the last. Tokens that
    are not moved are kept where they are."""
    retain_points: float | None = setting(None, above=0)
    """Retain tokens in the fit, drawn at random, for each forget token (the paper takes as many,
    1.0); none takes all of them, as the published code does."""
    rank: int = setting(8, least=1)
    """Rank of lora's product; 8 as published."""
    epochs: int = setting(20, least=1)
    """Passes of adamw and lora over all tokens; as published."""
    batch_size: int = setting(64, least=1)
    """Tokens in a step of theirs; 64 as published."""
    master_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Number format of the trained matrix: float32, or bfloat16 as published. At small learning
    rates, .001 say, float32 forgets far more: bfloat16 loses small updates."""
    weight_decay: float | None = setting(None, least=0)
    """Decoupled weight decay; none means 0 for float32, torch's 0.01 for bfloat16 as published. In
    float32 the difference from W₀ is trained: decay pulls towards the original matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver == "lora" and self.master_dtype != "float32":
            raise InputError("master_dtype: must be float32 with solver lora.")

    @property
    def decay(self) -> float:
        """The weight decay in force."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.0 if self.master_dtype == "float32" else 0.01
