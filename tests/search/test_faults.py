"""What can go wrong beside a task: Ray's processes end, a task hangs, a model is left edited."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from command_lines import small_options

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import DivergenceError, EditedModelError
from lunar_tune.methods.contract import Edit, Fit, PreparedMethod
from lunar_tune.search.backends import BackendLostError
from lunar_tune.search.backends.ray import backend
from lunar_tune.search.backends.ray.backend import watched
from lunar_tune.search.backends.ray.trainable import (
    HANDED_OVER,
    UnlearningTrainable,
    Watchdog,
    crash_reason,
)
from lunar_tune.study.folder import Folder
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.tasks import BASE_MODEL, CONFIRMATION, TRIAL, Task
from lunar_tune.trial.worker import Worker

SETTING = {"layer": 1, "coefficient": 2.0, "learning_rate": 1e-3}


@pytest.fixture
def worker(checkpoint: Callable[..., Path], tmp_path: Path) -> Worker:
    options = small_options(checkpoint("qwen2"), tmp_path)
    given = dict(zip(options[::2], options[1::2], strict=True))
    return Worker(
        assemble(
            RunOptions(
                model=given["--model"],
                data=given["--data"],
                reference_prompts=given["--reference-prompts"],
                factual_data="none",
                device="cpu",
                max_new_tokens=4,
                cache_limit=0,
            )
        )
    )


def trainable_with(worker: Worker, folder: Path, timeout: float | None = None) -> Any:
    trainable = UnlearningTrainable.__new__(UnlearningTrainable)
    task = Task(kind=TRIAL, number=0, parameters=SETTING)
    trainable.setup({"task": task}, spec=worker.spec, folder=Folder(folder), timeout=timeout)
    trainable._runner._worker = worker
    return trainable


class Broken(PreparedMethod):
    """A method that fails inside its context."""

    def __init__(
        self, error: BaseException | None, edit: Callable[[], None] = lambda: None
    ) -> None:
        self._error, self._edit = error, edit

    @contextmanager
    def unlearning(self, parameters: Any, *, seed: int) -> Iterator[Fit]:  # noqa: ARG002
        self._edit()
        if self._error is not None:
            raise self._error
        nothing = Edit(weights=dict, factors=None)
        yield Fit(base_model=nullcontext, edit=nothing, losses=(1.0,))


def test_the_end_of_a_process_of_rays_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the end of the search ends the watch, whatever becomes of Ray then."""
    monkeypatch.setattr(backend, "_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(backend, "_GRACE_SECONDS", 3.0)  # time to react, on any machine
    before = signal.getsignal(signal.SIGUSR2)
    with (
        sleeping() as process,
        pytest.raises(BackendLostError, match="Ray's sleep has ended"),
    ):
        wait_while_it_dies(process)
    with sleeping() as process:
        with watched(pytest.fail, [process]):
            pass
        process.kill()
        time.sleep(0.1)
    assert signal.getsignal(signal.SIGUSR2) == before


STUCK = """
import signal, subprocess, time
import psutil
from lunar_tune.search.backends import BackendLostError
from lunar_tune.search.backends.ray import backend
backend._EVERY_SECONDS = backend._GRACE_SECONDS = 0.05
process = subprocess.Popen(["sleep", "100"])
with backend.watched(lambda lost: print(lost, flush=True), [psutil.Process(process.pid)]):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])  # as a call that does not return
    process.kill()
    time.sleep(60)
"""


def test_a_search_that_hangs_in_a_dead_ray_has_a_last_word() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (1, "Ray's sleep has ended\n"), done.stderr


def wait_while_it_dies(process: psutil.Process) -> None:
    with watched(pytest.fail, [process]):
        process.kill()
        time.sleep(60)


@contextmanager
def sleeping() -> Iterator[psutil.Process]:
    with subprocess.Popen(["sleep", "100"]) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


@pytest.mark.parametrize("error", [None, ValueError("in the middle")])
def test_a_method_that_leaves_the_model_edited_is_found_out(
    worker: Worker, error: Exception | None
) -> None:
    weight = worker.loaded.model.get_output_embeddings().weight

    def edit() -> None:
        with torch.no_grad():
            weight[0, 0] += 1

    worker.draft({(0,): (0,)})
    worker.run(SETTING)
    worker.__dict__["prepared"] = Broken(error, edit)
    with pytest.raises(EditedModelError):
        worker.run(SETTING)
    spec = dataclasses.replace(
        worker.spec, engine=dataclasses.replace(worker.spec.engine, verify_weights=False)
    )
    worker.spec = spec
    if error is None:
        worker.run(SETTING)


HANGING = """
import sys, time
from pathlib import Path
from lunar_tune.study.folder import Folder
from lunar_tune.search.backends.ray.trainable import Watchdog

def stuck_here():
    time.sleep(100)

dog = Watchdog(Folder(Path(sys.argv[1])), 0.5)
dog.begin(3, False)
dog.end()
dog.begin(4, False)
stuck_here()
"""


def test_a_trial_that_hangs_ends_its_process_and_leaves_what_it_was_doing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANGING, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == 1
    folder = Folder(tmp_path)
    assert not folder.stack(3).exists(), "it ended in time"
    assert "stuck_here" in folder.stack(4).read_text()
    reason = crash_reason(folder, 4, "ActorDiedError: unexpectedly")
    assert reason.startswith("took longer than 0.5 s (--trial-timeout)")
    assert "00004-stack.txt" in reason


def test_a_worker_that_was_killed_before_its_limit_is_not_said_to_hang(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    dog = Watchdog(folder, 100.0)
    dog.begin(5, full=False)
    assert crash_reason(folder, 5, "ActorDiedError: killed") == "ActorDiedError: killed"
    dog.end()
    assert crash_reason(folder, 6, "ActorDiedError: killed") == "ActorDiedError: killed"


def test_tasks_that_ask_every_question_may_take_ten_times_as_long(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(
        "faulthandler.dump_traceback_later", lambda limit, **_options: limits.append(limit)
    )
    trainable = trainable_with(worker, tmp_path, timeout=1000.0)
    in_force = {}
    for kind, parameters in ((BASE_MODEL, {}), (TRIAL, SETTING), (CONFIRMATION, SETTING)):
        trainable.reset_config({"task": Task(kind=kind, number=0, parameters=parameters)})
        assert trainable.step()[HANDED_OVER].take().failure is None
        in_force[kind] = limits[-1]
    assert in_force == {BASE_MODEL: 10000.0, TRIAL: 1000.0, CONFIRMATION: 10000.0}
    assert sorted(tmp_path.glob("trials/*stack.txt")) == []


def test_a_step_watches_a_trial_from_its_beginning_to_its_end(
    worker: Worker, tmp_path: Path
) -> None:
    trainable = trainable_with(worker, tmp_path, timeout=1000.0)
    worker.draft({(0,): (0,)})
    seen: list[bool] = []

    def look() -> None:
        seen.append(Folder(tmp_path).stack(0).exists())

    worker.__dict__["prepared"] = Broken(DivergenceError("x"), look)
    trainable.step()
    assert seen == [True]
    assert not Folder(tmp_path).stack(0).exists()
