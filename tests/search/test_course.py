"""The course of a search and Ray's view of it, without Ray: what runs next, who is told what."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher
from test_study import frozen, result, study_in

from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.metrics.goal import goal_of
from lunar_tune.search.backends.ray.searcher import CourseSearcher, NewsCallback
from lunar_tune.search.loop import CONFIRMATION, TRIAL, VANILLA, Confirmation, Course
from lunar_tune.study.rows import COMPLETE, FAILED, RUNNING, TrialRow
from lunar_tune.study.study import Study

GOOD = {"forget_rouge1": 1.0, "retain_rouge1": 0.95}


class Heard:
    """A course on a study in a temporary folder, and what its listener heard."""

    def __init__(self, folder: Path, *, refuses: bool = False, **options: Any) -> None:
        self.folder, self.refuses = folder, refuses
        self.news: list[tuple[str, Any]] = []
        options = {"num_trials": 3, "goal": goal_of(SearchConfig()), "max_failures": 2} | options
        self.course = Course(self, **options)
        self.searcher = CourseSearcher(self.course)
        self.callback = NewsCallback(self.course)

    def on_vanilla(
        self, scores: Mapping[str, float], note: str | None, layer_prior: str | None
    ) -> Study:
        self.news.append(("vanilla", (scores, note)))
        self.layer_prior = layer_prior
        if self.refuses:
            raise InputError("nothing to forget")
        return study_in(self.folder)

    def on_start(self, row: TrialRow) -> None:
        self.news.append(("start", row))

    def on_end(self, row: TrialRow) -> None:
        self.news.append(("end", row))

    def on_confirming(self, row: TrialRow) -> None:
        self.news.append(("confirming", row.number))

    def on_unconfirmed(self, row: TrialRow, reason: str) -> None:
        self.news.append(("unconfirmed", (row.number, reason)))

    def on_confirmed(self, row: TrialRow, confirmation: Confirmation, *, holds: bool) -> None:
        assert row.number == confirmation.number
        self.news.append(("holds" if holds else "falls", row.number))

    @property
    def study(self) -> Study:
        assert self.course.study is not None
        return self.course.study

    def end(self, task_id: str, outcome: dict[str, Any]) -> None:
        """Do what Ray does at a task's end: the searcher first, then the callback."""
        self.searcher.on_trial_complete(task_id, outcome)
        self.callback.on_trial_complete(1, [], SimpleNamespace(trial_id=task_id))

    def crash(self, task_id: str, error: Exception) -> None:
        """Do what Ray does at a task's crash: the error lies in a file beside the task."""
        file = self.folder / f"{task_id}.pkl"
        file.write_bytes(cloudpickle.dumps(error))
        self.searcher.on_trial_complete(task_id, None, error=True)
        trial = SimpleNamespace(trial_id=task_id, pickled_error_file=str(file), get_error=None)
        self.callback.on_trial_error(1, [], trial)

    def vanilla(self) -> None:
        """Get the unmodified model out of the way."""
        self.searcher.suggest("vanilla")
        self.end("vanilla", {"report": json.dumps({"scores": GOOD, "note": None})})

    def trial(self, task_id: str, outcome: dict[str, Any]) -> None:
        """Run one trial."""
        assert self.searcher.suggest(task_id)["task"] == TRIAL
        self.end(task_id, outcome)

    def confirm(self, task_id: str, retain: float) -> int:
        """Evaluate the next candidate in full; return its number."""
        task = self.searcher.suggest(task_id)
        assert task["task"] == CONFIRMATION
        scores = {"forget_rouge1": 0.1, "retain_rouge1": retain}
        self.end(task_id, {"report": json.dumps({"scores": scores, "max_new_tokens": 512})})
        number: int = task["number"]
        return number


@pytest.fixture
def heard(tmp_path: Path) -> Heard:
    one = Heard(tmp_path)
    one.vanilla()
    return one


def report(forget: float = 0.2, retain: float = 0.9) -> dict[str, Any]:
    return {"number": 0, "report": json.dumps(result(forget, retain)), "done": True}


def test_the_unmodified_model_comes_first_and_everything_waits_for_it(tmp_path: Path) -> None:
    heard = Heard(tmp_path)

    assert heard.searcher.suggest("1")["task"] == VANILLA
    assert heard.searcher.suggest("2") is None
    heard.end("1", {"report": json.dumps({"scores": GOOD, "note": "a window"})})
    assert heard.news == [("vanilla", (GOOD, "a window"))]
    assert heard.searcher.suggest("2")["task"] == TRIAL


