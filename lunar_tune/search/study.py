"""The study: the truth about parameters, states, scores and failures.

Covers: an Optuna study in a journal file, asking for the next parameters, telling results with
their constraint, reading all trials back as rows.
Does not cover: who runs the trials (`trainable`), mirrors (`tracking`, `reporting`).

Only public calls of Optuna 5 are used: ask, set_constraint, set_user_attr, tell.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from lunar_tune.reporting.rows import COMPLETE, FAILED, PRUNED, RUNNING, TrialRow
from lunar_tune.search.config import SearchConfig
from lunar_tune.search.space import SearchSpace

__all__ = ["Study", "make_sampler"]

# Measured on recorded surfaces of a small checkpoint: with 8 random trials first the constrained
# GP found the grid's optimum within 20 to 30 trials (docs/benchmarks.md).
STARTUP_TRIALS = 8
CONSTRAINT = "retain_rouge1"

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """One search's study.

    Args:
        path: The journal file; made if missing.
        name: The study's name.
        space: What is searched.
        config: Sampler, floor and seed.
    """

    def __init__(self, path: Path, *, name: str, space: SearchSpace, config: SearchConfig) -> None:
        """Open the journal or make it, and queue the starting points in a new study."""
        storage = JournalStorage(
            JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))
        )
        self._floor = config.retain_floor
        self._distributions = space.distributions()
        self._open: dict[int, optuna.Trial] = {}
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=make_sampler(config.sampler, config.run.seed),
            direction="minimize",
            load_if_exists=True,
        )
        if config.starting_points and not self._study.get_trials(deepcopy=False):
            for point in space.starting_points:
                self._study.enqueue_trial(dict(point), skip_if_exists=True)

    def ask(self) -> tuple[int, dict[str, Any]]:
        """Return the next trial's number and parameters."""
        start = time.perf_counter()
        trial = self._study.ask(self._distributions)
        self._open[trial.number] = trial
        trial.set_user_attr("seconds_suggest", time.perf_counter() - start)
        return trial.number, dict(trial.params)

    def complete(self, number: int, result: Mapping[str, Any]) -> None:
        """Tell a trial's scores; scores that are not finite make it a failure."""
        scores = {name: float(value) for name, value in result["scores"].items()}
        if not all(map(math.isfinite, (scores["forget_rouge1"], scores["retain_rouge1"]))):
            self.fail(number, "a score is not a finite number")
            return
        trial = self._open[number]
        trial.set_constraint(CONSTRAINT, self._floor - scores["retain_rouge1"])
        for key in (
            "scores",
            "seconds",
            "retain_rows",
            "retain_exact",
            "max_new_tokens",
            "losses",
            "checks",
            "answers_digest",
        ):
            trial.set_user_attr(key, result[key])
        self._study.tell(trial, scores["forget_rouge1"])
        del self._open[number]

    def fail(self, number: int, reason: str) -> None:
        """Tell that a trial failed, and why; a trial that has ended is left as it is."""
        trial = self._open.get(number)
        if trial is not None:
            trial.set_user_attr("failure", reason)
            self._study.tell(trial, state=TrialState.FAIL)
            del self._open[number]

    def prune(self, number: int, seen: Mapping[str, Any]) -> None:
        """Tell that a scheduler ended a trial while its fit went on.

        Args:
            number: Of the trial.
            seen: The last look at it: `epochs`, `forget_rouge1`, `retain_rouge1`.
        """
        trial = self._open.pop(number)
        trial.set_user_attr(
            "failure",
            f"pruned after {seen['epochs']} epochs: forget {seen['forget_rouge1']:.3f}, retain "
            f"{seen['retain_rouge1']:.3f} on samples",
        )
        self._study.tell(trial, state=TrialState.PRUNED)

    def running(self) -> list[int]:
        """Return the numbers of trials that were asked for here and have not ended."""
        return list(self._open)

    def row(self, number: int) -> TrialRow:
        """Return one trial as a row."""
        return self._row(self._study.get_trials(deepcopy=False)[number])

    def rows(self) -> list[TrialRow]:
        """Return all trials that were started, by number."""
        trials = self._study.get_trials(deepcopy=False)
        return [self._row(trial) for trial in trials if trial.state != TrialState.WAITING]

    def _row(self, trial: FrozenTrial) -> TrialRow:
        attrs = trial.user_attrs
        scores = attrs.get("scores", {})
        complete = trial.state == TrialState.COMPLETE
        ended = {TrialState.FAIL: FAILED, TrialState.PRUNED: PRUNED, TrialState.COMPLETE: COMPLETE}
        return TrialRow(
            number=trial.number,
            state=ended.get(trial.state, RUNNING),
            parameters=dict(trial.params),
            scores=scores if complete else {},
            feasible=scores["retain_rouge1"] >= self._floor if complete else None,
            retain_rows=attrs.get("retain_rows"),
            retain_exact=attrs.get("retain_exact"),
            max_new_tokens=attrs.get("max_new_tokens"),
            seconds={**attrs.get("seconds", {}), "suggest": attrs.get("seconds_suggest", 0.0)},
            failure=attrs.get("failure"),
            losses=tuple(attrs.get("losses", ())),
            checks=tuple(attrs.get("checks", ())),
            answers_digest=attrs.get("answers_digest"),
        )


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Return a sampler by its name on the command line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        if name == "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
            )
        return optuna.samplers.RandomSampler(seed=seed)
