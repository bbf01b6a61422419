"""Specs of short trials, whose full evaluations answer with twelve tokens instead of 512.

The package is imported in the fixtures: this file may be read before shapes are checked at imports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lunar_tune.trial.spec import TrialSpec


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    from trial_specs import write_records

    file = tmp_path_factory.mktemp("data") / "pairs.json"
    return write_records(file, {"A_B": 3, "B_C": 2, "C_D": 4})


@pytest.fixture(scope="session")
def spec(checkpoint: Callable[..., Path], data: str) -> Callable[..., TrialSpec]:
    from trial_specs import random_spec

    def make(*, family: str = "qwen2", **options: Any) -> TrialSpec:
        return random_spec(checkpoint(family), **({"data": data} | options))

    return make


@pytest.fixture(autouse=True, scope="module")
def full_budget() -> Iterator[int]:
    """A random model ends no answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lunar_tune.trial.evaluator.PUBLISHED_MAX_NEW_TOKENS", 12)
        yield 12
