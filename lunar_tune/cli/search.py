"""The command `python -m lunar_tune.search`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lunar_tune.cli.options.again import given_again
from lunar_tune.cli.options.given import GivenOptions, merge_options, was_given, with_run_options
from lunar_tune.cli.options.search_options import (
    PLACE_PANEL,
    SEARCH_PANEL,
    AddressOption,
    BoundedOption,
    ConcurrencyOption,
    ConstrainOption,
    CpusOption,
    DryRunOption,
    ExperimentOption,
    FinetuneOption,
    GpusOption,
    MaxFailuresOption,
    MinimiseOption,
    NumTrialsOption,
    OutputOption,
    RetainFloorOption,
    SamplerOption,
    SchedulerOption,
    SpaceOption,
    StartingPointsOption,
    TrackingUriOption,
    TrialTimeoutOption,
)
from lunar_tune.cli.running import DebugOption, QuietOption, reporting_errors, say
from lunar_tune.config.decoding_settings import DecodingSettings
from lunar_tune.config.run_options import EngineSettings, RunOptions
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import Problems

_DEFAULT = SearchConfig()
_BASE = RunOptions(
    decoding=DecodingSettings(max_new_tokens=None), engine=EngineSettings(early_exit=True)
)


@with_run_options
def search(
    *,
    ctx: typer.Context,
    given: GivenOptions,
    space: SpaceOption = _DEFAULT.space,
    num_trials: NumTrialsOption = _DEFAULT.num_trials,
    time_budget: Annotated[
        float | None,
        typer.Option(help="Start no trial after so many seconds.", rich_help_panel=SEARCH_PANEL),
    ] = _DEFAULT.time_budget,
    minimise: MinimiseOption = _DEFAULT.minimise,
    constrain: ConstrainOption = None,
    retain_floor: RetainFloorOption = _DEFAULT.retain_floor,
    bounded: BoundedOption = _DEFAULT.bounded,
    sampler: SamplerOption = _DEFAULT.sampler,
    scheduler: SchedulerOption = _DEFAULT.scheduler,
    starting_points: StartingPointsOption = _DEFAULT.starting_points,
    layer_prior: Annotated[
        str | None,
        typer.Option(
            help="Search the layers that s1 - s2 recommends: a file of python -m "
            "lunar_tune.layers --json, or auto to score them first.",
            metavar="FILE|auto",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = _DEFAULT.layer_prior,
    max_failures: MaxFailuresOption = _DEFAULT.max_failures,
    trial_timeout: TrialTimeoutOption = _DEFAULT.trial_timeout,
    finetune: FinetuneOption = _DEFAULT.finetune,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Go on although the unmodified model speaks against it.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = _DEFAULT.force,
    dry_run: DryRunOption = False,
    output: OutputOption = _DEFAULT.output,
    name: Annotated[
        str | None,
        typer.Option(
            help="The search's name. Default: made from model, data, method and time.",
            rich_help_panel=PLACE_PANEL,
        ),
    ] = _DEFAULT.name,
    resume_name: Annotated[
        str | None,
        typer.Option(
            "--resume",
            help="Go on with a search, by its name or folder; it knows its options, of which those "
            "that decide no score may be given anew.",
            metavar="NAME",
            rich_help_panel=PLACE_PANEL,
        ),
    ] = None,
    tracking_uri: TrackingUriOption = _DEFAULT.tracking_uri,
    experiment: ExperimentOption = _DEFAULT.experiment,
    system_metrics: Annotated[
        bool,
        typer.Option(
            "--system-metrics",
            help="Record the use of processor, memory, disk, network and GPU in MLflow.",
            rich_help_panel=PLACE_PANEL,
        ),
    ] = _DEFAULT.system_metrics,
    gpus_per_trial: GpusOption = _DEFAULT.gpus_per_trial,
    cpus_per_trial: CpusOption = _DEFAULT.cpus_per_trial,
    concurrency: ConcurrencyOption = _DEFAULT.concurrency,
    address: AddressOption = _DEFAULT.address,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Keep the best setting as a starting point of later searches.",
            rich_help_panel=PLACE_PANEL,
        ),
    ] = _DEFAULT.keep,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Search for the setting that forgets most while the model keeps the rest.

    Each trial is one complete unlearning run. Optuna proposes layer, coefficient and learning
    rate so as to minimise forget ROUGE-1 subject to retain ROUGE-1 of at least the floor; Ray Tune
    runs the trials; MLflow shows them side by side.

    On a laptop, nothing else needed:  `python -m lunar_tune.search --model tiny`

    On a GPU: `python -m lunar_tune.search --model qwen2.5-7b --model-path FINE-TUNED`

    Exit codes: 0 a feasible setting was found, 3 none was, 4 too many trials failed in a row,
    130 interrupted, 2 the input was wrong.
    """
    with reporting_errors(debug=debug):
        local: dict[str, Any] = {
            key: value
            for key, value in locals().items()
            if key in {entry.name for entry in dataclasses.fields(SearchConfig)}
        }
        local["constrain"] = tuple(constrain or ())
        problems = Problems()
        anew = {key: value for key, value in local.items() if was_given(ctx, key)}
        origins = dict.fromkeys(anew, "command line") | dict(given.origins)
        if resume_name is None:
            config = SearchConfig(run=merge_options(_BASE, given, problems), **local)
        else:
            config, before = _gone_on_with(resume_name, output, anew, given, problems)
            origins = {**before, **origins}
        code = _run(config, problems, origins, dry_run=dry_run, quiet=quiet)
    sys.exit(code)


def _gone_on_with(
    name: str,
    output: Path,
    anew: Mapping[str, Any],
    given: GivenOptions,
    problems: Problems,
) -> tuple[SearchConfig, Mapping[str, str]]:
    """Return the configuration of a search that has begun, and the origins of its values."""
    from lunar_tune.search.resume import check_run, resumed

    config, origins = resumed(name, output=output, given=anew, problems=problems)
    run = merge_options(config.run, given, problems)
    method = config.run.method
    flags = {option.path_for(method): option.flag.partition("/")[0] for option in given.values}
    check_run(config, run, flags, problems)
    return dataclasses.replace(config, run=run), origins


def _run(
    config: SearchConfig,
    problems: Problems,
    origins: dict[str, str],
    *,
    dry_run: bool,
    quiet: bool,
) -> int:
    from lunar_tune.search.display.summary import print_plan
    from lunar_tune.search.plan import plan_search
    from lunar_tune.search.prerequisite import finetuning_fact
    from lunar_tune.search.resume import check_unchanged, is_finished
    from lunar_tune.search.run import run_search, show_finished
    from lunar_tune.study.folder import Folder

    console = Console(quiet=quiet, emoji=False)
    plan = plan_search(config, problems)
    if config.resume:
        folder = Folder((config.output / str(config.name)).resolve())
        if (warning := check_unchanged(plan, folder)) is not None:
            say(console, f"warning: {warning}")
        elsewhere = origins.get("tracking_uri") == "command line"
        if not dry_run and not elsewhere and is_finished(folder, config.num_trials):
            return show_finished(folder, console, keep=config.keep)
    if dry_run:
        print_plan(console, {**plan.facts, **finetuning_fact(config, plan.spec)})
        console.print("all that needs no weights has been checked; nothing was run")
        return 0
    arguments = given_again(config, origins, base=_BASE)
    return run_search(plan, console, given=origins, arguments=arguments)