def test_layers_are_scored_with_the_unmodified_model_where_that_is_wanted(tmp_path: Path) -> None:
    heard = Heard(tmp_path, layer_coefficient=0.5)
    assert heard.searcher.suggest("1")["parameters"] == {"coefficient": 0.5}
    told = {"scores": GOOD, "note": None, "layer_prior": "the prior"}
    heard.end("1", {"report": json.dumps(told)})
    assert heard.layer_prior == "the prior"

    (tmp_path / "other").mkdir()
    heard = Heard(tmp_path / "other")
    assert heard.searcher.suggest("1")["parameters"] == {}
    heard.end("1", {"report": json.dumps({"scores": GOOD, "note": None})})
    assert heard.layer_prior is None


def test_a_model_that_is_refused_ends_the_course_with_the_reason(tmp_path: Path) -> None:
    heard = Heard(tmp_path, refuses=True)
    heard.vanilla()

    assert isinstance(heard.course.error, InputError)
    assert str(heard.course.error) == "nothing to forget"
    assert heard.searcher.suggest("1") == Searcher.FINISHED
    assert heard.course.study is None


@pytest.mark.parametrize(("wrong_input", "kind"), [(True, InputError), (False, LunarTuneError)])
def test_a_model_that_cannot_be_evaluated_ends_the_course(
    tmp_path: Path, wrong_input: bool, kind: type[LunarTuneError]
) -> None:
    heard = Heard(tmp_path)
    heard.searcher.suggest("1")
    heard.end("1", {"failure": "no weights", "wrong_input": wrong_input})

    assert type(heard.course.error) is kind
    assert str(heard.course.error) == "no weights"
    assert heard.searcher.suggest("2") == Searcher.FINISHED


def test_a_worker_that_is_lost_three_times_with_the_unmodified_model_ends_the_course(
    tmp_path: Path,
) -> None:
    heard = Heard(tmp_path)
    for attempt in "123":
        assert heard.course.error is None
        assert heard.searcher.suggest(attempt)["task"] == VANILLA
        heard.crash(attempt, RuntimeError("killed"))

    assert str(heard.course.error) == "RuntimeError: killed"
    assert heard.searcher.suggest("4") == Searcher.FINISHED


def test_a_suggestion_is_the_number_and_the_parameters_of_the_study(heard: Heard) -> None:
    suggestion = heard.searcher.suggest("ray-1")

    row = heard.study.row(0)
    assert suggestion == {"task": TRIAL, "number": 0, "parameters": row.parameters}
    started = [(what, one.number, one.state) for what, one in heard.news[1:]]
    assert started == [("start", 0, RUNNING)]


def test_listeners_hear_of_a_result_when_the_study_has_it(heard: Heard) -> None:
    heard.trial("ray-1", report())

    what, row = heard.news[-1]
    assert (what, row.state, row.scores["forget_rouge1"]) == ("end", COMPLETE, 0.2)
    assert heard.study.row(0) == row


def test_a_trial_that_reports_a_failure_is_failed_with_its_reason(heard: Heard) -> None:
    heard.trial("ray-1", {"number": 0, "failure": "the loss became NaN", "done": True})

    row = heard.news[-1][1]
    assert (row.state, row.failure) == (FAILED, "the loss became NaN")


def test_a_trial_that_crashes_is_failed_with_the_error(heard: Heard) -> None:
    heard.searcher.suggest("ray-1")
    heard.crash("ray-1", RuntimeError("CUDA out of memory\nand a long tail"))

    row = heard.news[-1][1]
    assert (row.state, row.failure) == (FAILED, "RuntimeError: CUDA out of memory")


def test_a_crash_that_left_no_file_is_failed_with_what_ray_says(heard: Heard) -> None:
    heard.searcher.suggest("ray-1")
    heard.searcher.on_trial_complete("ray-1", None, error=True)
    trial = SimpleNamespace(
        trial_id="ray-1", pickled_error_file=None, get_error=lambda: RuntimeError("node lost")
    )
    heard.callback.on_trial_error(1, [], trial)

    assert heard.news[-1][1].failure == "RuntimeError: node lost"


def test_a_trial_that_ends_without_a_result_is_failed(heard: Heard) -> None:
    heard.trial("ray-1", {})

    assert heard.news[-1][1].failure == "the trial ended without a result"


def test_a_score_that_is_not_finite_counts_as_a_failure(heard: Heard) -> None:
    for name in ("ray-1", "ray-2"):
        heard.trial(name, report(forget=math.nan))

    assert heard.course.gave_up
    assert heard.searcher.suggest("ray-3") == Searcher.FINISHED


