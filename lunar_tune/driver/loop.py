"""The loop of a search: `loop.next` gives a task, `loop.take` takes its outcome.

It knows neither who runs the tasks, nor a screen, nor MLflow: it tells its listener. The base model
comes first, then the trials, then full evaluations of the best until one keeps the bounds, then how
that does on new questions.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol

from lunar_tune.config.options import AUTO, SearchConfig
from lunar_tune.driver.stopping import Outlook
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.metrics.goal import goal_of
from lunar_tune.models.fingerprint import Identity
from lunar_tune.study.folder import Folder, answers_note, write_result
from lunar_tune.study.rows import COMPLETE, FAILED, LEAST_BELIEVED, TrialRow, best_first
from lunar_tune.study.study import Study
from lunar_tune.trial.references import References
from lunar_tune.trial.tasks import (
    BASE_MODEL,
    CONFIRMATION,
    NEW_QUESTIONS,
    TRIAL,
    Failure,
    Outcome,
    Task,
    format_error,
)

if TYPE_CHECKING:
    from lunar_tune.trial.worker import TrialResult  # loads torch

NO_RESULT = "the trial ended without a result"
ATTEMPTS = 3
"""How often a task is begun whose worker is lost: a machine's fault, or at last the task's own."""
MAX_FAILURES = 5  # failed trials in a row after which a search stops
DONE: Final = "done"  # what there is instead of a task when nothing is left to be done
NextTask = Task | Literal["done"] | None  # None: ask again when something that runs has ended


class Listener(Protocol):
    """Hears of what happens, when files and study have it."""

    def begin(self, outcome: Outcome) -> Study:
        """Judge the base model, keep its answers in an open study; raise to go no further."""

    def ended(self, row: TrialRow) -> None:
        """Hear that a trial has ended."""

    def confirming(self, row: TrialRow) -> None:
        """Hear that a setting is about to be evaluated in full."""

    def confirmed(self, row: TrialRow, outcome: Outcome, *, holds: bool) -> None:
        """Hear what a full evaluation gave; the next best is confirmed unless its result holds."""

    def generalising(self, row: TrialRow) -> None:
        """Hear that further fits of the confirmed setting are about to leave questions out."""

    def generalised(self, row: TrialRow, outcome: Outcome) -> None:
        """Hear what they gave; nothing where they have no use."""


def keep_answers(study: Study, path: Path, result: TrialResult, *, text: bool) -> None:
    """Write answers that are no trial's row, perhaps over earlier ones, and note their digest."""
    study.note(answers_note(path), None)  # a kill while both change leaves what nothing is known of
    study.note(answers_note(path), write_result(path, result, text=text))


