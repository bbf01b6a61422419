"""What a search runs, task after task: the unmodified model, the trials, the best ones in full.

Covers: which task comes next and when to wait, deadline and patience, what an outcome means.
Does not cover: who runs a task (`trainable`), Ray (`searcher`), what is shown (`session`).

All tasks run on the same workers, so that a model is loaded once from the first task to the last.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.metrics.goal import Goal
from lunar_tune.study.rows import COMPLETE, FAILED, PRUNED, TrialRow, best_first
from lunar_tune.study.study import Study

__all__ = ["CONFIRMATION", "OVER", "TRIAL", "VANILLA", "Confirmation", "Course", "SearchEvents"]

VANILLA, TRIAL, CONFIRMATION = "vanilla", "trial", "confirmation"
OVER: Final = "over"
NO_RESULT = "the trial ended without a result"
ATTEMPTS = 3
"""How often a task is begun whose worker is lost: a machine's fault, or at last the task's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """A full evaluation of one setting."""

    number: int
    scores: Mapping[str, float]
    max_new_tokens: int
    vanilla: Mapping[str, float] | None = None
    """The unmodified model's scores on the same questions, where those are held out."""


class SearchEvents(Protocol):
    """Who hears of what happens."""

    def on_vanilla(
        self, scores: Mapping[str, float], note: str | None, layer_prior: str | None
    ) -> Study:
        """Judge the unmodified model's scores; return the study, or raise to go no further."""

    def on_start(self, row: TrialRow) -> None:
        """Hear that a trial begins."""

    def on_end(self, row: TrialRow) -> None:
        """Hear that a trial has ended and the study has it."""

    def on_confirming(self, row: TrialRow) -> None:
        """Hear that a trial is evaluated in full."""

    def on_confirmed(self, row: TrialRow, confirmation: Confirmation, *, holds: bool) -> None:
        """Hear what came out, and whether the bounds hold."""

    def on_unconfirmed(self, row: TrialRow, reason: str) -> None:
        """Hear that nothing came out, and why; the next best is tried."""


