"""What runs on a Ray worker: a thin trainable around a runner of tasks, reused for all of them."""

from __future__ import annotations

import os
from typing import Any

from ray import tune

from lunar_tune.models.device import limit_threads
from lunar_tune.search.backends.ray.watchdog import Watchdog
from lunar_tune.study.folder import Folder
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import Outcome, TaskRunner

__all__ = ["HANDED_OVER", "Parcel", "UnlearningTrainable"]

HANDED_OVER = "outcome"
"""The key of a task's outcome in what Tune reports."""


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
        self, config: dict[str, Any], spec: TrialSpec, folder: Folder, timeout: float | None
    ) -> None:
        """Note what will be loaded; it is loaded in the first step, where an error can be told."""
        _own_threads()
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


def _own_threads() -> None:
    """Use the CPU cores that Ray has given to this process (it sets OMP_NUM_THREADS)."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    limit_threads(int(given) if given.isdigit() else None)
