"""Samplers by name, and a study opened with one."""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path

import optuna

from lunar_tune.config.search_config import SearchConfig
from lunar_tune.metrics.goal import goal_of
from lunar_tune.search.space.space import SearchSpace
from lunar_tune.study.study import Study

__all__ = ["make_sampler", "open_study"]

# Measured on recorded surfaces of a small checkpoint: with 8 random trials first the constrained
# GP found the grid's optimum within 20 to 30 trials (docs/benchmarks.md).
STARTUP_TRIALS = 8


def open_study(path: Path, *, name: str, space: SearchSpace, config: SearchConfig) -> Study:
    """Open a search's study, or make it.

    Args:
        path: The journal file.
        name: The study's name.
        space: What is searched, and what is tried first.
        config: Sampler, goal and seed.
    """
    return Study(
        path,
        name=name,
        goal=goal_of(config),
        distributions=space.distributions(),
        sampler=functools.partial(_sampler_after, config.sampler, config.run.seed),
        starting_points=space.starting_points if config.starting_points else (),
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


def _sampler_after(name: str, seed: int, n_before: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a search that has so many trials already.

    It begins with other draws than those, which would ask what was asked already.
    """
    if n_before:
        seed = int.from_bytes(hashlib.sha256(f"{seed}/{n_before}".encode()).digest()[:4])
    return make_sampler(name, seed)
