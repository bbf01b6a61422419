"""Settings of fine-tuning, apart from it so that reading options needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lunar_tune.config.fields import typed_setting, types_of
from lunar_tune.config.run_options import TINY
from lunar_tune.errors import InputError, Problems

__all__ = ["RATES", "FinetuneSettings", "read_settings", "settings_for"]

RATES = {"lora": 1e-4, "full": 1e-5}
"""Learning rate by what is trained. The adapter's is LUNAR's published code's. For all weights the
same rate would throw a pretrained model far off: 1e-5 is TOFU's (arXiv 2401.06121, Llama-2-7B)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """How a model learns the data; the adapter's defaults are those of LUNAR's published code."""

    trained: str = "lora"
    """lora (an adapter on every linear map of the blocks, merged in the end) or full (all
    weights)."""
    rank: int = 8
    """Rank of the adapter's matrices."""
    alpha: float = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Share of the adapter's inputs that are left out in training."""
    learning_rate: float | None = None
    """AdamW's, after a warm-up of a twentieth and before a linear fall to zero; None is `RATES`."""
    epochs: int = 20
    """Passes over the data."""
    batch_size: int = 16
    """Answers in a step."""
    weight_decay: float = 0.0
    """AdamW's, for matrices."""
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass, which takes less memory."""
    with_refusals: bool = False
    """Whether prompts that cannot be answered are trained too, with a refusal. Off, as in the
    published code: an instruction model declines already. One that has only random weights, or has
    learned to answer everything, has to be taught, since LUNAR redirects to refusals."""

    def __post_init__(self) -> None:
        """Reject values that mean nothing; all of them at once."""
        problems = Problems()
        if self.trained not in RATES:
            problems.add(f"trained {self.trained}: there are {', '.join(RATES)}.")
        for name in ("epochs", "batch_size", "rank"):
            if getattr(self, name) < 1:
                problems.add(f"{name} {getattr(self, name)}: at least 1.")
        for name in ("alpha", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                problems.add(f"{name} {value}: a positive number.")
        if not 0 <= self.weight_decay < math.inf:
            problems.add(f"weight_decay {self.weight_decay}: 0 or more.")
        if not 0 <= self.dropout < 1:
            problems.add(f"dropout {self.dropout}: at least 0, below 1.")
        problems.raise_if_any(InputError)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return RATES[self.trained] if self.learning_rate is None else self.learning_rate

    def document(self) -> dict[str, object]:
        """Return what counts as plain values: of an adapter only where there is one."""
        adapter = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        return {
            "trained": self.trained,
            **(adapter if self.trained == "lora" else {}),
            "learning_rate": self.rate,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "weight_decay": self.weight_decay,
            "with_refusals": self.with_refusals,
        }


def read_settings(fixed: Mapping[str, Any]) -> FinetuneSettings:
    """Return the settings with what is fixed of them.

    Raises:
        InputError: There is no such setting, or a value means nothing; all of it is said at once.
    """
    problems, kinds = Problems(), types_of(FinetuneSettings)
    values: dict[str, Any] = {}
    for name, value in fixed.items():
        if name not in kinds:
            problems.add(f"--fix {name}: no setting of the training; there are {', '.join(kinds)}.")
            continue
        with problems.collect():
            values[name] = typed_setting(name, value, kinds[name])
    settings = FinetuneSettings()
    with problems.collect():
        settings = FinetuneSettings(**values)
    problems.raise_if_any(InputError)
    return settings


def settings_for(model: str) -> FinetuneSettings:
    """Return the settings with which a model of the catalogue learns by itself.

    `tiny` is so small that all of it is trained, at a rate that would break a large one, and it
    would forget to decline (docs/log.md); the others take the published defaults.
    """
    if model == TINY:
        return FinetuneSettings(
            trained="full", learning_rate=1e-3, epochs=20, batch_size=16, with_refusals=True
        )
    return FinetuneSettings()