def test_trials_at_once_are_told_apart(heard: Heard) -> None:
    first = heard.searcher.suggest("ray-1")
    second = heard.searcher.suggest("ray-2")
    heard.end("ray-2", report(forget=0.7))
    heard.end("ray-1", report(forget=0.4))

    assert (first["number"], second["number"]) == (0, 1)
    assert [row.scores["forget_rouge1"] for row in heard.study.rows()] == [0.4, 0.7]


def test_too_many_failures_in_a_row_end_the_trials(tmp_path: Path) -> None:
    heard = Heard(tmp_path, num_trials=9)
    heard.vanilla()
    for name, outcome in (
        ("1", {"failure": "x"}),
        ("2", report()),
        ("3", {"failure": "x"}),
        ("4", {"failure": "x"}),
    ):
        assert not heard.course.gave_up
        heard.trial(name, outcome)

    assert heard.course.gave_up
    assert heard.confirm("5", retain=0.9) == 1, "what was found is confirmed all the same"
    assert heard.searcher.suggest("6") == Searcher.FINISHED
    assert len(heard.study.rows()) == 4


def test_no_trial_starts_after_the_deadline(tmp_path: Path) -> None:
    heard = Heard(tmp_path, time_budget=0.0)
    heard.vanilla()

    assert heard.searcher.suggest("ray-1") == Searcher.FINISHED
    assert not heard.course.gave_up
    assert heard.study.rows() == []


def test_the_best_is_confirmed_when_the_last_trial_has_ended(heard: Heard) -> None:
    heard.trial("1", report(forget=0.3))
    heard.trial("2", report(forget=0.1))
    assert heard.searcher.suggest("3")["task"] == TRIAL
    assert heard.searcher.suggest("4") is None, "a trial is running still"
    heard.end("3", report(forget=0.2))

    assert heard.confirm("5", retain=0.8) == 1, "a floor that is just reached holds"
    assert heard.news[-2:] == [("confirming", 1), ("holds", 1)]
    assert heard.searcher.suggest("6") == Searcher.FINISHED


def test_candidates_are_confirmed_until_one_keeps_the_floor(heard: Heard) -> None:
    for name, forget in (("1", 0.3), ("2", 0.1), ("3", 0.2)):
        heard.trial(name, report(forget=forget))

    assert heard.confirm("4", retain=0.79) == 1
    heard.searcher.suggest("5")
    assert heard.searcher.suggest("6") is None, "one confirmation at a time"
    heard.end("5", {"failure": "the loss became NaN"})
    assert heard.confirm("7", retain=0.9) == 0
    kinds = {"confirming", "holds", "falls", "unconfirmed"}
    told = [news for news in heard.news if news[0] in kinds]
    assert told == [
        *(("confirming", 1), ("falls", 1)),
        *(("confirming", 2), ("unconfirmed", (2, "the loss became NaN"))),
        *(("confirming", 0), ("holds", 0)),
    ]


def test_every_feasible_trial_may_be_confirmed_and_none_may_hold(tmp_path: Path) -> None:
    heard = Heard(tmp_path, num_trials=8)
    heard.vanilla()
    for number in range(8):
        heard.trial(f"t{number}", report(forget=0.1, retain=0.7 if number % 2 else 0.85))

    tried = [heard.confirm(f"c{i}", retain=0.5) for i in range(4)]
    assert sorted(tried) == [0, 2, 4, 6]
    assert heard.searcher.suggest("last") == Searcher.FINISHED


def test_a_worker_that_is_lost_three_times_in_a_confirmation_leaves_the_turn_to_the_next(
    heard: Heard,
) -> None:
    for name in ("1", "2", "3"):
        heard.trial(name, report())
    for attempt in ("4", "5", "6"):
        assert heard.searcher.suggest(attempt)["number"] == 0
        heard.crash(attempt, RuntimeError("killed"))

    assert heard.confirm("7", retain=0.9) == 1
    assert heard.searcher.suggest("8") == Searcher.FINISHED


def test_a_trial_whose_worker_is_lost_runs_again_and_the_budget_counts_it_once(
    heard: Heard,
) -> None:
    first = heard.searcher.suggest("1")
    heard.crash("1", RuntimeError("killed"))
    again = heard.searcher.suggest("2")
    assert again["parameters"] == first["parameters"]
    heard.end("2", report())
    heard.trial("3", report())
    heard.trial("4", report())
    assert [row.state for row in heard.study.rows()] == [FAILED, COMPLETE, COMPLETE, COMPLETE]
    assert heard.confirm("5", retain=0.9) == 1


