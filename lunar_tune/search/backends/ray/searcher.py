"""Between Ray Tune and a search's loop: tasks one way, outcomes the other.

What Ray calls a trial is a task here. Ray 2.60 gives a result to a callback's `on_trial_result`
before it asks the searcher for more; a crash is told by `on_trial_error`.
"""

from __future__ import annotations

import logging
import pickle
import traceback
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from lunar_tune.search.backends.ray.trainable import HANDED_OVER
from lunar_tune.search.backends.ray.watchdog import crash_reason
from lunar_tune.search.display.log_file import RECORD
from lunar_tune.search.loop import DONE, SearchLoop, Signal
from lunar_tune.secrets import without_secrets
from lunar_tune.study.folder import Folder
from lunar_tune.trial.tasks import format_error

__all__ = ["LoopCallback", "LoopSearcher"]

logger = logging.getLogger(__name__)


class LoopSearcher(Searcher):
    """Ray Tune's view of the loop."""

    def __init__(self, loop: SearchLoop) -> None:
        super().__init__(metric=None, mode=None)
        self._loop = loop

    def set_search_properties(
        self,
        metric: str | None,  # noqa: ARG002
        mode: str | None,  # noqa: ARG002
        config: dict[str, Any],  # noqa: ARG002
        **spec: Any,  # noqa: ARG002
    ) -> bool:
        """Accept: metric and space are the study's affair."""
        return True

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

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the loop: Ray stores the searcher, and nobody restores it."""
        return {}


class LoopCallback(tune.Callback):
    """Hears from Ray of every task's outcome and end.

    Args:
        loop: Is told.
        folder: Of the search, where workers leave what they were doing when time was up.
    """

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
        error = _error_of(trial)
        RECORD.error("a task crashed: %s", "".join(traceback.format_exception(error)).rstrip())
        told = format_error(getattr(error, "cause", None) or error)
        number = trial.config["task"].number
        self._loop.lose(trial.trial_id, crash_reason(self._folder, number, told))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing; see `LoopSearcher`."""
        return {}


def _error_of(trial: Any) -> BaseException:
    """Return what crashed a task.

    Ray 2.60 has written it beside the task by now, but not yet to where `get_error` looks.
    """
    try:
        with Path(trial.pickled_error_file).open("rb") as file:
            error: BaseException = pickle.load(file)  # noqa: S301 Ray's own file of this run
    except Exception:  # what a full disk or another version leaves: anything
        error = trial.get_error() or RuntimeError("the worker gave no reason")
    return error
