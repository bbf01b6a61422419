"""The study: the truth about parameters, states, scores and failures, in Optuna's journal.

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
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from lunar_tune.display import Concise
from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal
from lunar_tune.study.folder import Folder
from lunar_tune.study.journal import mistakes_in, open_journal, repeats_itself, studies_in
from lunar_tune.study.rows import COMPLETE, FAILED, RUNNING, TrialRow, least_apart
from lunar_tune.trial.references import References

if TYPE_CHECKING:
    from lunar_tune.trial.worker import TrialResult  # loads torch

LEFT_RUNNING = "the search was ended while the trial ran"
INTERRUPTED = "interrupted"
POINTS_QUEUED = "starting_points_queued"
FORMAT_NOTE, FORMAT = "format", 4  # of what is kept of a search; raised when that changes
AGAIN_OF = "again_of"
AT_SECOND = "at_second"  # whether the next trial is aimed at the second line of the goal
EARLIER = "earlier"  # what other searches were told
EQUAL = "equal"  # the bound that stands for the first line where the second is aimed at
_KEPT = ("retain_rows", "retain_exact", "max_new_tokens", "answers_digest")  # as in a row

_LISTED = 3  # mistakes of a journal in a message

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, slots=True)
class Told:
    """What the study was told of a trial."""

    parameters: Mapping[str, Any]
    value: float  # of the objective
    missed: Mapping[str, float]
    """By how much each bound is missed; 0 or less where it is kept."""
    error: float = 0.0  # standard error of the objective
    second: float | None = None
    """What is made small where the objective tells nothing apart; None where it is not known."""
    bound_errors: Mapping[str, float] = field(default_factory=dict)
    """Standard errors of the scores that are bounded, by bound."""
    search: int = 0
    """Which of the searches that a search starts from told it, from 1; 0 is the search itself."""

    @classmethod
    def by(cls, goal: Goal, parameters: Mapping[str, Any], scores: Mapping[str, float]) -> Told:
        """Return what a trial's scores tell of a goal."""
        return cls(
            parameters,
            goal.value(scores),
            goal.violations(scores),
            goal.error(scores),
            goal.second(scores),
            goal.bound_errors(scores),
        )

    @classmethod
    def of(cls, study: optuna.Study) -> list[Told]:
        """Return what was told, by number; of a failure that repeats itself the worst scores."""
        notes = study.user_attrs
        goal = Goal.read(*notes["goal"]) if "goal" in notes else None
        return [
            cls.by(goal, one.params, one.user_attrs["scores"])
            if goal is not None and "scores" in one.user_attrs
            else cls(one.params, float(one.value or 0.0), one.constraints)
            for one in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ]

    @classmethod
    def earlier(cls, study: optuna.Study) -> list[Told]:
        """Return what the searches were told from which a search starts."""
        return [cls(**one) for one in study.user_attrs.get(EARLIER, ())]

    @property
    def is_feasible(self) -> bool:
        """Whether it keeps every bound."""
        return all(amount <= 0 for amount in self.missed.values())


def aimed_at(study: optuna.Study) -> list[Told]:
    """Return what was told, by the line of the goal at which the next trial is aimed.

    What the searches were told from which it starts is among it.
    """
    told = Told.of(study) + Told.earlier(study)
    return at_second(told) if study.user_attrs.get(AT_SECOND) else told


def at_second(told: Sequence[Told]) -> list[Told]:
    """Return trials by the second line of the goal, with the first one as a further bound.

    It is kept by what cannot be told apart from the best of those that are feasible.
    """
    own = [one for one in told if not one.search]
    best = min((one for one in own if one.is_feasible), key=lambda one: one.value)
    worst = max(one.second for one in told if one.second is not None)
    return [
        Told(
            one.parameters,
            worst if one.second is None else one.second,
            {**one.missed, EQUAL: one.value - best.value - least_apart(one.error, best.error)},
            search=one.search,
        )
        for one in told
    ]


