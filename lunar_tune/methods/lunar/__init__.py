"""LUNAR (arXiv 2502.07218): its settings; the fit of a down-projection and the edit beside it."""

from __future__ import annotations

from dataclasses import dataclass

from lunar_tune.training import CheckedSettings, setting

__all__ = ["SOLVERS", "UNUSED", "LunarSettings"]

SOLVERS = ("adamw", "closed_form", "lora")
# Settings that a solver does not look at.
UNUSED = {
    "adamw": frozenset({"rank"}),
    "closed_form": frozenset({"rank", "epochs", "batch_size", "master_dtype", "weight_decay"}),
    "lora": frozenset({"master_dtype"}),  # it trains in float32
}


@dataclass(frozen=True, kw_only=True)
class LunarSettings(CheckedSettings):
    """What is fixed over a search; a space may search the numbers among it."""

    solver: str = setting(
        "adamw",
        "adamw (as published), closed_form (ridge regression) or lora (a product of low rank).",
        choices=SOLVERS,
    )
    positions: str = setting(
        "all",
        "Which tokens of a forget prompt are moved: all (as published) or only the last. Tokens "
        "that are not moved are kept where they are.",
        choices=("all", "last"),
    )
    retain_points: float | None = setting(
        None,
        "Retain tokens in the fit, drawn at random, for each forget token (the paper takes as "
        "many, 1.0); none takes all of them, as the published code does.",
        above=0,
    )
    rank: int = setting(8, "Rank of lora's product; 8 as published.", least=1)
    epochs: int = setting(20, "Passes of adamw and lora over all tokens; as published.", least=1)
    batch_size: int = setting(64, "Tokens in a step of theirs; 64 as published.", least=1)
    master_dtype: str = setting(
        "float32",
        "Number format of the trained matrix: float32, or bfloat16 as published.",
        choices=("float32", "bfloat16"),
    )
    weight_decay: float | None = setting(
        None,
        "Decoupled weight decay; none means 0 for float32, torch's 0.01 for bfloat16 as published. "
        "In float32 the difference from W₀ is trained: decay pulls towards the original matrix.",
        least=0,
    )

    @property
    def decay(self) -> float:
        """The weight decay in force."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.0 if self.master_dtype == "float32" else 0.01
