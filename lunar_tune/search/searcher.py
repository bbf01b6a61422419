"""Between Ray Tune and the study: suggestions one way, results the other.

Covers: Ray's Searcher interface (ray 2.60) on the study, and a callback that hears of every ended
trial after the study has it (Ray calls the searcher's `on_trial_complete` before a callback's
`on_trial_complete` and `on_trial_error`).
Does not cover: what is done with the news; listeners do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from lunar_tune.reporting.rows import COMPLETE, FAILED, TrialRow
from lunar_tune.search.cluster import described
from lunar_tune.search.study import Study

__all__ = ["Conductor", "NewsCallback", "StudySearcher"]


class Conductor:
    """Decides whether another trial starts, and passes on what happened.

    Args:
        study: The truth.
        deadline: `time.monotonic()` after which no trial starts; None for none.
        max_failures: Failed trials in a row after which no trial starts.
        on_start: Called with a row when its trial begins.
        on_end: Called with a row when its trial has ended and the study has it.
    """

    def __init__(
        self,
        study: Study,
        *,
        deadline: float | None,
        max_failures: int,
        on_start: Callable[[TrialRow], None],
        on_end: Callable[[TrialRow], None],
    ) -> None:
        self.study = study
        self._numbers: dict[str, int] = {}
        self._deadline = deadline
        self._max_failures = max_failures
        self._on_start = on_start
        self._on_end = on_end
        self._failures_in_row = 0

    @property
    def gave_up(self) -> bool:
        """Whether too many trials failed in a row."""
        return self._failures_in_row >= self._max_failures

    @property
    def is_over(self) -> bool:
        """Whether no further trial is to start."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        return late or self.gave_up

    def start(self, trial_id: str) -> dict[str, Any]:
        """Ask the study what to try next, tell listeners, and return the trial's configuration."""
        number, parameters = self.study.ask()
        self._numbers[trial_id] = number
        self._on_start(self.study.row(number))
        return {"number": number, "parameters": parameters}

    def number_of(self, trial_id: str) -> int:
        """Return the study's number of Ray's trial."""
        return self._numbers[trial_id]

    def ended(self, trial_id: str, error: str | None) -> None:
        """Tell listeners that a trial has ended; one without a result becomes a failure."""
        number = self.number_of(trial_id)
        self.study.fail(number, error or "the trial ended without a result")
        row = self.study.row(number)
        if row.state == FAILED:
            self._failures_in_row += 1
        elif row.state == COMPLETE:
            self._failures_in_row = 0
        self._on_end(row)


class StudySearcher(Searcher):
    """Ray Tune's view of the study."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__(metric=None, mode=None)
        self._conductor = conductor

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
        """Return the next parameters, or say that there are to be no more."""
        if self._conductor.is_over:
            finished: str = Searcher.FINISHED
            return finished
        return self._conductor.start(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study; a crash is told by the callback, which knows its reason."""
        if error or result is None:
            return
        number = self._conductor.number_of(trial_id)
        if "failure" in result:
            self._conductor.study.fail(number, result["failure"])
        elif "report" in result:
            self._conductor.study.complete(number, json.loads(result["report"]))

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the study: Ray stores the searcher, and nobody restores it."""
        return {}


class NewsCallback(tune.Callback):
    """Hears from Ray of every trial's end."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Pass on that a trial has ended."""
        self._conductor.ended(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Pass on that a trial crashed, with the last line of its traceback."""
        error = trial.get_error()
        cause = getattr(error, "cause", None) or error
        self._conductor.ended(trial.trial_id, described(cause))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing; see `StudySearcher`."""
        return {}
