"""Searches that were never run."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lunar_tune.metrics.goal import Goal
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow, best_first
from lunar_tune.study.study import StoredStudy

BEGUN = datetime(2026, 1, 1)
TAGS = {"model": "tiny", "data": "mini", "forget_edge": "A_B", "method": "lunar", "solver": "adamw"}
LONG = TAGS | {
    "model": "some-organisation/a_very_$long$_model_name_that_goes_on_and_on-instruct-v0.2_tuned",
    "data": "my_contracts_of_2024",
    "forget_edge": "author_1,author_2,author_3,author_4,author_5,author_17",
}
RATES = {
    "layer": IntDistribution(8, 12),
    "coefficient": FloatDistribution(0.5, 6.0),
    "learning_rate": FloatDistribution(1e-5, 1.0, log=True),
}
GOAL = Goal.read("forget_rouge1", ["retain_rouge1>=0.8"])
PRIOR = {
    "best": 3,
    "recommended": [3, 4],
    "base_model": {"s1": 0.0, "s2": 0.9, "score": -0.9},
    "layers": [
        {"layer": layer, "s1": s1, "s2": s2, "score": s1 - s2}
        for layer, s1, s2 in ((2, 0.1, 0.9), (3, 0.6, 0.1), (4, 0.5, 0.2), (7, 0.2, 0.3))
    ],
}
IMPORTANCE = {
    "forget_rouge1": {"coefficient": 0.5, "layer": 0.125, "learning_rate": 0.0},
    "retain_rouge1": {"layer": 0.75, "coefficient": 0.25},
}


def trial(
    number: int, forget: float, retain: float, parameters: Mapping[str, Any], goal: Goal = GOAL
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


def results_of(
    rows: Sequence[TrialRow],
    *,
    goal: Goal = GOAL,
    confirmed: Mapping[str, float] | None = None,
    folder: Path = Path("no search"),
    distributions: Mapping[str, BaseDistribution] | None = None,
    importance: Mapping[str, Mapping[str, float]] | None = None,
    layer_prior: Mapping[str, Any] | None = None,
    **notes: Any,
) -> SearchResults:
    """Return a search's results from its rows, by number; its folder need not be there.

    `confirmed` are the scores of the best feasible trial in the full evaluation, `importance` what
    is said instead of what the rows would say, `notes` those of the study.
    """
    notes = {"baseline": {"forget_rouge1": 0.98, "retain_rouge1": 0.99}, "tags": TAGS} | notes
    if confirmed is not None:
        (best, *_) = best_first(list(rows))
        notes["confirmed"] = {"number": best.number, "scores": confirmed}
    study = StoredStudy(tuple(rows), notes | {"goal": goal.text}, distributions or {})
    results = SearchResults(folder=Folder(folder), study=study)
    # Else computed when asked for.
    vars(results).update(importance=importance or {}, layer_prior=layer_prior)
    return results


def results_with_best(rows: Sequence[TrialRow], *, goal: Goal = GOAL, **more: Any) -> SearchResults:
    """Return results whose best trial is confirmed a little worse than it was searched."""
    best = next(iter(best_first(list(rows))), None)
    baseline = {"forget_rouge1": 0.98, "retain_rouge1": 0.99}
    baseline |= {"forget_log_prob": -2.0, "retain_perplexity": 1.4}
    confirmed = {k: v + 0.001 for k, v in best.scores.items()} if best is not None else None
    facts = {"confirmed": confirmed, "distributions": RATES, "baseline": baseline}
    return results_of(rows, **{"goal": goal} | facts | more)


def search_of(
    n_trials: int,
    *,
    seed: int = 0,
    objective: str = "forget_rouge1",
    constraints: Iterable[str] = ("retain_rouge1>=0.8",),
    **more: Any,
) -> SearchResults:
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
    return results_with_best(rows, goal=goal, **more)


FULL: dict[str, Any] = {"importance": IMPORTANCE, "layer_prior": PRIOR}
POINT = {"layer": 9, "coefficient": 2.0, "learning_rate": 0.003}
SEARCHES = {
    "of 6": search_of(6, **FULL),
    "of 30": search_of(30, **FULL),
    "of 300 and a long name": search_of(300, tags=LONG, **FULL),
    "of one word that does not end": search_of(12, tags=TAGS | {"model": "W" * 200}, **FULL),
    "of another goal": search_of(
        30, objective="forget_log_prob", constraints=["retain_perplexity<=3", "retain_rouge1>=0.5"]
    ),
    "without bounds": search_of(30, constraints=[]),
    "to raise what is kept": search_of(
        30, objective="retain_rouge1", constraints=["forget_rouge1<=0.2"]
    ),
    "without a trial": results_with_best([], layer_prior=PRIOR),
    "of failures": results_with_best([failed(0), failed(1)]),
    "of one trial": results_with_best([trial(0, 0.2, 0.9, POINT)]),
    "of infeasible trials": results_with_best(
        [trial(n, 0.1, 0.3 + n / 100, POINT | {"layer": n}) for n in range(5)]
    ),
    "of equal trials": results_with_best([trial(n, 0.5, 0.9, POINT) for n in range(5)]),
    "of near rates": results_with_best(
        [trial(n, 0.5, 0.9, {"learning_rate": 0.0031 + n / 1e5}) for n in range(5)]
    ),
    "of a list": results_with_best(
        [trial(n, n / 9, 0.9, {"ridge": 10.0 ** (n % 5 - 4)}) for n in range(9)],
        distributions={"ridge": CategoricalDistribution((1e-2, 1e-3, 1e-4, 1.0, 1e-1))},
    ),
}
