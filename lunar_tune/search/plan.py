"""A search before it runs: everything checked that needs no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunar_tune import __version__
from lunar_tune.config.fields import shared_options
from lunar_tune.config.run_options import NONE, RunOptions, read_assignments
from lunar_tune.config.search_config import AUTO, SearchConfig
from lunar_tune.errors import InputError, Problems
from lunar_tune.metrics.goal import goal_of
from lunar_tune.metrics.names import WHOLE_ANSWERS, need_of
from lunar_tune.models.lineage import read_lineage
from lunar_tune.models.loading import load_config
from lunar_tune.search.backends.ray.access import check_address
from lunar_tune.search.backends.ray.cluster import check_gpus
from lunar_tune.search.display.summary import plan_facts
from lunar_tune.search.layer_choice import LAYER_PRIOR, check_has_choice, choose_layers
from lunar_tune.search.outputs import check_output
from lunar_tune.search.samplers import check_sampler
from lunar_tune.search.space.narrowing import narrowed
from lunar_tune.search.space.space import SearchSpace, load_space
from lunar_tune.search.starting_points import (
    StartingPoint,
    StartingPoints,
    fitting,
    found_points,
    own_points,
    usual_point,
)
from lunar_tune.trial.assemble import assemble, configured, known_depth
from lunar_tune.trial.layer_scores import LayerPrior, read_layer_prior
from lunar_tune.trial.spec import TrialSpec

__all__ = ["SearchPlan", "plan_search", "resolved_values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """A checked search, ready to be run."""

    config: SearchConfig
    spec: TrialSpec
    n_layers: int
    """Number of the model's decoder blocks."""
    space: SearchSpace
    usual: Mapping[str, int | float]
    """The setting that the space itself names first, or the middle of its ranges."""
    starts: StartingPoints
    """What is tried first; the space has the settings as well."""
    prior: LayerPrior | None = None
    """Scored layers, once they are known."""
    layers: str | None = None
    """What scored layers made of the space, to show."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What is going to be done, to show."""
        return plan_facts(
            self.config,
            self.spec,
            self.space,
            layers=self.layers,
            starts=self.starts.text,
        )

    @property
    def layer_coefficient(self) -> float | None:
        """With which coefficient layers are to be scored before the first trial, if they are."""
        scored = self.config.layer_prior == AUTO and self.prior is None
        return float(self.usual["coefficient"]) if scored else None

    def with_prior(self, prior: LayerPrior, *, origin: str) -> SearchPlan:
        """Return the plan with the layers that a prior recommends, and a setting of the best first.

        Args:
            prior: Of the plan's model.
            origin: Where it comes from, to show.

        Raises:
            InputError: It recommends no layer of the space.
        """
        choice = choose_layers(self.space, prior, origin=origin)
        points = list(self.starts.asked)
        if choice.best is not None and NONE not in self.config.start_from:
            best = {**self.usual, "layer": choice.best}
            points.insert(0, StartingPoint(best, "the best layer by s1 - s2"))
        starts = fitting(points, choice.space)
        return dataclasses.replace(
            self,
            space=dataclasses.replace(choice.space, starting_points=starts.values),
            starts=starts,
            prior=prior,
            layers=choice.text,
        )

    def with_own_prior(self, text: str) -> SearchPlan:
        """Return the plan with what the search itself has scored; see `with_prior`."""
        prior = LayerPrior.model_validate_json(text)
        return self.with_prior(prior, origin=f"{AUTO}, coefficient {prior.coefficient:g}")

    @property
    def prior_document(self) -> dict[str, Any]:
        """What `config.yaml` says of scored layers."""
        if self.prior is None:
            return {}
        return {"layer_prior": {"made_of_it": self.layers, **self.prior.model_dump(mode="json")}}


def plan_search(config: SearchConfig, problems: Problems | None = None) -> SearchPlan:
    """Check everything that needs no weights.

    Args:
        config: What is asked for.
        problems: What is known to be wrong already.

    Raises:
        InputError: Something is wrong; all of it is said at once.
    """
    problems = problems or Problems()
    plan = prior = None
    with problems.collect():
        config.check()
    with problems.collect():
        goal_of(config)
    with problems.collect():
        check_sampler(config.sampler)
    with problems.collect():
        check_gpus(config)
    with problems.collect():
        check_address(config.address)
    with problems.collect():
        check_output(config.output, config.name, resume=config.resume is not None)
    with problems.collect():
        prior = _read_prior(config)
    with problems.collect():
        spec = assemble(
            _run_options(config),
            device_is_here=config.address is None,
            gpu_share=config.gpus_per_trial or 1.0,
        )
        plan = _plan(config, spec)
        plan = _with_layers(plan, prior)
    problems.raise_if_any()
    if plan is None:
        raise AssertionError("what is missing comes with a noted problem")
    engine = dataclasses.replace(
        plan.spec.engine,
        retain_floor=goal_of(config).stoppable_floor,
        early_exit=WHOLE_ANSWERS not in need_of(plan.spec.metrics),
    )
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, engine=engine))


