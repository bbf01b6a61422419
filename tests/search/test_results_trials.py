"""Which trial a search gives, and what it says where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow
from lunar_tune.study.study import StoredStudy


def search_of(forget: Sequence[float | None], *, feasible: bool = True) -> SearchResults:
    """Return a search whose trials have these forget scores; None is a failed one."""
    goal = Goal.read("forget_rouge1", ("retain_rouge1>=0.8",))
    rows = [
        TrialRow(number=number, state=FAILED, parameters={})
        if score is None
        else TrialRow(
            number=number,
            state=COMPLETE,
            parameters={},
            scores={"forget_rouge1": score, "retain_rouge1": 0.9 if feasible else 0.5},
            objective=score,
            feasible=feasible,
        )
        for number, score in enumerate(forget)
    ]
    study = StoredStudy(rows=tuple(rows), notes={"goal": goal.text})
    return SearchResults(folder=Folder(Path("one")), study=study)


def refused(results: SearchResults, number: int | None = None) -> str:
    with pytest.raises(InputError) as caught:
        results.trial(number)
    return str(caught.value)


def test_where_none_is_confirmed_the_best_as_searched_is_named() -> None:
    said = refused(search_of([0.5, 0.25, None, 0.75]))
    assert said == (
        "one: has no confirmed best setting, the best as searched is trial 1; name a trial by its "
        "number (0, 1, 3)."
    )
    assert "setting, and no trial is feasible; name" in refused(search_of([0.1], feasible=False))


def test_many_numbers_are_shortened() -> None:
    said = refused(search_of([None, *[0.5] * 99]), 200)
    assert said == (
        "one, trial 200: there is no such trial; completed are 1, 2, 3, 4, 5 … 99, 99 in all."
    )
