"""Samplers by name, and a study opened with one."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import optuna

from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import goal_of
from lunar_tune.search.space.space import SearchSpace
from lunar_tune.study.study import Study

__all__ = ["SAMPLERS", "check_sampler", "open_study"]

# Measured on recorded surfaces of a small checkpoint: with 8 random trials first the constrained
# GP found the grid's optimum within 20 to 30 trials (docs/benchmarks.md).
STARTUP_TRIALS = 8


SAMPLERS: Mapping[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
    "tpe": lambda seed: optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
    ),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""By name: a sampler of a seed."""


def check_sampler(name: str) -> None:
    """Check that a sampler exists.

    Raises:
        InputError: It does not.
    """
    if name not in SAMPLERS:
        raise InputError(f"--sampler {name}: there are {', '.join(SAMPLERS)}.")


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
        sampler=functools.partial(_sampler_after, config.sampler, config.seed),
        starting_points=space.starting_points,
    )


def _sampler_after(name: str, seed: int, n_before: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a search that has so many trials already.

    It begins with other draws than those, which would ask what was asked already.
    """
    if n_before:
        seed = int.from_bytes(hashlib.sha256(f"{seed}/{n_before}".encode()).digest()[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[name](seed)
