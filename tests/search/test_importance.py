"""The importance of parameters: what alone decides has all of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lunar_tune.study.rows import COMPLETE, LEAST_TRIALS, TrialRow, parameter_importance

SPACE: dict[str, BaseDistribution] = {
    "layer": IntDistribution(0, 9),
    "coefficient": FloatDistribution(0.5, 8.0),
    "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "ridge": CategoricalDistribution((0.01, 0.1, 1.0)),
    "fixed": IntDistribution(3, 3),
}
DECIDES: dict[str, Callable[[dict[str, Any]], float]] = {
    "layer": lambda point: point["layer"] / 9,
    "coefficient": lambda point: point["coefficient"] / 8,
    "learning_rate": lambda point: -math.log10(point["learning_rate"]) / 5,
    "ridge": lambda point: float(point["ridge"] == 0.1),
}


def rows_of(score: Callable[[dict[str, Any]], float], n_trials: int = 40) -> list[TrialRow]:
    draw = random.Random(1)
    rows = []
    for number in range(n_trials):
        point = {
            "layer": draw.randint(0, 9),
            "coefficient": draw.uniform(0.5, 8.0),
            "learning_rate": 10 ** draw.uniform(-5, -1),
            "ridge": draw.choice((0.01, 0.1, 1.0)),
            "fixed": 3,
        }
        scores = {"forget_rouge1": score(point)}
        rows.append(TrialRow(number=number, state=COMPLETE, parameters=point, scores=scores))
    return rows


@pytest.mark.parametrize("name", DECIDES)
def test_a_parameter_that_alone_decides_has_most_of_the_importance(name: str) -> None:
    rows = rows_of(DECIDES[name])
    shares, again = (parameter_importance(rows, SPACE, "forget_rouge1") for _ in range(2))
    assert shares == again
    assert shares is not None
    assert next(iter(shares)) == name
    assert shares[name] > 0.8
    assert set(shares) == set(DECIDES), "what has one value alone has no part"
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert sum(shares.values()) <= 1 + 1e-9


def test_there_is_none_where_trials_tell_nothing() -> None:
    rows, equal = rows_of(DECIDES["layer"]), rows_of(lambda _: 0.5)
    for told in (rows[: LEAST_TRIALS - 1], equal):
        assert parameter_importance(told, SPACE, "forget_rouge1") is None
    assert parameter_importance(rows, SPACE, "forget_mrr") is None
    assert parameter_importance(rows, {"fixed": SPACE["fixed"]}, "forget_rouge1") is None
