"""Searches that were never run, as reports."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from lunar_tune.metrics.goal import Goal
from lunar_tune.report.report import LayerCurve, Report
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow, best_first

BEGUN = datetime(2026, 1, 1)
LONG = (
    "some-organisation/a_very_$long$_model_name_that_goes_on_and_on-instruct-v0.2_finetuned, "
    "my_contracts_of_2024: forget author_1, author_2, author_3, author_4, author_5, author_17"
)
CURVE = LayerCurve(
    layers=(2, 3, 4, 7),
    refusal=(0.1, 0.6, 0.5, 0.2),
    truth=(0.9, 0.1, 0.2, 0.3),
    base_model=-0.9,
    best=3,
    recommended=(3, 4),
)
IMPORTANCE = {
    "forget_rouge1": {"coefficient": 0.5, "layer": 0.125, "learning_rate": 0.0},
    "retain_rouge1": {"layer": 0.75, "coefficient": 0.25},
}


def trial(
    number: int,
    forget: float,
    retain: float,
    parameters: Mapping[str, Any],
    goal: Goal,
) -> TrialRow:
    """Return a completed trial that ended a minute after the one before it."""
    scores = {
        "forget_rouge1": forget,
        "retain_rouge1": retain,
        "forget_log_prob": -100 * (1 - forget),
        "retain_perplexity": 1 + 40 * (1 - retain),
        "deviation_score": 100 * math.hypot(forget, 1 - retain),
    }
    return TrialRow(
        number=number,
        state=COMPLETE,
        parameters=parameters,
        scores=scores,
        objective=goal.value(scores),
        feasible=goal.is_kept(scores),
        started=BEGUN + timedelta(minutes=number),
        ended=BEGUN + timedelta(minutes=number + 1),
    )


def failed(number: int) -> TrialRow:
    """Return a trial that failed."""
    return TrialRow(
        number=number,
        state=FAILED,
        parameters=setting(random.Random(number)),
        failure="the loss became NaN",
        started=BEGUN + timedelta(minutes=number),
        ended=BEGUN + timedelta(minutes=number + 0.5),
    )


def setting(draw: random.Random) -> dict[str, Any]:
    """Draw a setting."""
    return {
        "layer": draw.randint(8, 12),
        "coefficient": draw.uniform(0.5, 6.0),
        "learning_rate": 10 ** draw.uniform(-4, -1.5),
    }


def report_of(
    rows: Sequence[TrialRow],
    *,
    goal: Goal,
    title: str = "tiny, mini: forget A_B",
    **more: Any,
) -> Report:
    """Return the report of rows; the best is confirmed a little worse than it was searched."""
    best = next(iter(best_first(list(rows))), None)
    return Report(
        title=title,
        facts={},
        goal=goal,
        baseline={
            "forget_rouge1": 0.98,
            "retain_rouge1": 0.99,
            "forget_log_prob": -2.0,
            "retain_perplexity": 1.4,
        },
        rows=rows,
        best=best,
        confirmed={k: v + 0.001 for k, v in best.scores.items()} if best is not None else None,
        log_scale=frozenset({"learning_rate"}),
        **more,
    )


def search_of(
    n_trials: int,
    *,
    seed: int = 0,
    objective: str = "forget_rouge1",
    constraints: Iterable[str] = ("retain_rouge1>=0.8",),
    **more: Any,
) -> Report:
    """Return a search in which every seventh trial failed."""
    draw = random.Random(seed)
    goal = Goal.read(objective, constraints)
    rows = []
    for number in range(n_trials):
        point = setting(draw)
        push = point["coefficient"] * (point["learning_rate"] / 0.01) ** 0.5
        forget = 1 / (1 + math.exp(3 * (push - 1.5))) * draw.uniform(0.9, 1.0)
        retain = max(0.0, 1 - 0.1 * max(0.0, push - 1) ** 1.5 - draw.uniform(0, 0.05))
        rows.append(
            failed(number) if number % 7 == 6 else trial(number, forget, retain, point, goal)
        )
    return report_of(rows, goal=goal, **more)


GOAL = Goal.read("forget_rouge1", ["retain_rouge1>=0.8"])
FULL: dict[str, Any] = {"importance": lambda: IMPORTANCE, "layers": CURVE}
POINT = {"layer": 9, "coefficient": 2.0, "learning_rate": 0.003}
SEARCHES = {
    "of 6": search_of(6, **FULL),
    "of 30": search_of(30, **FULL),
    "of 300 and a long name": search_of(300, title=LONG, **FULL),
    "of one word that does not end": search_of(12, title="W" * 200, **FULL),
    "of another goal": search_of(
        30, objective="forget_log_prob", constraints=["retain_perplexity<=3", "retain_rouge1>=0.5"]
    ),
    "without bounds": search_of(30, constraints=[]),
    "to raise what is kept": search_of(
        30, objective="retain_rouge1", constraints=["forget_rouge1<=0.2"]
    ),
    "without a trial": report_of([], goal=GOAL, layers=CURVE),
    "of failures": report_of([failed(0), failed(1)], goal=GOAL),
    "of one trial": report_of([trial(0, 0.2, 0.9, POINT, GOAL)], goal=GOAL),
    "of infeasible trials": report_of(
        [trial(n, 0.1, 0.3 + n / 100, POINT | {"layer": n}, GOAL) for n in range(5)], goal=GOAL
    ),
    "of equal trials": report_of([trial(n, 0.5, 0.9, POINT, GOAL) for n in range(5)], goal=GOAL),
    "of near rates": report_of(
        [trial(n, 0.5, 0.9, {"learning_rate": 0.0031 + n / 1e5}, GOAL) for n in range(5)], goal=GOAL
    ),
    "of a list": dataclasses.replace(
        report_of(
            [trial(n, n / 9, 0.9, {"ridge": 10.0 ** (n % 5 - 4)}, GOAL) for n in range(9)],
            goal=GOAL,
        ),
        listed={"ridge": (1e-2, 1e-3, 1e-4, 1.0, 1e-1)},
    ),
}