class Study:
    """One search's study; its journal is made if missing. What is no journal raises an InputError.

    A study that is there is gone on with, whatever its name: trials that were left running are
    failed, and their settings come first. A trial's sampler is made for the number of different
    settings before it, so that a resumed search is proposed the same ones.
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
        earlier: Sequence[Told] = (),
    ) -> None:
        self._goal = goal
        self.distributions, self._sampler = dict(distributions), sampler
        self._open: dict[int, optuna.Trial] = {}
        StoredStudy.read(path)  # refuses what cannot be gone on with
        storage = open_journal(path)
        names = optuna.get_all_study_names(storage) or [name]
        self._study = optuna.create_study(storage=storage, study_name=names[0], load_if_exists=True)
        if FORMAT_NOTE not in self._study.user_attrs:
            self.note(FORMAT_NOTE, FORMAT)
        self._take_up()
        if POINTS_QUEUED not in self._study.user_attrs:
            for point in starting_points:
                self._study.enqueue_trial(dict(point), skip_if_exists=True)
            self.note(EARLIER, [dataclasses.asdict(one) for one in earlier])
            self.note(POINTS_QUEUED, value=True)

    def _take_up(self) -> None:
        """Fail what an earlier process left running, and queue it again."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # One that was killed while it was being suggested has but what was queued of it.
            setting = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            # What ended the search had nothing to do with the setting: it was not an attempt.
            self._queue(trial.number, setting, trial.user_attrs.get("attempts", 0))
            self._study.tell(trial.number, state=TrialState.FAIL)

    @property
    def stored(self) -> StoredStudy:
        """What its journal says now."""
        return StoredStudy.of(self._study)

    @property
    def told(self) -> list[Told]:
        """What it was told, by number, of trials that have all parameters."""
        names = self.distributions.keys()
        return [one for one in Told.of(self._study) if names <= one.parameters.keys()]

    @property
    def earlier(self) -> list[Told]:
        """What the searches were told from which it starts."""
        return Told.earlier(self._study)

    @property
    def waits(self) -> bool:
        """Whether a setting is queued, to be tried first or again."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return bool(trials)

    @property
    def ended(self) -> list[TrialRow]:
        """Trials that have ended by themselves, in this process or an earlier one."""
        return [row for row in self.rows() if row.counts]

    def rows(self) -> list[TrialRow]:
        """Return all trials that were started, by number."""
        return _rows(self._study, self._goal)

    def row(self, number: int) -> TrialRow:
        """Return one trial as a row."""
        return self.rows()[number]

    def running(self) -> list[int]:
        """Return the numbers of trials that were asked for here and have not ended."""
        return list(self._open)

    def attempts(self, number: int) -> int:
        """Return how often a trial's setting has been begun, this trial included."""
        before: int = self._study.get_trials(deepcopy=False)[number].user_attrs.get("attempts", 0)
        return before + 1

    def note(self, key: str, value: Any) -> None:
        """Keep a fact of the search itself, as plain values for JSON."""
        self._study.set_user_attr(key, value)

    def ask(
        self,
        *,
        at_second: bool = False,
        outlook: Mapping[str, float] | None = None,
        since: float | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Return the next trial's number and parameters, chosen by a line of the goal.

        `outlook` is kept with it: what was believed before. `since` is when choosing it began, by
        `time.perf_counter`.
        """
        start = time.perf_counter() if since is None else since
        if at_second is not self._study.user_attrs.get(AT_SECOND, False):
            self.note(AT_SECOND, at_second)
        trials = self._study.get_trials(deepcopy=False)
        begun = {tuple(sorted(trial.params.items())) for trial in trials if trial.params}
        self._study.sampler = self._sampler(len(begun))
        trial = self._study.ask(self.distributions)
        self._open[trial.number] = trial
        trial.set_user_attr("seconds_suggest", time.perf_counter() - start)
        if outlook is not None:
            trial.set_user_attr("outlook", dict(outlook))
        return trial.number, dict(trial.params)

    def complete(
        self, number: int, result: TrialResult, *, answers_digest: str, n_retain: int
    ) -> None:
        """Tell a trial's scores; scores that are not numbers make it a failure.

        It has an estimate where it was asked fewer than all `n_retain` questions to keep.
        """
        scores = {name: float(value) for name, value in result.evaluation.scores.items()}
        if not self._goal.is_known(scores):
            self.fail(number, "a score is not a finite number", deterministic=True)
            return
        trial, retain_rows = self._open[number], int(scores["retain_rows"])
        for key, fact in {
            "scores": scores,
            "seconds": dict(result.seconds),
            "retain_rows": retain_rows,
            "retain_exact": retain_rows == n_retain,
            "max_new_tokens": result.max_new_tokens,
            "losses": list(result.losses),
            "checks": [dataclasses.asdict(check) for check in result.checks],
            "answers_digest": answers_digest,
        }.items():
            trial.set_user_attr(key, fact)
        self._tell(trial, self._goal.value(scores), self._goal.violations(scores))
        del self._open[number]

    def fail(
        self, number: int, reason: str, *, deterministic: bool = False, again: bool = False
    ) -> None:
        """Tell that a trial failed, and why in a line; one that has ended is left as it is.

        A `deterministic` failure is told to the sampler as the worst scores that there can be, for
        it learns nothing of what it is not told. A setting that had no part in the failure is
        queued to be run `again`.
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
        else:
            self._tell(trial, *worst)

    def _tell(self, trial: optuna.Trial, value: float, violations: Mapping[str, float]) -> None:
        for bound, violation in violations.items():
            trial.set_constraint(bound, violation)
        self._study.tell(trial, value)

    def _queue(self, number: int, parameters: Mapping[str, Any], attempts: int) -> None:
        """Queue a setting; once, also where a kill came between that and the trial's end."""
        if number not in _superseded(self._study.get_trials(deepcopy=False)):
            attrs = {"attempts": attempts, AGAIN_OF: number}
            self._study.enqueue_trial(dict(parameters), user_attrs=attrs, skip_if_exists=False)


@dataclass(frozen=True, slots=True, repr=False)
class StoredStudy(Concise):
    """What a journal says of a search, without anything else of it."""

    rows: tuple[TrialRow, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)  # what was kept with `Study.note`
    distributions: Mapping[str, BaseDistribution] = field(default_factory=dict)  # the last trial's

    @classmethod
    def read(cls, path: Path) -> StoredStudy:
        """Read a journal and change nothing; it is empty where there is none, or no study yet.

        A damaged one, one that is not of a search, or of another version is an InputError.
        """
        if not path.is_file():
            return cls()
        damage = "is damaged, or not the journal of a search"
        try:
            table = Folder(path.parent).told()  # first: a search may go on meanwhile
            studies, mistakes = studies_in(path), list[str]()
            if not studies:
                return cls()
            if len(studies) > 1:
                mistakes.append("it has more than one study, and a search is one")
            if repeats_itself(path):
                mistakes.append("it says the same twice")
            kept = studies[0].user_attrs.get(FORMAT_NOTE, 1)
            if kept == FORMAT or not studies[0].user_attrs:  # it was killed as it was made
                stored = cls.of(studies[0])
                mistakes += stored._mistakes(studies[0], table)
                if not mistakes:
                    return stored
        except OSError:
            raise
        except Exception as error:  # Optuna trusts the lines and stumbles over them in any way
            mistakes = [f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"]
            kept = FORMAT
        if mistakes and kept == FORMAT:
            raise InputError(
                f"{path}: {damage} ({'; '.join(mistakes[:_LISTED])}). Restore the file from a copy "
                "of the folder, or name another search."
            )
        raise InputError(
            f"{path.parent}: was begun by another version of lunar-tune, which keeps searches in "
            f"another format ({kept}, here {FORMAT}). Read and resume it with that version, or "
            "start a new search."
        )

    @classmethod
    def of(cls, study: optuna.Study) -> StoredStudy:
        """Return what a study says."""
        notes = study.user_attrs
        goal = Goal.read(*notes["goal"]) if "goal" in notes else None
        rows = tuple(_rows(study, goal)) if goal is not None else ()
        drawn = [one.distributions for one in study.get_trials(deepcopy=False)]
        last = next((one for one in reversed(drawn) if one), {})  # one that waits has none
        return cls(rows=rows, notes=notes, distributions=last)

    def _mistakes(self, study: optuna.Study, table: Mapping[int, str]) -> list[str]:
        if "goal" not in self.notes:
            return []
        drawn = {one.number: one.distributions for one in study.get_trials(deepcopy=False)}
        return list(mistakes_in(self.rows, Goal.read(*self.notes["goal"]), drawn, table))

    def has_ended(self, num_trials: int) -> bool:
        """Say whether the search has ended by itself when it was to have so many trials."""
        return (self.notes.get("num_trials") or 0) >= num_trials

    @property
    def knows_enough(self) -> bool:
        """Whether the search ended when little was to gain."""
        return bool((self.notes.get("outlook") or {}).get("enough"))

    @property
    def references(self) -> References | None:
        """What the base model does with the reference prompts, if it was asked, or InputError."""
        note = self.notes.get("references")
        return None if note is None else References.read(note)

    @property
    def ranges(self) -> dict[str, FloatDistribution | IntDistribution]:
        """The parameters that are drawn from between two different bounds."""
        return {
            name: kind
            for name, kind in self.distributions.items()
            if isinstance(kind, FloatDistribution | IntDistribution) and not kind.single()
        }

    @property
    def listed(self) -> dict[str, tuple[float, ...]]:
        """The values of the parameters that are chosen from a list of numbers."""
        return {
            name: tuple(value for value in kind.choices if isinstance(value, (int, float)))
            for name, kind in self.distributions.items()
            if isinstance(kind, CategoricalDistribution)
        }


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
    told: dict[str, Any] = {name: attrs[name] for name in _KEPT if name in attrs}
    if complete:
        feasible = goal.is_kept(scores)
        told |= {"scores": scores, "objective": trial.value, "feasible": feasible}
        second = goal.second(scores)
        told["second"] = math.inf if second is None else second
        told["error"] = goal.error(scores)
    return TrialRow(
        number=trial.number,
        state=COMPLETE if complete else ended,
        parameters=dict(trial.params),
        seconds={**attrs.get("seconds", {}), "suggest": attrs.get("seconds_suggest", 0.0)},
        failure=failure,
        again=trial.number in superseded or failure in {LEFT_RUNNING, INTERRUPTED},
        losses=tuple(attrs.get("losses", ())),
        checks=tuple(attrs.get("checks", ())),
        outlook=attrs.get("outlook", {}),
        started=trial.datetime_start,
        ended=trial.datetime_complete,
        **told,
    )


def keep_note(path: Path, key: str, value: Any) -> None:
    """Keep a fact of a search that is on disk, as `Study.note` does."""
    studies_in(path)[0].set_user_attr(key, value)
