"""The command `python -m lunar_tune.table5`: tuned settings for methods × models × data sets."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lunar_tune.cli.options.given import PANELS, GivenOptions, merge_for_all, run_options
from lunar_tune.cli.options.search_options import (
    PLACE_PANEL,
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
    RetainFloorOption,
    SamplerOption,
    SchedulerOption,
    StartingPointsOption,
    TrackingUriOption,
)
from lunar_tune.cli.running import DebugOption, QuietOption, reporting_errors
from lunar_tune.config.decoding_settings import DecodingSettings
from lunar_tune.config.run_options import TINY, EngineSettings, RunOptions
from lunar_tune.config.search_config import PAPER_METHODS, SearchConfig
from lunar_tune.errors import Problems

_TABLE = "Table"
_DEFAULT = SearchConfig()


@run_options(
    panels=PANELS, without=("--model", "--data", "--method", "--solver", "--train", "--seed")
)
def table5(
    *,
    ctx: typer.Context,  # noqa: ARG001 taken by the decorator
    given: GivenOptions,
    models: Annotated[
        str,
        typer.Option(
            help="Models, with commas between; each as --model of a search takes it.",
            metavar="MODEL[,MODEL…]",
            rich_help_panel=_TABLE,
        ),
    ] = TINY,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data sets, with commas between, each with edges to forget if they are not the "
            "default. Default: each model's own.",
            metavar="DATA[:EDGE[+EDGE]][,…]",
            rich_help_panel=_TABLE,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, with commas between, each with its variant if it is not the first: "
            "lunar:closed_form, ga:full.",
            metavar="METHOD[:VARIANT][,…]",
            rich_help_panel=_TABLE,
        ),
    ] = ",".join(PAPER_METHODS),
    num_trials: NumTrialsOption = _DEFAULT.num_trials,
    seeds: Annotated[
        int,
        typer.Option(
            help="Studies of a cell, each with its own seed; the table shows their spread.",
            rich_help_panel=_TABLE,
        ),
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="Of the first study of a cell.", rich_help_panel=_TABLE)
    ] = 0,
    only_table: Annotated[
        bool,
        typer.Option(
            "--only-table",
            help="Run nothing; write the table from the studies that there are.",
            rich_help_panel=_TABLE,
        ),
    ] = False,
    minimise: MinimiseOption = _DEFAULT.minimise,
    constrain: ConstrainOption = None,
    retain_floor: RetainFloorOption = _DEFAULT.retain_floor,
    bounded: BoundedOption = _DEFAULT.bounded,
    sampler: SamplerOption = _DEFAULT.sampler,
    scheduler: SchedulerOption = _DEFAULT.scheduler,
    starting_points: StartingPointsOption = _DEFAULT.starting_points,
    max_failures: MaxFailuresOption = _DEFAULT.max_failures,
    finetune: FinetuneOption = _DEFAULT.finetune,
    dry_run: DryRunOption = False,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder of the table and of its searches. The same command goes on with what "
            "is there.",
            rich_help_panel=PLACE_PANEL,
        ),
    ] = Path("runs/table5"),
    tracking_uri: TrackingUriOption = _DEFAULT.tracking_uri,
    experiment: ExperimentOption = _DEFAULT.experiment,
    gpus_per_trial: GpusOption = _DEFAULT.gpus_per_trial,
    cpus_per_trial: CpusOption = _DEFAULT.cpus_per_trial,
    concurrency: ConcurrencyOption = _DEFAULT.concurrency,
    address: AddressOption = _DEFAULT.address,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Tune every method on every model and data set, and write a table of what they reach.

    Each cell is a search of its own, with its folder and its MLflow runs under the output. Cells
    that are finished are never run again: the same command goes on after an interruption, and with
    a longer list of models, data or methods it runs what is new. `table.md`, `table.csv` and
    `table.tex` are written from the studies alone.

    On a laptop: `python -m lunar_tune.table5 --data mini,factual:arts --num-trials 10`

    Exit codes: 0 every cell is finished, 3 some could not be run, 130 interrupted, 2 the input was
    wrong.
    """
    with reporting_errors(debug=debug):
        problems = Problems()
        base = RunOptions(
            decoding=DecodingSettings(max_new_tokens=None), engine=EngineSettings(early_exit=True)
        )
        shared = SearchConfig(
            run=merge_for_all(base, given, problems),
            num_trials=num_trials,
            minimise=minimise,
            constrain=tuple(constrain or ()),
            retain_floor=retain_floor,
            bounded=bounded,
            sampler=sampler,
            scheduler=scheduler,
            starting_points=starting_points,
            max_failures=max_failures,
            finetune=finetune,
            output=output,
            tracking_uri=tracking_uri,
            experiment=experiment,
            gpus_per_trial=gpus_per_trial,
            cpus_per_trial=cpus_per_trial,
            concurrency=concurrency,
            address=address,
        )
        named = (("--models", models), ("--data", data), ("--methods", methods))
        lists = [_listed(flag, text, problems) for flag, text in named]
        code = _run(
            shared,
            lists,
            problems,
            Console(quiet=quiet, emoji=False),
            seed=seed,
            seeds=seeds,
            dry_run=dry_run,
            only_table=only_table,
        )
    sys.exit(code)


def _listed(flag: str, text: str | None, problems: Problems) -> list[str]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and not parts:
        problems.add(f"{flag} is empty: name at least one.")
    return parts


def _run(
    shared: SearchConfig,
    lists: list[list[str]],
    problems: Problems,
    console: Console,
    *,
    seed: int,
    seeds: int,
    dry_run: bool,
    only_table: bool,
) -> int:
    from lunar_tune.search.table5.table_cells import cells_of
    from lunar_tune.search.table5.table_run import TableRun

    models, data, methods = lists
    if shared.run.model_path is not None and len(models) > 1:
        problems.add("--model-path belongs to one model: give one in --models.")
    cells = []
    with problems.collect():
        cells = cells_of(models, data, methods, seed=seed, seeds=seeds)
    if not cells:  # else each cell is checked whole
        with problems.collect():
            dataclasses.replace(shared, scheduler="none").check()
    table = None
    with problems.collect():
        table = TableRun(cells, shared, console)
    problems.raise_if_any()
    if table is None:
        raise AssertionError("what is missing comes with a noted problem")
    if dry_run:
        table.show_plan()
        return 0
    if only_table:
        console.print(f"written to {', '.join(map(str, table.write()))}", highlight=False)
        return 0
    return table.run()
