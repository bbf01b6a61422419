"""Who runs a search's tasks, without a model: Ray's view of a loop, and this process."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from made_outcomes import base_model, ended, failed
from ray.tune.search import Searcher
from test_loop import Heard

from lunar_tune.search import backends
from lunar_tune.search.backends import InProcess
from lunar_tune.search.backends.ray.backend import LoopCallback, LoopSearcher
from lunar_tune.search.backends.ray.trainable import HANDED_OVER, Parcel
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import COMPLETE, FAILED
from lunar_tune.trial.tasks import BASE_MODEL, CONFIRMATION, TRIAL, Outcome, Task


class OnRay:
    """A loop as Ray sees it, and what Ray does at a task's end."""

    def __init__(self, folder: Path) -> None:
        self.heard = Heard(folder)
        self.folder = folder
        self.searcher = LoopSearcher(self.heard.loop)
        self.callback = LoopCallback(self.heard.loop, Folder(folder))

    def end(self, task_id: str, outcome: Outcome) -> Parcel:
        """Report, then end, in the order of Ray 2.60."""
        trial = SimpleNamespace(trial_id=task_id)
        parcel = Parcel(outcome)
        self.callback.on_trial_result(1, [], trial, {HANDED_OVER: parcel})
        self.searcher.on_trial_complete(task_id, {HANDED_OVER: parcel})
        self.callback.on_trial_complete(1, [], trial)
        return parcel

    def crash(self, task_id: str, task: Task, file: Path | None, error: Exception) -> None:
        """Crash: the error lies in a file beside the task, or Ray has it."""
        self.searcher.on_trial_complete(task_id, None, error=True)
        trial = SimpleNamespace(
            trial_id=task_id,
            config={"task": task},
            pickled_error_file=str(file),
            get_error=lambda: error,
        )
        self.callback.on_trial_error(1, [], trial)


@pytest.fixture
def on_ray(tmp_path: Path) -> OnRay:
    return OnRay(tmp_path)


def test_a_search_goes_its_way_through_ray(on_ray: OnRay) -> None:
    assert on_ray.searcher.suggest("1")["task"].kind == BASE_MODEL
    assert on_ray.searcher.suggest("2") is None
    on_ray.end("1", base_model())
    for number in range(3):
        task = on_ray.searcher.suggest(f"t{number}")["task"]
        assert (task.kind, task.number) == (TRIAL, number)
        on_ray.end(f"t{number}", ended(0.1 * (number + 1)))
    task = on_ray.searcher.suggest("c")["task"]
    assert (task.kind, task.number) == (CONFIRMATION, 0)
    on_ray.end("c", ended(0.1))
    assert on_ray.searcher.suggest("last") == Searcher.FINISHED
    assert [row.state for row in on_ray.heard.study.rows()] == [COMPLETE] * 3


@pytest.mark.parametrize("with_file", [True, False])
def test_a_crash_is_told_with_the_first_line_of_its_error(on_ray: OnRay, with_file: bool) -> None:
    on_ray.searcher.suggest("1")
    on_ray.end("1", base_model())
    task = on_ray.searcher.suggest("2")["task"]
    error = RuntimeError("CUDA out of memory\nand a long tail")
    file = on_ray.folder / "error.pkl" if with_file else None
    if file is not None:
        file.write_bytes(cloudpickle.dumps(error))
    on_ray.crash("2", task, file, error)
    row = on_ray.heard.news[-1][1]
    assert (row.state, row.failure) == (FAILED, "RuntimeError: CUDA out of memory")


def test_an_outcome_is_handed_over_once_and_its_warnings_said_without_secrets(
    on_ray: OnRay, caplog: pytest.LogCaptureFixture
) -> None:
    """Tune keeps every report to the end of the search."""
    on_ray.searcher.suggest("1")
    parcel = on_ray.end("1", base_model(warnings=("read from http://me:secret@host",)))
    assert parcel.take() is None
    assert caplog.messages == ["a worker: read from http://me:***@host"]


def test_ray_can_pickle_both_without_the_study(on_ray: OnRay) -> None:
    """Ray saves them; nobody restores them."""
    for one in (on_ray.searcher, on_ray.callback):
        assert vars(pickle.loads(pickle.dumps(one))) == {}


class Scripted:
    """In a runner's place: gives what it was told to, and notes what it was asked."""

    asked: list[Task]
    script: Any
    closed: int

    def __init__(self, _spec: Any) -> None:
        """Take the place of a runner."""

    def run(self, task: Task) -> Outcome:
        type(self).asked.append(task)
        given = next(type(self).script)
        if isinstance(given, Exception):
            raise given
        assert isinstance(given, Outcome)
        return given

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    Scripted.asked, Scripted.closed = [], 0
    monkeypatch.setattr(backends, "TaskRunner", Scripted)
    return Scripted


def test_this_process_runs_a_search_to_its_end(tmp_path: Path, scripted: type[Scripted]) -> None:
    heard = Heard(tmp_path, num_trials=2)
    scripted.script = iter([base_model(), ended(0.3), failed("the loss became NaN"), ended(0.3)])
    InProcess().run(heard.loop, object())  # type: ignore[arg-type]
    kinds = [task.kind for task in scripted.asked]
    assert kinds == [BASE_MODEL, TRIAL, TRIAL, CONFIRMATION]
    assert heard.news[-1] == ("holds", 0)
    assert scripted.closed == 1


def test_a_crash_in_this_process_is_one_attempt_and_gets_a_new_runner(
    tmp_path: Path, scripted: type[Scripted]
) -> None:
    heard = Heard(tmp_path, num_trials=1)
    scripted.script = itertools.chain([base_model(), RuntimeError("a kernel died")], [ended()] * 2)
    InProcess().run(heard.loop, object())  # type: ignore[arg-type]
    rows = heard.study.rows()
    assert [(row.state, row.failure) for row in rows] == [
        (FAILED, "RuntimeError: a kernel died"),
        (COMPLETE, None),
    ]
    assert rows[0].again
    assert rows[0].parameters == rows[1].parameters
    assert scripted.closed == 2
