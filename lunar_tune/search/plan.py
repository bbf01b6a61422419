"""A search before it runs: everything checked that needs no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lunar_tune.config.fields import shared_options
from lunar_tune.config.run_options import (
    LEAST_BUDGET,
    NONE,
    PUBLISHED_MAX_NEW_TOKENS,
    RunOptions,
    read_assignments,
)
from lunar_tune.config.search_config import AUTO, LONGEST_NAME, SearchConfig
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import check_writable, is_plain, safe_name
from lunar_tune.metrics.goal import goal_of
from lunar_tune.metrics.names import WHOLE_ANSWERS, need_of
from lunar_tune.models.lineage import read_lineage
from lunar_tune.models.loading import load_config
from lunar_tune.search.backends.ray.cluster import check_address, check_gpus
from lunar_tune.search.samplers import SAMPLERS
from lunar_tune.search.space import LAYER, SearchSpace, described
from lunar_tune.search.space_sources import load_space, narrowed
from lunar_tune.search.starting_points import (
    LAYER_PRIOR,
    StartingPoint,
    check_has_choice,
    choose_layers,
    fitting,
    found_points,
    usual_point,
)
from lunar_tune.study.folder import Folder
from lunar_tune.trial.assemble import assemble, known_depth
from lunar_tune.trial.layer_scores import LayerPrior, read_layer_prior
from lunar_tune.trial.spec import TrialSpec

__all__ = ["SearchPlan", "check_output", "make_folder", "plan_search"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """A checked search, ready to be run."""

    config: SearchConfig
    spec: TrialSpec
    n_layers: int
    """Number of the model's decoder blocks."""
    space: SearchSpace
    """With the settings that are tried first."""
    usual: Mapping[str, int | float]
    """The setting that the space itself names first, or the middle of its ranges."""
    points: tuple[StartingPoint, ...]
    """All settings that are to be tried first, as they were found."""
    starts: str
    """What became of them, to show."""
    prior: LayerPrior | None = None
    """Scored layers, once they are known."""
    layers: str | None = None
    """What scored layers made of the space, to show."""

    @property
    def facts(self) -> dict[str, str]:
        """What is going to be done, to show: label and value."""
        config, spec, data, held = self.config, self.spec, self.spec.data, self.spec.data.held_out
        sample, lineage = len(data.retain_sample), read_lineage(spec.model.checkpoint)
        retained = f"retain {sample}"
        if sample != len(data.retain):
            retained += f" (a sample of {len(data.retain)})"
        questions = (
            f"{data.name}: forget {', '.join(data.forget_edges)} ({len(data.forget)} questions), "
            f"{retained}, factual {len(data.factual)}"
        )
        if held is not None:
            counts = f"{len(held.forget)}, {len(held.retain)}, {len(held.factual)}"
            questions += f"; reported on as many others: {counts}"
        budget, trials = f"{spec.max_new_tokens} tokens", f"{config.num_trials} by {config.sampler}"
        if spec.max_new_tokens is None:
            budget = f"twice the longest true answer's tokens (at least {LEAST_BUDGET})"
        if config.time_budget is not None:
            trials += f", none started after {config.time_budget:g} s"
        weights = f" with {spec.model.weights}" if spec.model.weights else ""
        return {
            "model": f"{spec.model.name}{weights}",
            **({"  origin": lineage.summary} if lineage is not None else {}),
            "data": questions,
            "method": f"{spec.method.name} ({spec.method.variant})",
            **{f"  {name}": text for name, text in self.space.describe()},
            **({"  layer": self.layers} if self.layers is not None else {}),
            "starting points": self.starts,
            "goal": str(goal_of(config)),
            "trials": trials,
            "answers": f"up to {budget} in a trial, at least {PUBLISHED_MAX_NEW_TOKENS} tokens in "
            "the confirmation",
        }

    @property
    def layer_coefficient(self) -> float | None:
        """With which coefficient layers are to be scored before the first trial, if they are."""
        scored = self.config.layer_prior == AUTO and self.prior is None
        return float(self.usual["coefficient"]) if scored else None

    def with_prior(self, prior: LayerPrior, *, origin: str) -> SearchPlan:
        """Return the plan with the layers that a prior recommends, and a setting of the best first.

        Raises:
            InputError: It recommends no layer of the space.
        """
        space, best, text = choose_layers(self.space, prior, origin=origin)
        points = list(self.points)
        if best is not None and NONE not in self.config.start_from:
            setting = {**self.usual, LAYER: best}
            points.insert(0, StartingPoint(setting, "the best layer by s1 - s2"))
        first, starts = fitting(points, space)
        space = dataclasses.replace(space, starting_points=first)
        return dataclasses.replace(self, space=space, starts=starts, prior=prior, layers=text)

    def with_own_prior(self, text: str) -> SearchPlan:
        """Return the plan with what the search itself has scored; see `with_prior`."""
        prior = LayerPrior.model_validate_json(text)
        return self.with_prior(prior, origin=f"{AUTO}, coefficient {prior.coefficient:g}")


