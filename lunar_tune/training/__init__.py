"""Training; here, without torch, the settings that `--fix` sets, each declared once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lunar_tune.config.fields import check_values, option, typed_setting, types_of
from lunar_tune.errors import Problems

Settings = TypeVar("Settings")
TRAINED = ("lora", "full")
# The field of a setting: an option that has no flag, so that messages name it without dashes.
setting = functools.partial(option, group="settings", positional=True)


@dataclass(frozen=True, kw_only=True)
class CheckedSettings:
    """Settings that refuse values out of range, all of them at once."""

    def __post_init__(self) -> None:
        problems = Problems()
        check_values(self, problems)
        problems.raise_if_any()


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(CheckedSettings):
    """How an adapter or all weights are trained."""

    trained: str = setting("lora", choices=TRAINED)
    """lora (an adapter on every linear map of the blocks) or full (all weights)."""
    epochs: int = setting(20, least=1)
    """Passes over the examples."""
    batch_size: int = setting(4, least=1)
    """Examples in a step."""
    rank: int = setting(8, least=1)
    """Rank of the adapter's matrices."""
    alpha: float = setting(32.0, above=0)
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = setting(0.05, least=0, below=1)
    """Share of the adapter's inputs that are left out in training."""
    weight_decay: float = setting(0.01, least=0)
    """Weight decay of AdamW, for matrices."""
    checkpointing: bool = setting(False)
    """Compute activations again in the backward pass, which takes less memory."""


def typed_settings(owner: type, given: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """Return what is given of a class's settings as their types, and note what has another."""
    kinds, values = types_of(owner), {}
    for name in [name for name in given if name in kinds]:
        with problems.collect():
            values[name] = typed_setting(name, given[name], kinds[name])
    return values


def with_settings(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Return settings with what is given of them, or raise an InputError with all mistakes."""
    problems, changed = Problems(), settings
    values = typed_settings(type(settings), given, problems)
    with problems.collect():
        fixed: Any = settings
        changed = dataclasses.replace(fixed, **values)
    problems.raise_if_any()
    return changed
