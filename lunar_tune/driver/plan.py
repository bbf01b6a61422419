"""A search before it runs: everything checked that needs no weights."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from lunar_tune.config.fields import shared_options
from lunar_tune.config.options import (
    AUTO,
    DECLINING,
    LEAST_BUDGET,
    LONGEST_NAME,
    NONE,
    PUBLISHED_MAX_NEW_TOKENS,
    READ_TOKENS,
    RETAINING,
    TINY,
    RunOptions,
    SearchConfig,
)
from lunar_tune.data.records import Record
from lunar_tune.driver.backends.cluster import check_address, check_gpus
from lunar_tune.driver.samplers import SAMPLERS
from lunar_tune.driver.space import SearchSpace, described
from lunar_tune.driver.space_sources import load_space, narrowed, space_begun_with
from lunar_tune.driver.starting_points import (
    LAYER_PRIOR,
    Found,
    StartingPoint,
    check_has_choice,
    choose_layers,
    fitting,
    found_in,
    usual_point,
)
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import check_writable, is_plain, safe_name
from lunar_tune.metrics.goal import METRICS, VERDICTS, Goal, goal_of
from lunar_tune.models.catalog import read_lineage
from lunar_tune.models.device import dtype_of, resolve_device, shown_dtype
from lunar_tune.models.loading import load_config
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import LAYER
from lunar_tune.study.study import StoredStudy
from lunar_tune.trial.assemble import (
    assemble,
    assemble_collection,
    check_machine,
    in_format_of,
    known_depth,
    redirects_own_answers,
)
from lunar_tune.trial.collecting import Collection, ask_command
from lunar_tune.trial.layer_scores import LayerPrior, read_layer_prior
from lunar_tune.trial.spec import TrialSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """A checked search, ready to be run."""

    config: SearchConfig
    spec: TrialSpec
    n_layers: int  # number of the model's decoder blocks
    space: SearchSpace  # with the settings that are tried first
    usual: Mapping[str, int | float]
    """The setting that the space itself names first, or the middle of its ranges."""
    points: tuple[StartingPoint, ...]  # all settings that are to be tried first, as they were found
    starts: str  # what became of them, to show
    found: Found = field(default_factory=Found)  # in other searches
    prior: LayerPrior | None = None  # scored layers, once they are known
    whole_space: SearchSpace | None = None  # the space before they narrowed it
    layers: str | None = None  # what scored layers made of the space, to show
    prompts: Mapping[str, str] = field(default_factory=dict)  # the first of each set, to show

    @property
    def facts(self) -> dict[str, str]:
        """What is going to be done, to show: label and value."""
        config, spec, data, held = self.config, self.spec, self.spec.data, self.spec.data.held_out
        sample, lineage = len(data.retain_sample), read_lineage(spec.model.checkpoint)
        chat, taught = spec.chat, ""
        if lineage is not None:
            taught = lineage.taught_otherwise(chat.template, chat.system_prompt)
        least = "up to " * data.unanswered
        retained = f"retain {least}{sample}"
        if sample != len(data.retain):
            retained += f" (a sample of {least}{len(data.retain)})"
        questions = (
            f"{data.name}: forget {', '.join(data.forget_edges)} ({least}{len(data.forget)} "
            f"questions), {retained}, factual {len(data.factual)}"
        )
        if data.own_answers:
            questions += "; the true answers are the model's own"
            questions += ", which is asked first" * data.unanswered
        if held is not None:
            counts = f"{len(held.forget)}, {len(held.retain)}, {len(held.factual)}"
            questions += f"; held out for the report: {counts}"
        layers = self.layers
        if (coefficient := self.layer_coefficient) is not None:
            layers = f"{described(self.space.parameters[LAYER])}, to be narrowed by s1 - s2"
            layers += f" ({AUTO}, coefficient {coefficient:g})"
        budget, bounded = f"{spec.max_new_tokens} tokens", ""
        most = "at most " if config.stop == AUTO else ""
        trials = f"{most}{config.num_trials}, sampler {config.sampler}"
        if spec.max_new_tokens is None:
            budget = f"twice the longest true answer's tokens (at least {LEAST_BUDGET})"
            if any(VERDICTS in METRICS[name].needs for name in spec.metrics):
                budget += f", to {READ_TOKENS} where it counts whether they decline,"
            bounded = ", where an answer ends that only repeats itself"
        if config.time_budget is not None:
            trials += f", none started after {config.time_budget:g} s"
        model, source = spec.model, spec.model.source
        if model.name == TINY:
            source = "built and trained on this machine"
        weights = f" with {model.weights}" if model.weights else ""
        number_format = "the first worker's choice"  # on another machine
        if config.address is None:
            number_format = shown_dtype(dtype_of(model), resolve_device(model.device))
        return {
            "model": model.name + (f" ({source})" if source != model.name else "") + weights,
            "number format": number_format,
            **({"  origin": model.origin} if model.origin else {}),
            **({"  warning": f"the model {taught}"} if taught else {}),
            "data": questions,
            **spec.lost_letters,
            **({"  note": "; ".join(data.notes)} if data.notes else {}),
            "method": f"{spec.method.name} ({spec.method.variant})",
            **{f"  {name}": text for name, text in self.space.describe()},
            **({"  layer": layers} if layers is not None else {}),
            "starting points": self.starts,
            **({"earlier trials": self.found.text} if self.found.told else {}),
            "objective": str(goal_of(config)),
            "trials": trials,
            "answers": f"up to {budget} in a trial, at least {PUBLISHED_MAX_NEW_TOKENS} tokens in "
            f"the confirmation{bounded}",
            **self.prompts,
        }

    @property
    def layer_coefficient(self) -> float | None:
        """With which coefficient layers are to be scored before the first trial, if they are."""
        scored = self.config.layer_prior == AUTO and self.prior is None
        return float(self.usual["coefficient"]) if scored else None

    def with_prior(self, prior: LayerPrior) -> SearchPlan:
        """Return the plan with the recommended layers, the best first, or raise an InputError."""
        origin, data = f"{AUTO}, coefficient {prior.coefficient:g}", self.spec.data
        if self.config.layer_prior != AUTO:
            origin = Path(str(self.config.layer_prior)).name
            if (prior.data, prior.forget_edges) != (data.name, data.forget_edges):
                origin += f", scored on {prior.data} {'+'.join(prior.forget_edges)}"
        space, best, text = choose_layers(self.space, prior, origin=origin)
        points = list(self.points)
        if best is not None and NONE not in self.config.start_from:
            setting = {**self.usual, LAYER: best}
            points.insert(0, StartingPoint(setting, "the best layer by s1 - s2"))
        space, starts = fitting(points, space)
        found = dataclasses.replace(self, prior=prior, whole_space=self.space, layers=text)
        return dataclasses.replace(found, space=space, starts=starts)


def plan_search(
    config: SearchConfig,
    problems: Problems | None = None,
    on_step: Callable[[str], object] = lambda _what: None,
) -> SearchPlan:
    """Check everything that needs no weights, or raise an InputError with all that is wrong.

    `problems` are known already; `on_step` hears what is about to take long.
    """
    problems, goal, prior = problems or Problems(), None, None
    config = with_constraints(config)
    problems.attempt(config.check)
    problems.attempt(lambda: SAMPLERS[config.sampler])
    problems.attempt(lambda: check_address(config.address))
    problems.attempt(lambda: check_output(config))
    with problems.collect():
        goal = goal_of(config)
    with problems.collect():
        if config.layer_prior is not None and config.layer_prior != AUTO:
            prior = read_layer_prior(Path(config.layer_prior).expanduser())
    with problems.collect():
        plan = _plan(config, goal, prior)
    problems.raise_if_any()
    spec = plan.spec
    on_step("loading torch")
    here, share = config.address is None, config.gpus_per_trial or 1.0
    problems.attempt(lambda: check_gpus(config))
    problems.attempt(lambda: check_machine(spec, here=here, share=share))
    problems.raise_if_any()
    if spec.data.unanswered:
        on_step("looking for what the model has answered")
        if (records := collection_of(config).kept()) is not None:
            plan = _plan(config, goal, prior, records)
            spec = plan.spec
        elif not here:
            raise InputError(
                f"--data {spec.data.name} with --address: the model must be asked first, on a "
                f"machine that can load it: {ask_command(config, '--save', 'FOLDER')}. Then give "
                "--data FOLDER/pairs.json --reference-prompts FOLDER/references.json "
                "--factual-data none."
            )
    spec = dataclasses.replace(
        spec,
        retain_floor=goal_of(config).stoppable_floor,
        early_exit=True,
        layers=plan.space.values_of(LAYER) if spec.method.edits_one_layer else (),
    )
    return dataclasses.replace(plan, spec=spec)


def with_constraints(config: SearchConfig) -> SearchConfig:
    """Return options in which constraints are named: those that go with method and data."""
    if config.constrain:
        return config
    usual: tuple[str, ...] = (RETAINING,)
    with suppress(InputError):  # said with all else that is wrong
        if redirects_own_answers(config):
            usual = (RETAINING, DECLINING)
    return dataclasses.replace(config, constrain=usual)


def collection_of(config: SearchConfig) -> Collection:
    """Return what a search's model is asked, in the number format of one that is resumed."""
    if config.resume is not None:
        journal = Folder((config.output / config.resume).resolve()).journal
        config = in_format_of(config, StoredStudy.read(journal).notes.get("model"))
    return assemble_collection(config)


