"""Settings of the gradient methods that are fixed unless a space searches them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lunar_tune.errors import InputError, Problems

__all__ = ["SEARCHABLE", "TRAINED", "GradientSettings"]

TRAINED = ("lora", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSettings:
    """What is fixed over a search; defaults are PISTOL's (arXiv 2406.16810) where it has them."""

    trained: str = "lora"
    """lora (an adapter on every linear map of the blocks) or full (all weights)."""
    epochs: int = 20
    """Passes over the answers to forget."""
    batch_size: int = 4
    """Answers to forget in a step; as many to keep are drawn where a loss wants them."""
    rank: int = 8
    """Rank of the adapter's matrices."""
    alpha: float = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Share of the adapter's inputs that are left out in training."""
    weight_decay: float = 0.01
    """AdamW's."""
    beta: float | None = None
    """For dpo, npo and simnpo: how far an answer may go before it counts less. None is 0.1, for
    simnpo 2.5: there it multiplies a mean over tokens, and 0.1 would hardly ever count less."""
    gamma: float = 0.0
    """For simnpo: the margin."""
    retain_weight: float = 0.0
    """For npo and simnpo: how much the usual loss on answers to keep counts; 0 leaves it out."""
    steering_alpha: float = 100.0
    """For rmu: weight of keeping retained activations; the paper's code has 100 and 1,200."""
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass, which takes less memory."""

    def __post_init__(self) -> None:
        """Reject values that mean nothing; all of them at once."""
        problems = Problems()
        if self.trained not in TRAINED:
            problems.add(f"trained {self.trained}: there are {', '.join(TRAINED)}.")
        for name in ("epochs", "batch_size", "rank"):
            value = getattr(self, name)
            if value < 1:
                problems.add(f"{name} {value}: at least 1.")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                problems.add(f"{name} {value}: a positive number.")
        for name in ("weight_decay", "gamma", "retain_weight", "steering_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.add(f"{name} {getattr(self, name)}: 0 or more.")
        if not 0 <= self.dropout < 1:
            problems.add(f"dropout {self.dropout}: at least 0, below 1.")
        problems.raise_if_any(InputError)


SEARCHABLE = tuple(
    field.name
    for field in fields(GradientSettings)
    if field.name not in {"trained", "checkpointing"}
)
"""Settings that a search space may search beside the learning rate."""
