"""A search before it runs: everything checked that needs no weights.

Covers: the values, the data, the output folder, the GPUs, the space; every mistake in one message.
Does not cover: the model's own scores (`run`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from lunar_tune.errors import InputError, Problems
from lunar_tune.models.loading import load_config
from lunar_tune.search.cluster import check_gpus
from lunar_tune.search.config import SearchConfig
from lunar_tune.search.outputs import check_output
from lunar_tune.search.space import SearchSpace, load_space
from lunar_tune.search.summary import plan_facts
from lunar_tune.trial.assemble import assemble, known_depth
from lunar_tune.trial.options import RunOptions
from lunar_tune.trial.spec import TrialSpec

__all__ = ["SearchPlan", "plan_search"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """A checked search, ready to be run."""

    config: SearchConfig
    spec: TrialSpec
    space: SearchSpace
    facts: Mapping[str, str]
    """What is going to be done, to show."""


def plan_search(config: SearchConfig, problems: Problems | None = None) -> SearchPlan:
    """Check everything that needs no weights.

    Args:
        config: What is asked for.
        problems: What is known to be wrong already.

    Raises:
        InputError: Something is wrong; all of it is said at once.
    """
    problems = problems or Problems()
    spec = space = None
    with problems.collect():
        config.check()
    with problems.collect():
        check_gpus(config)
    with problems.collect():
        check_output(config.output, config.name, resume=config.resume)
    with problems.collect():
        spec = assemble(_with_metrics(config), device_is_here=config.address is None)
        space = _space(config, spec)
    problems.raise_if_any()
    if spec is None or space is None:
        raise AssertionError("what is missing comes with a noted problem")
    floor = config.goal.stoppable_floor if config.bounded else None
    spec = dataclasses.replace(
        spec,
        engine=dataclasses.replace(spec.engine, retain_floor=floor),
        layers=space.values_of("layer") if spec.method.edits_one_layer else (),
    )
    return SearchPlan(config=config, spec=spec, space=space, facts=plan_facts(config, spec, space))


def _with_metrics(config: SearchConfig) -> RunOptions:
    """Return the run's options with the goal's metrics among those that a trial computes."""
    try:
        wanted = config.goal.metrics
    except InputError:
        return config.run  # that is noted already
    return dataclasses.replace(config.run, metrics=(*config.run.metrics, *wanted))


def _space(config: SearchConfig, spec: TrialSpec) -> SearchSpace:
    """Read the space that fits the model's depth."""
    depth = known_depth(config.run)
    return load_space(
        config.space,
        model_name=spec.model.name,
        method=spec.method.name,
        variant=spec.method.variant,
        parameters=spec.method.parameters,
        optional=spec.method.optional_parameters,
        n_layers=depth if depth is not None else load_config(spec.model).num_hidden_layers,
    )