def test_a_trial_whose_worker_is_lost_three_times_is_taken_to_be_at_fault(tmp_path: Path) -> None:
    heard = Heard(tmp_path, num_trials=2, max_failures=9)
    heard.vanilla()
    setting = heard.searcher.suggest("1")["parameters"]
    heard.crash("1", RuntimeError("killed"))
    for name in ("2", "3"):
        assert heard.searcher.suggest(name)["parameters"] == setting
        heard.crash(name, RuntimeError("killed"))
    heard.trial("4", report())

    assert [row.again for row in heard.study.rows()] == [True, True, False, False]
    assert heard.study.row(2).failure == "RuntimeError: killed (3 attempts)"
    assert heard.confirm("5", retain=0.9) == 3, "the trial at fault counts, the others do not"


def test_a_full_disk_is_no_settings_fault_and_ends_the_search_all_the_same(heard: Heard) -> None:
    """Each setting has three attempts; the sampler hears nothing of it."""
    for number in range(6):
        assert not heard.course.gave_up
        heard.trial(str(number), {"failure": "OSError: No space left on device", "again": True})
    assert heard.course.gave_up
    assert [row.again for row in heard.study.rows()] == [True, True, False] * 2
    assert heard.study.n_ended == 2
    states = [trial.state for trial in frozen(heard.folder)]
    assert states == [TrialState.FAIL] * 6


def test_a_node_that_takes_all_its_trials_with_it_does_not_end_the_search(tmp_path: Path) -> None:
    heard = Heard(tmp_path, num_trials=8)
    heard.vanilla()
    settings = [heard.searcher.suggest(str(n))["parameters"] for n in range(8)]
    for n in range(8):
        heard.crash(str(n), RuntimeError("node lost"))
    assert not heard.course.gave_up
    again = [heard.searcher.suggest(f"again-{n}")["parameters"] for n in range(8)]
    assert again == settings


def test_a_disk_that_is_full_in_a_confirmation_does_not_pass_over_the_best(heard: Heard) -> None:
    for name, forget in (("1", 0.3), ("2", 0.1), ("3", 0.2)):
        heard.trial(name, report(forget=forget))
    heard.searcher.suggest("4")
    heard.end("4", {"failure": "OSError: No space left", "again": True})
    assert heard.confirm("5", retain=0.9) == 1
    assert not [news for news in heard.news if news[0] == "unconfirmed"]


@pytest.mark.parametrize("where", ["asking", "telling", "hearing"])
def test_an_error_of_the_search_itself_ends_it_and_is_kept_as_it_is(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Tune would turn it into a text; a full disk is to be told as one."""
    error = OSError(28, "No space left on device")

    def full(*_: Any, **__: Any) -> None:
        raise error

    if where == "asking":
        monkeypatch.setattr(heard.study, "ask", full)
        assert heard.searcher.suggest("1") == Searcher.FINISHED
    else:
        heard.searcher.suggest("1")
        monkeypatch.setattr(
            *((heard.study, "complete") if where == "telling" else (heard, "on_end")), full
        )
        heard.end("1", report())
    assert heard.course.error is error
    assert heard.searcher.suggest("2") == Searcher.FINISHED


def test_ray_can_pickle_both_without_the_study(heard: Heard) -> None:
    """Ray saves them; nobody restores them."""
    for one in (heard.searcher, heard.callback):
        assert vars(pickle.loads(pickle.dumps(one))) == {}


def test_metric_and_space_are_not_rays_affair(heard: Heard) -> None:
    assert heard.searcher.set_search_properties("loss", "min", {"x": 1}) is True


def test_full_evaluations_that_all_crash_are_told_apart_from_bounds_that_are_missed(
    heard: Heard,
) -> None:
    for name in ("1", "2", "3"):
        heard.trial(name, report())
    for name in ("4", "5", "6"):
        assert heard.searcher.suggest(name)["task"] == CONFIRMATION
        heard.end(name, {"failure": "out of memory"})
    assert heard.searcher.suggest("7") == Searcher.FINISHED
    assert heard.course.unconfirmed == "out of memory"


def test_what_was_held_out_does_not_choose_between_settings(tmp_path: Path) -> None:
    heard = Heard(tmp_path, confirm_once=True)
    heard.vanilla()
    for name in ("1", "2", "3"):
        heard.trial(name, report())
    heard.confirm("4", retain=0.1)
    assert heard.searcher.suggest("5") == Searcher.FINISHED
    assert heard.news[-1][0] == "holds"
