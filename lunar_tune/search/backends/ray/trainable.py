"""What runs on a Ray worker: a thin trainable around a runner of tasks, reused for all of them.

The limit on how long a task may take is kept by the worker itself. It works while Python itself is
stuck in a library: `faulthandler` has a thread of its own that needs no interpreter lock.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ray import tune

from lunar_tune.metrics.names import METRICS, Metric
from lunar_tune.models.device import limit_threads
from lunar_tune.study.folder import Folder
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import Outcome, TaskRunner

__all__ = ["HANDED_OVER", "UnlearningTrainable", "crash_reason"]

HANDED_OVER = "outcome"
"""The key of a task's outcome in what Tune reports."""
IN_FULL = 10
"""How many times as long as a trial the tasks may take that ask every question to its end."""


class Watchdog:
    """Ends this process when a task takes too long.

    Args:
        folder: Of the search; where it is not on this machine, what the process was doing stays in
            the temporary folder.
        limit: Seconds that a trial may take; None watches nothing.
    """

    def __init__(self, folder: Folder, limit: float | None) -> None:
        here = folder if folder.path.is_dir() else Folder(Path(tempfile.gettempdir()))
        self._folder, self._limit = here, limit
        self._file: IO[str] | None = None
        self._path: Path | None = None

    def begin(self, number: int, full: bool) -> None:
        """Watch a part of a task from now on.

        Args:
            number: Of its trial.
            full: Whether it asks every question to its end.
        """
        self.end()
        if self._limit is None:
            return
        limit = self._limit * (IN_FULL if full else 1)
        self._path = self._folder.stack(number)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        told = f"{IN_FULL} times --trial-timeout" if full else "--trial-timeout"
        self._file.write(f"took longer than {limit:g} s ({told})\n")
        self._file.flush()
        faulthandler.dump_traceback_later(limit, exit=True, file=self._file)

    def end(self) -> None:
        """Watch no longer: the task has ended."""
        if self._file is None or self._path is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._path.unlink(missing_ok=True)
        self._file = self._path = None


def crash_reason(folder: Folder, number: int, error: str) -> str:
    """Return why a task's worker was lost: what its watchdog left, or the error that Ray tells."""
    path = folder.stack(number)
    try:
        first, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    except OSError:
        return error
    # A worker that was killed before its limit leaves the file without a stack.
    return f"{first}; what it was doing is in {path.name}" if rest.strip() else error


class Parcel:
    """An outcome on its way through Tune, which keeps every report to the end: taken once."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome: Outcome | None = outcome

    def take(self) -> Outcome | None:
        """Return the outcome, and keep it no longer."""
        outcome, self._outcome = self._outcome, None
        return outcome


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
        return {HANDED_OVER: Parcel(outcome), "done": True}
