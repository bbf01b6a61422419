"""Samplers by name, and a study opened with one.

A package adds one with an entry point of the group `lunar_tune.samplers` that names a function
of a seed.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna

from lunar_tune.config.search_config import SearchConfig
from lunar_tune.metrics.goal import goal_of
from lunar_tune.registry import Registry
from lunar_tune.search.space import SearchSpace
from lunar_tune.study.study import Study

__all__ = ["SAMPLERS", "open_study"]

# Measured on recorded surfaces of a small checkpoint: with 8 random trials first the constrained
# GP found the grid's optimum within 20 to 30 trials (docs/benchmarks.md).
STARTUP_TRIALS = 8

SAMPLERS: Registry[Callable[[int], optuna.samplers.BaseSampler]] = Registry(
    "sampler", group="lunar_tune.samplers"
)
SAMPLERS.register(
    "gp", lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
)
SAMPLERS.register(
    "tpe",
    lambda seed: optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
    ),
)
SAMPLERS.register("random", lambda seed: optuna.samplers.RandomSampler(seed=seed))


def open_study(path: Path, *, name: str, space: SearchSpace, config: SearchConfig) -> Study:
    """Open a search's study, or make it."""

    def sampler(n_before: int) -> optuna.samplers.BaseSampler:
        """Return the sampler; after earlier trials it must not draw what they drew."""
        seed = config.seed
        if n_before:
            seed = int.from_bytes(hashlib.sha256(f"{seed}/{n_before}".encode()).digest()[:4])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return SAMPLERS[config.sampler](seed)

    return Study(
        path,
        name=name,
        goal=goal_of(config),
        distributions=space.parameters,
        sampler=sampler,
        starting_points=space.starting_points,
    )
