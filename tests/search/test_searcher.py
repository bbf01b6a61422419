"""Between Ray and the study, without Ray: who is told what, and when no trial starts any more."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher
from test_study import result, study_in

from lunar_tune.reporting.rows import COMPLETE, FAILED, RUNNING, TrialRow
from lunar_tune.search.searcher import Conductor, NewsCallback, StudySearcher


class Heard:
    """A conductor on a study in a temporary folder, and what its listeners heard."""

    def __init__(
        self, folder: Path, *, deadline: float | None = None, max_failures: int = 2
    ) -> None:
        self.news: list[tuple[str, TrialRow]] = []
        self.conductor = Conductor(
            study_in(folder),
            deadline=deadline,
            max_failures=max_failures,
            on_start=lambda row: self.news.append(("start", row)),
            on_end=lambda row: self.news.append(("end", row)),
        )
        self.searcher = StudySearcher(self.conductor)
        self.callback = NewsCallback(self.conductor)

    def end(self, trial_id: str, outcome: dict[str, Any]) -> None:
        """Do what Ray does at a trial's end: the searcher first, then the callback."""
        self.searcher.on_trial_complete(trial_id, outcome)
        self.callback.on_trial_complete(1, [], SimpleNamespace(trial_id=trial_id))

    def crash(self, trial_id: str, error: Exception) -> None:
        """Do what Ray does at a trial's crash."""
        self.searcher.on_trial_complete(trial_id, None, error=True)
        trial = SimpleNamespace(trial_id=trial_id, get_error=lambda: error)
        self.callback.on_trial_error(1, [], trial)


@pytest.fixture
def heard(tmp_path: Path) -> Heard:
    return Heard(tmp_path)


def report(forget: float = 0.2, retain: float = 0.9) -> dict[str, Any]:
    return {"number": 0, "report": json.dumps(result(forget, retain)), "done": True}


def test_a_suggestion_is_the_number_and_the_parameters_of_the_study(heard: Heard) -> None:
    suggestion = heard.searcher.suggest("ray-1")

    row = heard.conductor.study.row(0)
    assert suggestion == {"number": 0, "parameters": row.parameters}
    assert [(what, one.number, one.state) for what, one in heard.news] == [("start", 0, RUNNING)]


def test_listeners_hear_of_a_result_when_the_study_has_it(heard: Heard) -> None:
    heard.searcher.suggest("ray-1")
    heard.end("ray-1", report())

    what, row = heard.news[-1]
    assert (what, row.state, row.scores["forget_rouge1"]) == ("end", COMPLETE, 0.2)
    assert heard.conductor.study.row(0) == row


def test_a_trial_that_reports_a_failure_is_failed_with_its_reason(heard: Heard) -> None:
    heard.searcher.suggest("ray-1")
    heard.end("ray-1", {"number": 0, "failure": "the loss became NaN", "done": True})

    row = heard.news[-1][1]
    assert (row.state, row.failure) == (FAILED, "the loss became NaN")


def test_a_trial_that_crashes_is_failed_with_the_error(heard: Heard) -> None:
    heard.searcher.suggest("ray-1")
    cause = RuntimeError("CUDA out of memory\nand a long tail")
    error = Exception("ray's own words")
    error.cause = cause  # type: ignore[attr-defined]  # as RayTaskError has it
    heard.crash("ray-1", error)

    row = heard.news[-1][1]
    assert (row.state, row.failure) == (FAILED, "RuntimeError: CUDA out of memory")


def test_a_trial_that_ends_without_a_result_is_failed(heard: Heard) -> None:
    heard.searcher.suggest("ray-1")
    heard.end("ray-1", {})

    assert heard.news[-1][1].failure == "the trial ended without a result"


def test_a_score_that_is_not_finite_counts_as_a_failure(heard: Heard) -> None:
    for name in ("ray-1", "ray-2"):
        heard.searcher.suggest(name)
        heard.end(name, report(forget=math.nan))

    assert heard.conductor.gave_up
    assert heard.searcher.suggest("ray-3") == Searcher.FINISHED


def test_trials_at_once_are_told_apart(heard: Heard) -> None:
    first = heard.searcher.suggest("ray-1")
    second = heard.searcher.suggest("ray-2")
    heard.end("ray-2", report(forget=0.7))
    heard.end("ray-1", report(forget=0.4))

    assert (first["number"], second["number"]) == (0, 1)
    rows = heard.conductor.study.rows()
    assert [row.scores["forget_rouge1"] for row in rows] == [0.4, 0.7]


def test_too_many_failures_in_a_row_end_the_search(heard: Heard) -> None:
    for name, outcome in (
        ("1", {"failure": "x"}),
        ("2", report()),
        ("3", {"failure": "x"}),
        ("4", {"failure": "x"}),
    ):
        assert not heard.conductor.gave_up
        assert heard.searcher.suggest(name) != Searcher.FINISHED
        heard.end(name, outcome)

    assert heard.conductor.gave_up
    assert heard.searcher.suggest("5") == Searcher.FINISHED
    assert len(heard.conductor.study.rows()) == 4


def test_no_trial_starts_after_the_deadline(tmp_path: Path) -> None:
    heard = Heard(tmp_path, deadline=0.0)

    assert heard.searcher.suggest("ray-1") == Searcher.FINISHED
    assert not heard.conductor.gave_up
    assert heard.conductor.study.rows() == []


def test_ray_can_pickle_both_without_the_study(heard: Heard) -> None:
    """Ray saves them; nobody restores them."""
    for one in (heard.searcher, heard.callback):
        assert vars(pickle.loads(pickle.dumps(one))) == {}


def test_metric_and_space_are_not_rays_affair(heard: Heard) -> None:
    assert heard.searcher.set_search_properties("loss", "min", {"x": 1}) is True
