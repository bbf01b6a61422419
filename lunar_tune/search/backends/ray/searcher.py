"""Between Ray Tune and the course of a search: tasks one way, outcomes the other.

Covers: Ray's Searcher interface (ray 2.60) on the course, and a callback that hears of every ended
task after the study has it (Ray calls the searcher's `on_trial_complete` before a callback's
`on_trial_complete` and `on_trial_error`). What Ray calls a trial is a task here.
Does not cover: which task comes next (`loop`).
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from lunar_tune.search.backends.ray.cluster import described
from lunar_tune.search.backends.ray.worker_warnings import say_warnings
from lunar_tune.search.display.log_file import RECORD
from lunar_tune.search.loop import OVER, Course

__all__ = ["CourseSearcher", "NewsCallback"]


class CourseSearcher(Searcher):
    """Ray Tune's view of the course."""

    def __init__(self, course: Course) -> None:
        super().__init__(metric=None, mode=None)
        self._course = course

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
        task: dict[str, Any] | str | None = OVER
        with _kept(self._course):
            task = self._course.next(trial_id)
        return Searcher.FINISHED if task == OVER else task

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass an outcome on; a crash is told by the callback, which knows its reason."""
        if result is not None and not error:
            with _kept(self._course):
                self._course.finished(trial_id, result)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the study: Ray stores the searcher, and nobody restores it."""
        return {}


class NewsCallback(tune.Callback):
    """Hears from Ray of every task's end, and of what its worker warns of on the way."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Any],  # noqa: ARG002
        trial: Any,  # noqa: ARG002
        result: dict[str, Any],
        **info: Any,  # noqa: ARG002
    ) -> None:
        """Say what a worker has warned of."""
        say_warnings(result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Pass on that a task has ended."""
        with _kept(self._course):
            self._course.ended(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Pass on that a task crashed, with the last line of its traceback."""
        error = _error_of(trial)
        RECORD.error("a task crashed: %s", "".join(traceback.format_exception(error)).rstrip())
        with _kept(self._course):
            self._course.ended(trial.trial_id, described(getattr(error, "cause", None) or error))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing; see `CourseSearcher`."""
        return {}


@contextmanager
def _kept(course: Course) -> Iterator[None]:
    """Inside, an error ends the course, which keeps it as it is; Tune would turn it into text."""
    try:
        yield
    except Exception as error:
        if course.error is None:
            course.error = error


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
