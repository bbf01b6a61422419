"""Ray Tune as the backend of a search: one Tuner with reused actors whose searcher is the loop.

What Ray calls a trial is a task here. Ray 2.60 gives a result to a callback's `on_trial_result`
before it asks the searcher for more; a crash is told by `on_trial_error`.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray
from ray import tune
from ray.tune.search import Searcher

from lunar_tune.metrics.names import METRICS
from lunar_tune.report.log_file import RECORD
from lunar_tune.search.backends import BackendLostError, Resources
from lunar_tune.search.backends.ray.trainable import HANDED_OVER, UnlearningTrainable, crash_reason
from lunar_tune.search.loop import DONE, SearchLoop, Signal
from lunar_tune.secrets import without_secrets
from lunar_tune.study.folder import Folder
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import format_error

__all__ = ["OnRay"]

logger = logging.getLogger(__name__)
_NAMES = ("gcs_server", "raylet")
_EVERY_SECONDS = 1.0
# A signal to all processes of the search ends Ray's too; the search then hears of it by itself.
_GRACE_SECONDS = 10.0
_SIGNAL = signal.SIGUSR2


@dataclass(frozen=True, slots=True)
class OnRay:
    """Runs tasks on Ray's workers, inside a session of `cluster.ray_session`."""

    resources: Resources
    """Resources of a task."""
    folder: Folder
    """Folder of the search."""
    timeout: float | None = None
    """Seconds that a trial may take."""

    def run(self, loop: SearchLoop, spec: TrialSpec) -> None:
        """Run tasks until the loop is done; see `search.backends`.

        Raises:
            BackendLostError: One of Ray's own processes has ended.
        """
        trainable = tune.with_parameters(
            UnlearningTrainable,
            spec=spec,
            folder=self.folder,
            timeout=self.timeout,
            metrics=METRICS.added,
        )
        resources = {"cpu": self.resources.cpus, "gpu": self.resources.gpus}
        with tempfile.TemporaryDirectory(prefix="lunar-tune-ray-") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(trainable, resources),
                tune_config=tune.TuneConfig(
                    search_alg=LoopSearcher(loop),
                    num_samples=-1,  # the loop says when it is done
                    max_concurrent_trials=self.resources.concurrency,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name=self.folder.name,
                    storage_path=scratch,
                    # Tune would keep one at the end of each task, and lose the worker where its
                    # node does not have the folder.
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    callbacks=[LoopCallback(loop, self.folder)],
                    verbose=0,
                    log_to_file=False,
                ),
            )
            try:
                with watched(self._last_word):
                    tuner.fit()
            except KeyboardInterrupt:
                # A signal to the whole process group ends Ray's own processes too, and a driver
                # that goes on without them is ended after a minute.
                with suppress(Exception):  # of a Ray without its processes: anything
                    ray.shutdown()
                raise

    def _last_word(self, lost: str) -> None:
        """Say how to go on, where the main thread hangs inside of Ray."""
        text = (
            f"{lost}. What was computed is kept: go on with lunar-tune search --resume "
            f"{self.folder.path}"
        )
        RECORD.error(text)
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()


class LoopSearcher(Searcher):
    """Ray Tune's view of the loop."""

    def __init__(self, loop: SearchLoop) -> None:
        super().__init__(metric=None, mode=None)
        self._loop = loop

    def suggest(self, trial_id: str) -> Any:
        """Return the next task, None to wait, or say that there are to be no more."""
        task = self._loop.next(trial_id)
        if isinstance(task, Signal):
            return Searcher.FINISHED if task is DONE else None
        return {"task": task}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the callback has handed over what there was."""

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the journal is the state."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the loop: Ray stores the searcher, and nobody restores it."""
        return {}


class LoopCallback(tune.Callback):
    """Hears from Ray of every task's outcome and end."""

    def __init__(self, loop: SearchLoop, folder: Folder) -> None:
        self._loop, self._folder = loop, folder

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        result: dict[str, Any],
        **info: Any,  # noqa: ARG002
    ) -> None:
        """Hand over an outcome, and say what its worker has warned of."""
        outcome = result[HANDED_OVER].take()
        if outcome is None:
            return
        for text in outcome.warnings:
            logger.warning("a worker: %s", without_secrets(text))
        self._loop.take(trial.trial_id, outcome)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Tell of a task that has ended without an outcome; one that had one is passed over."""
        self._loop.lose(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Tell of a crash, with the last line of its traceback or what the watchdog left."""
        try:  # Ray 2.60 has written it there by now, but not yet to where `get_error` looks
            with Path(trial.pickled_error_file).open("rb") as file:
                error: BaseException = pickle.load(file)  # noqa: S301 Ray's own file of this run
        except Exception:  # what a full disk or another version leaves: anything
            error = trial.get_error() or RuntimeError("the worker gave no reason")
        RECORD.error("a task crashed: %s", "".join(traceback.format_exception(error)).rstrip())
        told = format_error(getattr(error, "cause", None) or error)
        number = trial.config["task"].number
        self._loop.lose(trial.trial_id, crash_reason(self._folder, number, told))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing; see `LoopSearcher`."""
        return {}


@contextmanager
def watched(
    last_word: Callable[[str], None], processes: Sequence[psutil.Process] | None = None
) -> Iterator[None]:
    """Inside, the end of one of Ray's processes interrupts the main thread.

    Args:
        last_word: Says what has ended, in another thread, where the main thread does not react;
            the process is ended after it.
        processes: They; None looks for them among the children of this process.

    Raises:
        BackendLostError: In the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if processes is None:
        processes = [one for one in psutil.Process().children() if one.name() in _NAMES]
    names = {one: one.name() for one in processes}
    over = threading.Event()
    gone: list[str] = []

    def lost(_signal: int, _frame: FrameType | None) -> None:
        raise BackendLostError(f"Ray's {gone[0]} has ended")

    def watch() -> None:
        while not over.wait(_EVERY_SECONDS):
            gone.extend(name for one, name in names.items() if not _lives(one))
            if gone and not over.wait(_GRACE_SECONDS):
                os.kill(os.getpid(), _SIGNAL)
                if not over.wait(_GRACE_SECONDS):
                    last_word(f"Ray's {gone[0]} has ended")
                    os._exit(1)
                return

    before = signal.signal(_SIGNAL, lost)
    watcher = threading.Thread(target=watch, name="ray-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(_SIGNAL, before)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
