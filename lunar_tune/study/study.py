"""The study: the truth about parameters, states, scores and failures.

Only public calls of Optuna 5 are used: ask, set_constraint, set_user_attr, tell.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal
from lunar_tune.study.journal import open_journal, read_journal, reading
from lunar_tune.study.rows import COMPLETE, FAILED, RUNNING, TrialRow

if TYPE_CHECKING:
    from lunar_tune.trial.worker import TrialResult  # loads torch

__all__ = ["StoredStudy", "Study"]

LEFT_RUNNING = "the search was ended while the trial ran"
INTERRUPTED = "interrupted"
POINTS_QUEUED = "starting_points_queued"
FORMAT_NOTE, FORMAT = "format", 2
"""What is kept of a search, and how; raised when that changes."""
AGAIN_OF = "again_of"

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """One search's study.

    Args:
        path: The journal file; made if missing. One that is there is gone on with: trials that
            were left running are failed, and their settings come first.
        name: The study's name.
        goal: What the search is after.
        distributions: What is searched, by parameter.
        sampler: Gives the sampler, from the number of trials that there are already.
        starting_points: Settings that a new study tries first.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        goal: Goal,
        distributions: Mapping[str, BaseDistribution],
        sampler: Callable[[int], optuna.samplers.BaseSampler],
        starting_points: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Open the journal or make it, and queue the starting points in a new study."""
        self._goal = goal
        self._distributions = dict(distributions)
        self._open: dict[int, optuna.Trial] = {}
        before = []
        with reading(path):
            storage = open_journal(path)
            begun = name in {one.study_name for one in optuna.get_all_study_summaries(storage)}
            if begun:
                kept = optuna.load_study(study_name=name, storage=storage)
                _check_format(path, kept.user_attrs)
                before = kept.get_trials()
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=sampler(len(before)),
            direction="minimize",
            load_if_exists=True,
        )
        if not begun:
            self.note(FORMAT_NOTE, FORMAT)
        if before:
            self._take_up()
        if POINTS_QUEUED not in self._study.user_attrs:
            for point in starting_points:
                self._study.enqueue_trial(dict(point), skip_if_exists=True)
            self.note(POINTS_QUEUED, value=True)

    @property
    def ended(self) -> list[TrialRow]:
        """Trials that have ended by themselves, in this process or an earlier one."""
        return [row for row in self.rows() if row.counts]

    @property
    def n_ended(self) -> int:
        """How many."""
        return len(self.ended)

    def note(self, key: str, value: Any) -> None:
        """Keep a fact of the search itself, as plain values for JSON."""
        self._study.set_user_attr(key, value)

    def ask(self) -> tuple[int, dict[str, Any]]:
        """Return the next trial's number and parameters."""
        start = time.perf_counter()
        trial = self._study.ask(self._distributions)
        self._open[trial.number] = trial
        trial.set_user_attr("seconds_suggest", time.perf_counter() - start)
        return trial.number, dict(trial.params)

    def complete(
        self, number: int, result: TrialResult, *, answers_digest: str, n_retain: int
    ) -> None:
        """Tell a trial's scores; scores that are not numbers make it a failure.

        Args:
            number: Of the trial.
            result: What it gave.
            answers_digest: SHA-256 of the file of its answers.
            n_retain: Questions to keep in all; a trial that was asked fewer has an estimate.
        """
        scores = {name: float(value) for name, value in result.evaluation.scores.items()}
        value, violations = self._goal.value(scores), self._goal.violations(scores)
        if not math.isfinite(value) or not all(map(math.isfinite, violations.values())):
            self.fail(number, "a score is not a finite number", deterministic=True)
            return
        trial = self._open[number]
        for bound, violation in violations.items():
            trial.set_constraint(bound, violation)
        retain_rows = int(scores["retain_rows"])
        for key, fact in {
            "scores": scores,
            "seconds": dict(result.seconds),
            "retain_rows": retain_rows,
            "retain_exact": retain_rows == n_retain,
            "max_new_tokens": result.max_new_tokens,
            "losses": list(result.fit.losses) if result.fit is not None else [],
            "checks": [dataclasses.asdict(check) for check in result.checks],
            "answers_digest": answers_digest,
        }.items():
            trial.set_user_attr(key, fact)
        self._study.tell(trial, value)
        del self._open[number]

    def fail(
        self, number: int, reason: str, *, deterministic: bool = False, again: bool = False
    ) -> None:
        """Tell that a trial failed, and why; a trial that has ended is left as it is.

        Args:
            number: Of the trial.
            reason: Why, in a line.
            deterministic: Whether its setting will fail always: the sampler is then told the worst
                scores that there can be, for it learns nothing of what it is not told.
            again: Whether its setting had no part in it, and is queued to be run again.
        """
        trial = self._open.pop(number, None)
        if trial is None:
            return
        trial.set_user_attr("failure", reason)
        if again:
            self._queue(number, trial.params, self.attempts(number) - (reason == INTERRUPTED))
        worst = self._goal.worst(row.scores for row in self.rows()) if deterministic else None
        if worst is None:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        value, violations = worst
        for bound, violation in violations.items():
            trial.set_constraint(bound, violation)
        self._study.tell(trial, value)

    def attempts(self, number: int) -> int:
        """Return how often a trial's setting has been begun, this trial included."""
        before: int = self._study.get_trials(deepcopy=False)[number].user_attrs.get("attempts", 0)
        return before + 1

    def _queue(self, number: int, parameters: Mapping[str, Any], attempts: int) -> None:
        """Queue a setting; once, also where a kill came between that and the trial's end."""
        trials = self._study.get_trials(deepcopy=False)
        if number not in _superseded(trials):
            attrs = {"attempts": attempts, AGAIN_OF: number}
            self._study.enqueue_trial(dict(parameters), user_attrs=attrs, skip_if_exists=False)

    @property
    def stored(self) -> StoredStudy:
        """What its journal says now."""
        return StoredStudy.of(self._study)

    def running(self) -> list[int]:
        """Return the numbers of trials that were asked for here and have not ended."""
        return list(self._open)

    def row(self, number: int) -> TrialRow:
        """Return one trial as a row."""
        trials = self._study.get_trials(deepcopy=False)
        return _row(trials[number], self._goal, _superseded(trials))

    def rows(self) -> list[TrialRow]:
        """Return all trials that were started, by number."""
        return _rows(self._study, self._goal)

    def _take_up(self) -> None:
        """Fail what an earlier process left running, and queue it again."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # One that was killed while it was being suggested has but what was queued of it.
            setting = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            # What ended the search had nothing to do with the setting: it was not an attempt.
            self._queue(trial.number, setting, trial.user_attrs.get("attempts", 0))
            self._study.tell(trial.number, state=TrialState.FAIL)


@dataclass(frozen=True, slots=True)
class StoredStudy:
    """What a journal says of a search, without anything else of it."""

    rows: tuple[TrialRow, ...]
    notes: Mapping[str, Any]
    """What was kept with `Study.note`."""
    goal: Goal | None
    """What the search is after; None where it had not begun."""
    distributions: Mapping[str, BaseDistribution] = field(default_factory=dict)
    """What the last trial's parameters were drawn from."""

    def has_ended(self, num_trials: int) -> bool:
        """Say whether the search has ended by itself when it was to have so many trials."""
        return (self.notes.get("num_trials") or 0) >= num_trials

    @property
    def log_scale(self) -> frozenset[str]:
        """The parameters that are searched on a logarithmic scale."""
        kinds = self.distributions.items()
        return frozenset(name for name, kind in kinds if getattr(kind, "log", False))

    @property
    def listed(self) -> dict[str, tuple[float, ...]]:
        """The values of the parameters that are chosen from a list of numbers."""
        return {
            name: tuple(value for value in kind.choices if isinstance(value, (int, float)))
            for name, kind in self.distributions.items()
            if isinstance(kind, CategoricalDistribution)
        }

    @classmethod
    def read(cls, path: Path) -> StoredStudy | None:
        """Read a journal and change nothing; None where there is none, or no study in it yet.

        Raises:
            InputError: It is damaged, or not of a search.
        """
        if not path.is_file():
            return None
        with reading(path):
            storage = read_journal(path)
            names = [one.study_name for one in optuna.get_all_study_summaries(storage)]
            if not names:
                return None
            study = optuna.load_study(study_name=names[0], storage=storage)
            _check_format(path, study.user_attrs)
            return cls.of(study)

    @classmethod
    def of(cls, study: optuna.Study) -> StoredStudy:
        """Return what a study says."""
        notes = study.user_attrs
        goal = Goal.read(*notes["goal"]) if "goal" in notes else None
        rows = tuple(_rows(study, goal)) if goal is not None else ()
        drawn = [one.distributions for one in study.get_trials(deepcopy=False)]
        last = next((one for one in reversed(drawn) if one), {})  # one that waits has none
        return cls(rows=rows, notes=notes, goal=goal, distributions=last)