@dataclass(eq=False, repr=False)
class SearchLoop:
    """The tasks of one search; answers are in its folder before the study is told their scores."""

    listener: Listener
    folder: Folder
    config: SearchConfig
    n_retain: int  # questions to keep in all; a trial that was asked fewer has an estimate
    layer_coefficient: float | None = None  # with which layers are scored before the first trial
    known_model: Identity | None = None
    """What the base model is, from an earlier process or else the first worker; all compare."""
    known_references: References | None = None
    """What it does with the reference prompts, likewise; all use the same of them."""

    def __post_init__(self) -> None:
        self.study: Study | None = None
        self.error: Exception | None = None
        """Why the search cannot go on; to be raised when the last task has ended."""
        self.found = False
        """Whether a full evaluation has confirmed a setting."""
        self._goal = goal_of(self.config)
        self._deadline = math.inf
        self._failures_in_row = 0
        self._running: dict[str, Task] = {}
        self._started = 0
        self._candidates: list[TrialRow] | None = None
        self._best: TrialRow | None = None  # confirmed, not asked new questions yet
        self._lost: Counter[tuple[str, int]] = Counter()

    @property
    def gave_up(self) -> bool:
        """Whether too many trials failed in a row."""
        return self._failures_in_row >= MAX_FAILURES

    # What is asked next.

    def next(self, task_id: str) -> NextTask:
        """Return what to run now under an id, or that there is nothing now, or nothing any more."""
        task: NextTask = DONE
        try:
            task = self._next()
        except Exception as error:  # whoever runs tasks may turn it into text
            self.error = self.error or error
        if isinstance(task, Task):
            task = dataclasses.replace(
                task, known_model=self.known_model, known_references=self.known_references
            )
            self._running[task_id] = task
        return task

    def _next(self) -> NextTask:
        if self.found or self.error is not None:
            return self._new_questions()
        late = time.monotonic() > self._deadline
        may_start = self._started < self.config.num_trials and not late and not self.gave_up
        if self.study is not None and may_start:
            since, told, outlook = time.perf_counter(), self.study.told, self._outlook
            goes_on = self.config.stop != AUTO or self.study.waits
            if goes_on or not outlook.is_enough(told):
                number, parameters = self.study.ask(
                    at_second=outlook.is_at_second(told), outlook=outlook.before(told), since=since
                )
                self._started += 1
                return Task(kind=TRIAL, number=number, parameters=parameters)
        if self._running:
            return None
        if self.study is None:
            return Task(kind=BASE_MODEL, layer_coefficient=self.layer_coefficient)
        if self._candidates is None:
            self._candidates = best_first(self.study.rows())
            self.study.note("outlook", self._outlook.note(self.study.told))
        if not self._candidates:
            return DONE
        best = self._candidates[0]
        self.listener.confirming(best)
        return Task(kind=CONFIRMATION, number=best.number, parameters=best.parameters)

    def _new_questions(self) -> NextTask:
        """Return what shows how the best does on new questions, where that has a use."""
        row, study = self._best, self.study
        if self.error is not None or row is None or study is None:
            return DONE
        if self._running:
            return None
        if self._goal.floor is None or len(study.told) < LEAST_BELIEVED:
            self._best = None
            self.listener.generalised(row, Outcome())
            return DONE
        self.listener.generalising(row)
        return Task(kind=NEW_QUESTIONS, number=row.number, parameters=row.parameters)

    # What an outcome means.

    def take(self, task_id: str, outcome: Outcome) -> None:
        """Take what a task has given; a task that was handed over already is passed over."""
        task = self._running.pop(task_id, None)
        if task is None:
            return
        try:
            if task.kind == TRIAL:
                self._take_trial(task, outcome)
            elif self._runs_again(task, outcome):
                pass
            elif task.kind == BASE_MODEL:
                self._take_base_model(outcome)
            elif task.kind == CONFIRMATION:
                self._take_confirmation(task, outcome)
            elif self._best is not None:
                row, self._best = self._best, None
                self.listener.generalised(row, outcome)
        except Exception as error:
            self.error = self.error or error

    def lose(self, task_id: str, reason: str | None) -> None:
        """Take that a task's worker was lost, or ended without a word; it may be begun again."""
        failure = Failure(reason=reason or NO_RESULT, transient=True, crashed=True)
        self.take(task_id, Outcome(failure=failure))

    def _take_trial(self, task: Task, outcome: Outcome) -> None:
        if self.study is None:
            return
        failure = outcome.failure
        if outcome.result is not None:
            try:
                path = self.folder.answers(task.number)
                digest = write_result(path, outcome.result, text=self.config.text)
            except OSError as error:  # a full disk may have room again
                failure = Failure(reason=format_error(error), transient=True)
            else:
                self.study.complete(
                    task.number, outcome.result, answers_digest=digest, n_retain=self.n_retain
                )
        if failure is not None:
            self._fail(self.study, task.number, failure)
        row = self.study.row(task.number)
        if row.state == FAILED:
            # A lost node fails all of its trials at once; those that run again have attempts.
            self._failures_in_row += not row.again
        elif row.state == COMPLETE:
            self._failures_in_row = 0
        self.listener.ended(row)

    def _fail(self, study: Study, number: int, failure: Failure) -> None:
        """Fail a trial, and let its setting run again where that may have no part in it."""
        attempts = study.attempts(number)
        if failure.no_worker:  # the next worker would fare no better
            study.fail(number, failure.reason, again=True)
            self.error = self.error or InputError(failure.reason)
        elif not failure.transient:
            study.fail(number, failure.reason, deterministic=True)
        elif attempts < ATTEMPTS:
            study.fail(number, failure.reason, again=True)
            self._started -= 1
        else:
            reason = f"{failure.reason} ({attempts} attempts)"
            study.fail(number, reason, deterministic=failure.crashed)

    def _runs_again(self, task: Task, outcome: Outcome) -> bool:
        """Say whether a task other than a trial is begun again, and count that it was."""
        if outcome.failure is None or not outcome.failure.transient:
            return False
        self._lost[task.kind, task.number] += 1
        return self._lost[task.kind, task.number] < ATTEMPTS

    def _take_base_model(self, outcome: Outcome) -> None:
        """Take the base model's scores, or why there are none."""
        failure = outcome.failure
        if failure is not None:
            kind = InputError if failure.wrong_input else LunarTuneError
            self.error = kind(failure.reason)
        elif outcome.result is not None:
            self.study = self.listener.begin(outcome)
            self._outlook = Outlook(
                goal=self._goal,
                space=self.study.distributions,
                seed=self.config.seed,
                earlier=self.study.earlier,
            )
            self.known_model = self.known_model or outcome.model
            self.known_references = outcome.references
            self._started = len(self.study.ended)
            if self.config.time_budget is not None:
                self._deadline = time.monotonic() + self.config.time_budget

    def _take_confirmation(self, task: Task, outcome: Outcome) -> None:
        """Take a full evaluation; one that failed leaves the turn to the next candidate."""
        if not self._candidates:
            return
        if (failure := outcome.failure) is not None and failure.no_worker:
            self.error = self.error or InputError(failure.reason)
            return
        row = self._candidates.pop(0)
        for number, result in ((task.number, outcome.result), (None, outcome.baseline)):
            if result is not None and self.study is not None:
                path = self.folder.answers(number, full=True)
                keep_answers(self.study, path, result, text=self.config.text)
        if outcome.result is not None:
            # What nothing was tuned on must not choose between settings either.
            kept = self._goal.is_kept(outcome.result.evaluation.scores)
            self.found = self.config.holdout or kept
        self._best = row if self.found else None
        self.listener.confirmed(row, outcome, holds=self.found)
