"""Who runs a search's tasks, without a model: Ray's view of a loop, and this process."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from made_outcomes import base_model, ended, failed
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


@pytest.fixture
def on_ray(tmp_path: Path) -> OnRay:
    return OnRay(tmp_path)


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


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a runner's place, which gives what is scripted and notes what it was asked."""
    asked: list[Task] = []
    runner = MagicMock(asked=asked)

    def run(task: Task) -> Outcome:
        asked.append(task)
        given = next(runner.script)
        if isinstance(given, Exception):
            raise given
        return given

    runner.run.side_effect = run
    monkeypatch.setattr(backends, "TaskRunner", lambda _spec: runner)
    return runner


def test_this_process_runs_a_search_to_its_end(tmp_path: Path, scripted: Any) -> None:
    heard = Heard(tmp_path, num_trials=2)
    scripted.script = iter([base_model(), ended(0.3), failed("the loss became NaN"), ended(0.3)])
    InProcess().run(heard.loop, object())  # type: ignore[arg-type]
    kinds = [task.kind for task in scripted.asked]
    assert kinds == [BASE_MODEL, TRIAL, TRIAL, CONFIRMATION]
    assert heard.news[-1] == ("holds", 0)
    assert scripted.close.call_count == 1


def test_a_crash_in_this_process_is_one_attempt_and_gets_a_new_runner(
    tmp_path: Path, scripted: Any
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
    assert scripted.close.call_count == 2
