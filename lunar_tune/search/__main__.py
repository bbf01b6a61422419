"""The command `python -m lunar_tune.search`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lunar_tune.cli.options import GivenOptions, merge_options, was_given, with_run_options
from lunar_tune.cli.running import DebugOption, QuietOption, command_app, reporting_errors
from lunar_tune.errors import Problems
from lunar_tune.evaluation.settings import DecodingSettings
from lunar_tune.search.config import SAMPLERS, SCHEDULERS, SearchConfig
from lunar_tune.trial.options import EngineSettings, RunOptions

_SEARCH, _PLACE = "Search", "Resources and results"
_DEFAULT = SearchConfig()


@with_run_options
def search(
    *,
    ctx: typer.Context,
    given: GivenOptions,
    space: Annotated[
        str | None,
        typer.Option(
            help="Search space: a YAML file or a shipped name. Default: the model's own.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.space,
    num_trials: Annotated[
        int, typer.Option(help="Trials to run.", rich_help_panel=_SEARCH)
    ] = _DEFAULT.num_trials,
    time_budget: Annotated[
        float | None,
        typer.Option(help="Start no trial after so many seconds.", rich_help_panel=_SEARCH),
    ] = _DEFAULT.time_budget,
    minimise: Annotated[
        str,
        typer.Option(
            "--minimise",
            "--minimize",
            help="Metric to make as good as possible; one for which higher is better is "
            "maximised. See the README for their names.",
            metavar="METRIC",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.minimise,
    constrain: Annotated[
        list[str] | None,
        typer.Option(
            help="Bound that a feasible trial keeps; may be given several times. Default: "
            "'retain_rouge1>=0.8'.",
            metavar="'METRIC>=VALUE'",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    retain_floor: Annotated[
        float | None,
        typer.Option(
            help="Least retain ROUGE-1 of a feasible trial: a short form of --constrain.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.retain_floor,
    bounded: Annotated[
        bool,
        typer.Option(
            help="Ask no more of a trial that has missed the floor for certain; its retain "
            "score is then the mean of the rows that were asked.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.bounded,
    sampler: Annotated[
        str,
        typer.Option(help=f"Who proposes: {', '.join(SAMPLERS)}.", rich_help_panel=_SEARCH),
    ] = _DEFAULT.sampler,
    scheduler: Annotated[
        str,
        typer.Option(
            help=f"Who ends gradient fits early by comparing them: {', '.join(SCHEDULERS)}.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.scheduler,
    starting_points: Annotated[
        bool,
        typer.Option(
            help="Try the space's known-good settings and tuned ones first.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.starting_points,
    layer_prior: Annotated[
        str | None,
        typer.Option(
            help="Search the layers that s1 - s2 recommends: a file of python -m "
            "lunar_tune.layers --json, or auto to score them first.",
            metavar="FILE|auto",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.layer_prior,
    max_failures: Annotated[
        int,
        typer.Option(help="Stop after so many failed trials in a row.", rich_help_panel=_SEARCH),
    ] = _DEFAULT.max_failures,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Go on although the unmodified model speaks against it.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.force,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything that needs no weights, show the plan, and stop.",
            rich_help_panel=_SEARCH,
        ),
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder of all searches.", rich_help_panel=_PLACE)
    ] = _DEFAULT.output,
    name: Annotated[
        str | None,
        typer.Option(
            help="The search's name. Default: made from model, data, method and time.",
            rich_help_panel=_PLACE,
        ),
    ] = _DEFAULT.name,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            help="MLflow tracking URI. Default: a sqlite file in the output folder.",
            rich_help_panel=_PLACE,
        ),
    ] = _DEFAULT.tracking_uri,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(
            help="GPUs of a trial, fractions allowed. Default: 1 where there are any.",
            rich_help_panel=_PLACE,
        ),
    ] = _DEFAULT.gpus_per_trial,
    cpus_per_trial: Annotated[
        float | None,
        typer.Option(
            help="CPU cores of a trial. Default: shared out, at most 4.", rich_help_panel=_PLACE
        ),
    ] = _DEFAULT.cpus_per_trial,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Trials at once. Default: as many as fit.", rich_help_panel=_PLACE),
    ] = _DEFAULT.concurrency,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster. Default: Ray is started here.", rich_help_panel=_PLACE
        ),
    ] = _DEFAULT.address,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Keep the best setting as a starting point of later searches.",
            rich_help_panel=_PLACE,
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
        base = RunOptions(
            decoding=DecodingSettings(max_new_tokens=None),
            engine=EngineSettings(early_exit=True),
        )
        local: dict[str, Any] = {
            key: value
            for key, value in locals().items()
            if key in {entry.name for entry in dataclasses.fields(SearchConfig)}
        }
        local["constrain"] = tuple(constrain or ())
        problems = Problems()
        config = SearchConfig(run=merge_options(base, given, problems), **local)
        origins = {key: "command line" for key in local if was_given(ctx, key)} | dict(
            given.origins
        )
        code = _run(config, problems, origins, given.arguments, dry_run=dry_run, quiet=quiet)
    sys.exit(code)


def _run(
    config: SearchConfig,
    problems: Problems,
    origins: dict[str, str],
    arguments: tuple[str, ...],
    *,
    dry_run: bool,
    quiet: bool,
) -> int:
    from lunar_tune.search.plan import plan_search
    from lunar_tune.search.run import run_search
    from lunar_tune.search.summary import print_plan

    console = Console(quiet=quiet)
    plan = plan_search(config, problems)
    if dry_run:
        print_plan(console, plan.facts)
        console.print("all that needs no weights has been checked; nothing was run")
        return 0
    return run_search(plan, console, given=origins, arguments=arguments)


if __name__ == "__main__":
    command_app(search)()