def _plan(config: SearchConfig, spec: TrialSpec) -> SearchPlan:
    """Read space and starting points; scored layers are not looked at yet."""
    n_layers = _depth(config, spec)
    space = _space(config, spec, n_layers)
    own = [] if NONE in config.start_from else own_points(space)
    starts = fitting([*_found(config, spec, n_layers), *own], space)
    return SearchPlan(
        config=config,
        spec=spec,
        n_layers=n_layers,
        space=dataclasses.replace(space, starting_points=starts.values),
        usual=usual_point(space),
        starts=starts,
    )


def _found(config: SearchConfig, spec: TrialSpec, n_layers: int) -> list[StartingPoint]:
    """Return the settings of other searches; a resumed study has queued them already."""
    searches = [one for one in config.start_from if one != NONE and config.resume is None]
    return found_points(searches, output=config.output, spec=spec, n_layers=n_layers)


def _read_prior(config: SearchConfig) -> LayerPrior | None:
    """Read the file of scored layers, if one is named."""
    named = config.layer_prior
    return None if named in (None, AUTO) else read_layer_prior(Path(str(named)).expanduser())


def _with_layers(plan: SearchPlan, prior: LayerPrior | None) -> SearchPlan:
    """Check that scored layers fit, take those of a file, and say which layers trials may edit."""
    option = f"{LAYER_PRIOR} {plan.config.layer_prior}"
    if plan.config.layer_prior is not None:
        check_has_choice(plan.space, option=option)
    if plan.layer_coefficient == 0:
        raise InputError(
            f"{option}: the middle of the space's coefficients is 0, which moves nothing. Name a "
            "starting point in the space."
        )
    if plan.layer_coefficient is not None:
        kind = plan.space.parameters["layer"].describe()
        scored = f"coefficient {plan.layer_coefficient:g}"
        text = f"{kind}, to be narrowed by s1 - s2 ({AUTO}, {scored})"
        plan = dataclasses.replace(plan, layers=text)
    if prior is not None:
        prior.check_fits(model=plan.spec.model.name, n_layers=plan.n_layers, source=option)
        plan = plan.with_prior(prior, origin=_origin(plan, prior))
    edited = plan.space.values_of("layer") if plan.spec.method.edits_one_layer else ()
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, layers=edited))


def _origin(plan: SearchPlan, prior: LayerPrior) -> str:
    """Return a file's name, and what its layers were scored on where that is something else."""
    name, data = Path(str(plan.config.layer_prior)).name, plan.spec.data
    if (prior.data, prior.forget_edges) == (data.name, data.forget_edges):
        return name
    return f"{name}, scored on {prior.data} {'+'.join(prior.forget_edges)}"


def _run_options(config: SearchConfig) -> RunOptions:
    """Return the run's options, with the goal's metrics among those that a trial computes."""
    options = shared_options(config, RunOptions)
    try:
        wanted = goal_of(config).metrics
    except InputError:
        return options  # that is noted already
    return dataclasses.replace(options, metrics=(*options.metrics, *wanted))


def _space(config: SearchConfig, spec: TrialSpec, n_layers: int) -> SearchSpace:
    """Read the space that fits the model's depth, narrowed by what is fixed and by ranges."""
    space = load_space(
        config.space,
        model_name=spec.model.name,
        method=spec.method.name,
        variant=spec.method.variant,
        parameters=spec.method.parameters,
        optional=spec.method.optional_parameters,
        n_layers=n_layers,
    )
    method, parameters = configured(config)
    named = read_assignments(config.fix)
    settings = [name for name in named if name not in parameters]
    return narrowed(
        space,
        method,
        fixed=parameters,
        settings=settings,
        ranges=config.range,
        n_layers=n_layers,
    )


def _depth(config: SearchConfig, spec: TrialSpec) -> int:
    """Return the number of the model's decoder blocks."""
    depth = known_depth(config)
    return depth if depth is not None else int(load_config(spec.model).num_hidden_layers)


def resolved_values(plan: SearchPlan, vanilla: Mapping[str, float]) -> dict[str, Any]:
    """Return what `config.yaml` says beside options.

    Args:
        plan: Of the search.
        vanilla: Scores of the base model.
    """
    data = plan.spec.data
    splits = {"forget": data.forget, "retain": data.retain, "factual": data.factual}
    lineage = read_lineage(plan.spec.model.checkpoint)
    return {
        "space": plan.space.to_dict(),
        "n_layers": plan.n_layers,
        "model_source": plan.spec.model.checkpoint,
        "weights": plan.spec.model.weights,
        "working_folder": str(Path.cwd()),
        "rows": {name: len(records) for name, records in splits.items()},
        "digests": data.digests(),
        "vanilla": dict(vanilla),
        "version": __version__,
        **plan.prior_document,
        **({"lineage": lineage.document()} if lineage is not None else {}),
    }