def plan_search(config: SearchConfig, problems: Problems | None = None) -> SearchPlan:
    """Check everything that needs no weights.

    Raises:
        InputError: Something is wrong; all of it is said at once, with what is noted already.
    """
    problems = problems or Problems()
    checks: tuple[Callable[[], object], ...] = (
        config.check,
        lambda: goal_of(config),
        lambda: SAMPLERS[config.sampler],
        lambda: check_gpus(config),
        lambda: check_address(config.address),
        lambda: check_output(config),
    )
    for check in checks:
        with problems.collect():
            check()
    plan = prior = None
    with problems.collect():
        if config.layer_prior not in {None, AUTO}:
            prior = read_layer_prior(Path(str(config.layer_prior)).expanduser())
    with problems.collect():
        spec = assemble(
            _run_options(config),
            device_is_here=config.address is None,
            gpu_share=config.gpus_per_trial or 1.0,
        )
        plan = _with_layers(_plan(config, spec), prior)
    problems.raise_if_any()
    if plan is None:
        raise AssertionError("what is missing comes with a noted problem")
    engine = dataclasses.replace(
        plan.spec.engine,
        retain_floor=goal_of(config).stoppable_floor,
        early_exit=WHOLE_ANSWERS not in need_of(plan.spec.metrics),
    )
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, engine=engine))


def _run_options(config: SearchConfig) -> RunOptions:
    """Return the run's options, with the goal's metrics among those that a trial computes."""
    options = shared_options(config, RunOptions)
    try:
        wanted = goal_of(config).metrics
    except InputError:
        return options  # that is noted already
    return dataclasses.replace(options, metrics=(*options.metrics, *wanted))


def _plan(config: SearchConfig, spec: TrialSpec) -> SearchPlan:
    """Read space and starting points; scored layers are not looked at yet."""
    n_layers = known_depth(config) or int(load_config(spec.model).num_hidden_layers)
    method, fixed = spec.method, read_assignments(config.fix)
    space = load_space(config.space, method, model_name=spec.model.name, n_layers=n_layers)
    space = narrowed(space, method, fixed=fixed, ranges=config.range, n_layers=n_layers)
    # A resumed study has queued the settings of other searches already.
    searches = [one for one in config.start_from if one != NONE and config.resume is None]
    points = found_points(searches, output=config.output, spec=spec, n_layers=n_layers)
    if NONE not in config.start_from:
        points += [StartingPoint(point, "the space's own") for point in space.starting_points]
    first, starts = fitting(points, space)
    return SearchPlan(
        config=config,
        spec=spec,
        n_layers=n_layers,
        space=dataclasses.replace(space, starting_points=first),
        usual=usual_point(space),
        points=tuple(points),
        starts=starts,
    )


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
        kind = described(plan.space.parameters[LAYER])
        scored = f"coefficient {plan.layer_coefficient:g}"
        text = f"{kind}, to be narrowed by s1 - s2 ({AUTO}, {scored})"
        plan = dataclasses.replace(plan, layers=text)
    if prior is not None:
        prior.check_fits(model=plan.spec.model.name, n_layers=plan.n_layers, source=option)
        origin, data = Path(str(plan.config.layer_prior)).name, plan.spec.data
        if (prior.data, prior.forget_edges) != (data.name, data.forget_edges):
            origin += f", scored on {prior.data} {'+'.join(prior.forget_edges)}"
        plan = plan.with_prior(prior, origin=origin)
    edited = plan.space.values_of(LAYER) if plan.spec.method.edits_one_layer else ()
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, layers=edited))


def make_folder(config: SearchConfig, spec: TrialSpec) -> Folder:
    """Make the folder of a new search.

    Raises:
        InputError: It exists, or cannot be written.
    """
    name = config.name
    if name is None:
        stamp = datetime.now(tz=UTC).strftime("%Y%m%d-%H%M%S")
        edges = "+".join(spec.data.forget_edges)
        method = f"{spec.method.name}-{spec.method.variant}-{stamp}"
        about = f"{spec.model.name}-{spec.data.name}-{edges}"[: LONGEST_NAME - len(method) - 1]
        name = safe_name(f"{about}-{method}")
    path = config.output / name
    if config.resume is None:
        _check_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {config.output}: cannot be written ({error}).") from error
    return Folder(path.resolve())


def check_output(config: SearchConfig) -> None:
    """Check that a search's folder can be made, without making it.

    Raises:
        InputError: It exists already, or cannot be written.
    """
    if config.name is not None and is_plain(config.name) and config.resume is None:
        _check_free(config.output / config.name)
    check_writable(config.output, f"--output {config.output}")


def _check_free(path: Path) -> None:
    if Folder(path).is_taken:
        raise InputError(
            f"--name {path.name}: {path} exists already. Go on with it (python -m "
            f"lunar_tune.search --resume {path}), choose another name, or delete the folder to "
            "search anew."
        )