def _plan(
    config: SearchConfig,
    goal: Goal | None,
    prior: LayerPrior | None,
    answers: Sequence[Record] | None = None,
) -> SearchPlan:
    """Read data, space and starting points; take the layers that a file has scored.

    `answers` are the pairs of a question set, as the model has answered it.
    """
    options = shared_options(config, RunOptions)
    metrics = (*options.metrics, *(goal.metrics if goal else ()))
    spec = assemble(dataclasses.replace(options, metrics=metrics), answers)
    n_layers = known_depth(config) or int(load_config(spec.model).num_hidden_layers)
    begun_with = space_begun_with(config)
    space = load_space(
        config.space,
        spec.method,
        model_name=spec.model.name,
        n_layers=n_layers,
        begun_with=begun_with,
    )
    space = narrowed(space, spec.method, config, n_layers=n_layers)
    # A resumed study has queued the settings of other searches already.
    searches = [one for one in config.start_from if one != NONE and config.resume is None]
    found = found_in(
        searches, output=config.output, spec=spec, n_layers=n_layers, space=space, goal=goal
    )
    points = list(found.points)
    if NONE not in config.start_from and not found.told:
        points += [StartingPoint(point, "the space's own") for point in space.starting_points]
    usual, option = usual_point(space), f"{LAYER_PRIOR} {config.layer_prior}"
    if config.layer_prior is not None and begun_with is None:
        check_has_choice(space, option=option)
    if config.layer_prior == AUTO and usual["coefficient"] == 0:
        raise InputError(
            f"{option}: the middle of the space's coefficients is 0, which moves nothing. Name a "
            "starting point in the space."
        )
    space, starts = fitting(points, space)
    plan = SearchPlan(
        config=config,
        spec=spec,
        n_layers=n_layers,
        space=space,
        usual=usual,
        points=tuple(points),
        starts=starts,
        found=found,
    )
    if prior is None:
        return plan
    prior.check_fits(model=spec.model.name, n_layers=n_layers, source=option)
    return plan.with_prior(prior)


