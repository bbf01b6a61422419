"""Samplers by name, and the study that asks one."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence

import optuna

from lunar_tune.config.options import SearchConfig
from lunar_tune.driver.space import SearchSpace
from lunar_tune.metrics.goal import goal_of
from lunar_tune.registry import Registry
from lunar_tune.study.folder import Folder
from lunar_tune.study.study import Study, Told

STARTUP_TRIALS = 8  # of Optuna's samplers, at random

SAMPLERS: Registry[Callable[[int], optuna.samplers.BaseSampler]] = Registry(
    "sampler", group="lunar_tune.samplers"
)
"""Each makes a sampler from a seed. It is made anew for each trial, and learns from the study."""


def _frontier(seed: int) -> optuna.samplers.BaseSampler:
    from lunar_tune.driver.samplers.frontier import FrontierSampler  # loads scikit-learn

    return FrontierSampler(seed)


SAMPLERS.register("frontier", _frontier)
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


def sampler_at(
    make: Callable[[int], optuna.samplers.BaseSampler], seed: int, begun: int
) -> optuna.samplers.BaseSampler:
    """Return the sampler of the next trial, after so many settings: resumed, a search has the same.

    Each trial has a seed of its own that follows from the search's.
    """
    own = int.from_bytes(hashlib.sha256(f"{seed}/{begun}".encode()).digest()[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return make(own)


def open_study(
    folder: Folder, space: SearchSpace, config: SearchConfig, earlier: Sequence[Told] = ()
) -> Study:
    """Open a search's study, or make it, with what `earlier` searches were told."""
    make = SAMPLERS[config.sampler]
    return Study(
        folder.journal,
        name=folder.name,
        goal=goal_of(config),
        distributions=space.parameters,
        sampler=lambda begun: sampler_at(make, config.seed, begun),
        starting_points=space.starting_points,
        earlier=earlier,
    )
