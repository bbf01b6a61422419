"""Ray Tune as the backend of a search: one Tuner with reused actors whose searcher is the loop.

What Ray calls a trial is a task here. Ray 2.60 gives a result to a callback's `on_trial_result`
before it asks the searcher for more; a crash is told by `on_trial_error`. A worker ends itself when
a task takes too long, even if Python is stuck in a library: `faulthandler` needs no interpreter.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import shlex
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil
import ray
from ray import tune
from ray.tune.search import Searcher

from lunar_tune.driver.backends import BackendLostError, Resources
from lunar_tune.driver.loop import DONE, SearchLoop
from lunar_tune.files import private_folder
from lunar_tune.metrics.goal import METRICS, Metric
from lunar_tune.models.device import limit_threads
from lunar_tune.report.progress import RECORD
from lunar_tune.secrets import without_secrets
from lunar_tune.signals import heed_again, is_interrupted
from lunar_tune.study.folder import Folder
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import Task, TaskRunner, format_error

logger = logging.getLogger(__name__)
HANDED_OVER = "outcome"
"""The key, in what Tune reports, of a list with a task's outcome; empty once it was taken, since
Tune keeps every report to the end."""
IN_FULL = 10  # times as long as a trial tasks may take that ask every question to its end
_NAMES = ("gcs_server", "raylet")
_EVERY_SECONDS = 1.0
# A signal to all processes of the search ends Ray's too; the search then hears of it by itself.
_GRACE_SECONDS = 10.0
# Python runs waiting handlers by number: one that ends the search (SIGTERM, 15) comes first.
_SIGNAL = signal.SIGVTALRM


class Watchdog:
    """Ends this process when a trial takes more seconds than `limit`, if there is any."""

    def __init__(self, folder: Folder, limit: float | None) -> None:
        # Where the search's folder is on another machine, the stack stays in the temporary one.
        here = folder if folder.path.is_dir() else Folder(Path(tempfile.gettempdir()))
        self._folder, self._limit = here, limit
        self._file: IO[str] | None = None

    def begin(self, number: int, full: bool) -> None:
        """Watch a part of a trial's task from now on; one that is `full` asks every question."""
        self.end()
        if self._limit is None:
            return
        limit = self._limit * (IN_FULL if full else 1)
        path = self._folder.stack(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", buffering=1, encoding="utf-8")  # a line at a time
        told = f"{IN_FULL} times --trial-timeout" if full else "--trial-timeout"
        self._file.write(f"took longer than {limit:g} s ({told})\n")
        faulthandler.dump_traceback_later(limit, exit=True, file=self._file)

    def end(self) -> None:
        """Watch no longer: the task has ended."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None


def crash_reason(folder: Folder, number: int, error: str) -> str:
    """Return why a task's worker was lost: what its watchdog left, or the error that Ray tells."""
    path = folder.stack(number)
    try:
        first, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    except OSError:
        return error
    # A worker that was killed before its limit leaves the file without a stack.
    return f"{first}; what the worker was doing is in {path.name}" if rest.strip() else error


class UnlearningTrainable(tune.Trainable):
    """One task after another on one model; the actor and its model outlive the task."""

    def setup(  # type: ignore[override]  # Ray passes with_parameters' values by keyword
        self,
        config: dict[str, Any],
        spec: TrialSpec,
        folder: Folder,
        timeout: float | None,
        metrics: Mapping[str, Metric],
    ) -> None:
        """Note what will be loaded; it is loaded in the first step, where an error can be told."""
        given = os.environ.get("OMP_NUM_THREADS", "")  # the cores that Ray has given to it
        limit_threads(int(given) if given.isdigit() else None)
        for name, metric in metrics.items():  # of a notebook, which a worker does not see
            METRICS.add(name, metric)
        self._task = config["task"]
        self._watchdog = Watchdog(folder, timeout)
        self._runner = TaskRunner(spec, watch=self._watchdog.begin)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next task; nothing else changes."""
        self._task = new_config["task"]
        return True

    def cleanup(self) -> None:
        """Hear no more warnings."""
        self._runner.close()

    def step(self) -> dict[str, Any]:
        """Run the task and hand over what it gives."""
        try:
            outcome = self._runner.run(self._task)
        finally:
            self._watchdog.end()
        return {HANDED_OVER: [outcome], "done": True}


def run_on_ray(
    loop: SearchLoop,
    spec: TrialSpec,
    *,
    resources: Resources,
    folder: Folder,
    timeout: float | None,
) -> None:
    """Run tasks on Ray's workers, inside a `cluster.ray_session`, until the loop is done."""
    trainable = tune.with_parameters(
        UnlearningTrainable, spec=spec, folder=folder, timeout=timeout, metrics=METRICS.added
    )
    with private_folder() as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=LoopSearcher(loop),
                num_samples=-1,  # the loop says when it is done
                max_concurrent_trials=resources.concurrency,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(scratch),
                # Tune would keep one at the end of each task, and lose the worker where its
                # node does not have the folder.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[LoopCallback(loop, folder)],
                verbose=0,
                log_to_file=False,
            ),
        )
        try:
            with watched(folder):
                tuner.fit()
        except KeyboardInterrupt:
            # A signal to the whole process group ends Ray's own processes too, and a driver
            # that goes on without them is ended after a minute.
            with suppress(Exception):  # of a Ray without its processes: anything
                ray.shutdown()
            heed_again()  # the search is still to be reported
            raise