def _check_format(path: Path, notes: Mapping[str, Any]) -> None:
    """Refuse a search that another version has kept otherwise.

    Raises:
        InputError: It has.
    """
    if notes.get(FORMAT_NOTE) != FORMAT:
        raise InputError(
            f"{path.parent}: was begun by another version of lunar-tune, which keeps searches "
            f"otherwise (format {notes.get(FORMAT_NOTE, 1)}, here {FORMAT}). Read and resume it "
            "with that version, or start a new search."
        )


def _rows(study: optuna.Study, goal: Goal) -> list[TrialRow]:
    trials = study.get_trials(deepcopy=False)
    superseded = _superseded(trials)
    return [_row(one, goal, superseded) for one in trials if one.state != TrialState.WAITING]


def _superseded(trials: Sequence[FrozenTrial]) -> set[int]:
    """Return the numbers of trials whose settings run again, or have, under other numbers."""
    return {one.user_attrs[AGAIN_OF] for one in trials if AGAIN_OF in one.user_attrs}


def _row(trial: FrozenTrial, goal: Goal, superseded: Collection[int]) -> TrialRow:
    attrs = trial.user_attrs
    scores = attrs.get("scores", {})
    failure = attrs.get("failure", LEFT_RUNNING if trial.state == TrialState.FAIL else None)
    complete = trial.state == TrialState.COMPLETE and failure is None
    ended = FAILED if trial.state.is_finished() else RUNNING
    return TrialRow(
        number=trial.number,
        state=COMPLETE if complete else ended,
        parameters=dict(trial.params),
        scores=scores if complete else {},
        objective=trial.value if complete else None,
        feasible=goal.is_kept(scores) if complete else None,
        retain_rows=attrs.get("retain_rows"),
        retain_exact=attrs.get("retain_exact"),
        max_new_tokens=attrs.get("max_new_tokens"),
        seconds={**attrs.get("seconds", {}), "suggest": attrs.get("seconds_suggest", 0.0)},
        failure=failure,
        again=trial.number in superseded or failure in {LEFT_RUNNING, INTERRUPTED},
        losses=tuple(attrs.get("losses", ())),
        checks=tuple(attrs.get("checks", ())),
        answers_digest=attrs.get("answers_digest"),
        started=trial.datetime_start,
        ended=trial.datetime_complete,
    )