class Course:
    """The tasks of one search.

    Args:
        events: Who hears of what happens.
        num_trials: Trials that are to have ended, those of an earlier process included.
        goal: Whose bounds a confirmed setting keeps.
        confirm_once: Whether the best as searched is reported whatever its full evaluation says.
        time_budget: Seconds after the first trial's start after which no trial starts.
        max_failures: Failed trials in a row after which no trial starts.
        layer_coefficient: Coefficient with which layers are scored before the first trial; None
            scores none.
        crash_reason: Says why a trial crashed, from its number and what Ray says.
    """

    def __init__(
        self,
        events: SearchEvents,
        *,
        num_trials: int,
        goal: Goal,
        confirm_once: bool = False,
        time_budget: float | None = None,
        max_failures: int = 5,
        layer_coefficient: float | None = None,
        crash_reason: Callable[[int, str], str] = lambda _, error: error,
    ) -> None:
        self.study: Study | None = None
        self.error: Exception | None = None
        """Why the search cannot go on; to be raised when the last task has ended."""
        self.unconfirmed: str | None = None
        """Why the last full evaluation without an answer gave none."""
        self._events = events
        self._num_trials, self._goal, self._confirm_once = num_trials, goal, confirm_once
        self._time_budget = time_budget
        self._deadline: float | None = None
        self._layer_coefficient = layer_coefficient
        self._crash_reason = crash_reason
        self._max_failures, self._failures_in_row = max_failures, 0
        self._tasks: dict[str, tuple[str, int]] = {}
        self._waiting_for_vanilla = False
        self._running: set[int] = set()
        self._started = 0
        self._candidates: list[TrialRow] | None = None
        self._confirming = self._over = False
        self._lost: Counter[tuple[str, int]] = Counter()

    @property
    def gave_up(self) -> bool:
        """Whether too many trials failed in a row."""
        return self._failures_in_row >= self._max_failures

    def next(self, task_id: str) -> dict[str, Any] | str | None:
        """Return what to run now; None to wait for what is running; `OVER` at the end.

        Args:
            task_id: Under which the outcome will be told.
        """
        if self._over or self.error is not None:
            return OVER
        if self.study is None:
            first = not self._waiting_for_vanilla
            self._waiting_for_vanilla = True
            scored = self._layer_coefficient
            given = {} if scored is None else {"coefficient": scored}
            return self._task(task_id, VANILLA, -1, given) if first else None
        if self._may_start():
            return self._trial(task_id, self.study)
        if self._running or self._confirming:
            return None
        if self._candidates is None:
            self._candidates = best_first(self.study.rows())
        return self._confirmation(task_id) if self._candidates else OVER

    def _trial(self, task_id: str, study: Study) -> dict[str, Any]:
        number, parameters = study.ask()
        self._running.add(number)
        self._started += 1
        self._events.on_start(study.row(number))
        return self._task(task_id, TRIAL, number, parameters)

    def _confirmation(self, task_id: str) -> dict[str, Any]:
        row = (self._candidates or [])[0]
        self._confirming = True
        self._events.on_confirming(row)
        return self._task(task_id, CONFIRMATION, row.number, row.parameters)

    def finished(self, task_id: str, outcome: Mapping[str, Any]) -> None:
        """Take a task's outcome; a trial's listeners hear of it in `ended`."""
        kind, number = self._tasks[task_id]
        report = json.loads(outcome["report"]) if "report" in outcome else None
        failure = outcome.get("failure")
        if kind == TRIAL and self.study is not None:
            if failure is not None:
                if outcome.get("again"):  # a full disk, for example: whatever it is, not for long
                    self._fail_unless_ended(self.study, number, failure, by_nature=False)
                else:
                    self.study.fail(number, failure, by_nature=True)
            elif report is not None:
                self.study.complete(number, report)
            elif "epochs" in outcome:
                self.study.prune(number, outcome)
        elif kind == VANILLA:
            self._take_vanilla(report, failure, wrong_input=bool(outcome.get("wrong_input")))
        else:
            again = bool(outcome.get("again"))
            if again and self._may_begin_again(kind, number):
                self._confirming = False
            else:
                self._take_confirmation(number, report, failure)

    def ended(self, task_id: str, error: str | None) -> None:
        """Take that a task has ended, and tell listeners of a trial.

        Args:
            task_id: As in `next`.
            error: What crashed it; None if it ended by itself. A trial without a result fails.
                What crashed is begun again, `ATTEMPTS` times in all.
        """
        kind, number = self._tasks[task_id]
        reason = self._crash_reason(number, error) if error is not None else None
        if kind == VANILLA and self.study is None and self.error is None:
            if self._may_begin_again(kind, number):
                self._waiting_for_vanilla = False
            else:
                self._take_vanilla(None, reason, wrong_input=False)
        if kind == CONFIRMATION and self._confirming:
            if self._may_begin_again(kind, number):
                self._confirming = False
            else:
                self._take_confirmation(number, None, reason)
        if kind != TRIAL or self.study is None:
            return
        self._fail_unless_ended(self.study, number, reason or NO_RESULT)
        self._running.discard(number)
        row = self.study.row(number)
        if row.state == FAILED:
            # A lost node fails all of its trials at once; those that run again have attempts.
            self._failures_in_row += not row.again
        elif row.state in {COMPLETE, PRUNED}:
            self._failures_in_row = 0
        self._events.on_end(row)

    def _fail_unless_ended(
        self, study: Study, number: int, reason: str, *, by_nature: bool = True
    ) -> None:
        """Fail a trial that has no result, and let its setting run again if it may.

        Args:
            study: The study.
            number: Of the trial.
            reason: Why.
            by_nature: What it is taken to be in the end.
        """
        if number not in study.running():
            return
        attempts = study.attempts(number)
        if attempts < ATTEMPTS:
            study.fail(number, reason, again=True)
            self._started -= 1
        else:
            study.fail(number, f"{reason} ({attempts} attempts)", by_nature=by_nature)

    def _may_begin_again(self, kind: str, number: int) -> bool:
        """Say whether a task that crashed is begun again, and count that it did."""
        self._lost[kind, number] += 1
        return self._lost[kind, number] < ATTEMPTS

    def _task(
        self, task_id: str, kind: str, number: int, parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        self._tasks[task_id] = (kind, number)
        return {"task": kind, "number": number, "parameters": dict(parameters)}

    def _may_start(self) -> bool:
        late = self._deadline is not None and time.monotonic() > self._deadline
        return self._started < self._num_trials and not late and not self.gave_up

    def _take_vanilla(
        self, report: Mapping[str, Any] | None, failure: str | None, *, wrong_input: bool
    ) -> None:
        """Take the unmodified model's scores, or why there are none."""
        if report is None:
            reason = failure or "the evaluation of the unmodified model ended without a result"
            self.error = InputError(reason) if wrong_input else LunarTuneError(reason)
            return
        try:
            self.study = self._events.on_vanilla(
                report["scores"], report["note"], report.get("layer_prior")
            )
            self._started = self.study.n_ended
        except LunarTuneError as error:
            self.error = error
            return
        if self._time_budget is not None:
            self._deadline = time.monotonic() + self._time_budget

    def _take_confirmation(
        self, number: int, report: Mapping[str, Any] | None, failure: str | None
    ) -> None:
        """Take a full evaluation; one that failed leaves the turn to the next candidate."""
        self._confirming = False
        if not self._candidates or self.study is None:
            return
        row = self._candidates.pop(0)
        if report is None:
            self.unconfirmed = failure or "a worker was lost"
            self._events.on_unconfirmed(row, self.unconfirmed)
            return
        confirmation = Confirmation(number=number, **report)
        # What nothing was tuned on must not choose between settings either.
        self._over = self._confirm_once or self._goal.is_kept(confirmation.scores)
        self._events.on_confirmed(row, confirmation, holds=self._over)