def make_folder(config: SearchConfig, spec: TrialSpec) -> Folder:
    """Make the folder of a new search, or raise an InputError."""
    name = config.name
    if name is None:
        stamp = datetime.now(tz=UTC).strftime("%Y%m%d-%H%M%S")
        edges = "+".join(spec.data.forget_edges)
        method = f"{spec.method.name}-{spec.method.variant}-{stamp}"
        about = f"{spec.model.name}-{spec.data.name}-{edges}"[: LONGEST_NAME - len(method) - 1]
        name = safe_name(f"{about}-{method}")
    path = config.output / name
    if config.resume is None:
        _check_free(path, config)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {config.output}: cannot be written ({error}).") from error
    return Folder(path.resolve())


def check_output(config: SearchConfig) -> None:
    """Check that a search's folder can be made, without making it, or raise an InputError."""
    if config.name is not None and is_plain(config.name) and config.resume is None:
        _check_free(config.output / config.name, config)
    check_writable(config.output, f"--output {config.output}")


def _check_free(path: Path, config: SearchConfig) -> None:
    if Folder(path).is_taken:
        resuming = shlex.join(config.resuming(path))
        raise InputError(
            f"--name {path.name}: {path} exists already. Resume that search (python -m "
            f"lunar_tune.search {resuming}), choose another name, or delete the folder."
        )