class LoopSearcher(Searcher):
    """Ray Tune's view of the loop."""

    def __init__(self, loop: SearchLoop) -> None:
        super().__init__(metric=None, mode=None)
        self._loop = loop

    def suggest(self, trial_id: str) -> Any:
        """Return the next task, None to wait, or say that there are to be no more."""
        task = self._loop.next(trial_id)
        if isinstance(task, Task):
            return {"task": task}
        return Searcher.FINISHED if task == DONE else None

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
        if handed := result[HANDED_OVER]:
            outcome = handed.pop()
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
def watched(folder: Folder, processes: Sequence[psutil.Process] | None = None) -> Iterator[None]:
    """Inside, the end of one of Ray's processes raises a BackendLostError in the main thread.

    Where that does not react, hanging inside of Ray, this process is ended with a last word.
    Ray's `processes` are looked for among the children of this one. A signal that ends the search
    may end them too, and Ray makes a KeyboardInterrupt of any other, or an error of its own: what
    leaves the block is a KeyboardInterrupt if there was a signal, and a BackendLostError if there
    was none and a process has ended.
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

    def look() -> None:
        gone.extend(name for one, name in names.items() if not lives(one))

    def lives(process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
        return False

    def watch() -> None:
        while not over.wait(_EVERY_SECONDS):
            look()
            if gone and not over.wait(_GRACE_SECONDS):
                os.kill(os.getpid(), _SIGNAL)
                if not over.wait(_GRACE_SECONDS):
                    text = f"Ray's {gone[0]} has ended. What was computed is kept: resume with "
                    text += f"lunar-tune search --resume {shlex.quote(str(folder.path))}"
                    RECORD.error(text)
                    os.write(2, os.fsencode(f"error: {text}\n"))
                    os._exit(1)
                return

    before = signal.signal(_SIGNAL, lost)
    watcher = threading.Thread(target=watch, name="ray-watch", daemon=True)
    watcher.start()
    try:
        yield
        if is_interrupted():
            raise KeyboardInterrupt
    except BaseException as error:
        look()
        if is_interrupted():
            raise KeyboardInterrupt from error
        if gone:
            raise BackendLostError(f"Ray's {gone[0]} has ended") from error
        raise
    finally:
        over.set()
        watcher.join()
        signal.signal(_SIGNAL, before)
