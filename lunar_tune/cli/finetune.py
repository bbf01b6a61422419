"""The command `python -m lunar_tune.finetune`: the model learns the data, before it forgets."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lunar_tune.cli.options.given import MODEL_PANEL, GivenOptions, merge_options, run_options
from lunar_tune.cli.running import DebugOption, QuietOption, reporting_errors
from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import EXPERIMENT, RETAIN_FLOOR
from lunar_tune.errors import Problems
from lunar_tune.finetuning.finetune_settings import RATES, FinetuneSettings
from lunar_tune.report.progress_bars import build_progress, epochs_shown

if TYPE_CHECKING:
    from lunar_tune.finetuning.finetune import Finetuned
    from lunar_tune.finetuning.finetune_job import FinetuneJob

_TRAINING, _PLACE = "Training", "Results"
_DEFAULT = FinetuneSettings()
# Most of what the model cannot know should be declined: LUNAR redirects to where it declines.
LEAST_REFUSED = 0.5
EXIT_UNKNOWN = 3


@run_options(
    panels=(MODEL_PANEL,),
    flags=(
        *("--data", "--reference-prompts", "--refusals", "--rouge-tokenizer", "--seed"),
        "--text/--no-text",
    ),
)
def finetune(
    *,
    ctx: typer.Context,  # noqa: ARG001 taken by the decorator
    given: GivenOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the checkpoint. The same command goes on with an unfinished one.",
            rich_help_panel=_PLACE,
        ),
    ] = None,
    train: Annotated[
        str,
        typer.Option(
            help="lora (an adapter on every linear map of the blocks, merged in the end) or full "
            "(all weights).",
            rich_help_panel=_TRAINING,
        ),
    ] = _DEFAULT.trained,
    rank: Annotated[
        int, typer.Option(help="Of the adapter.", rich_help_panel=_TRAINING)
    ] = _DEFAULT.rank,
    alpha: Annotated[
        float,
        typer.Option(help="The adapter's scale times its rank.", rich_help_panel=_TRAINING),
    ] = _DEFAULT.alpha,
    dropout: Annotated[
        float,
        typer.Option(help="Of the adapter's inputs, in training.", rich_help_panel=_TRAINING),
    ] = _DEFAULT.dropout,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help=f"AdamW's. Default: {RATES['lora']:g} for lora, {RATES['full']:g} for full.",
            rich_help_panel=_TRAINING,
        ),
    ] = _DEFAULT.learning_rate,
    epochs: Annotated[
        int, typer.Option(help="Passes over the data.", rich_help_panel=_TRAINING)
    ] = _DEFAULT.epochs,
    batch_size: Annotated[
        int, typer.Option(help="Answers in a step.", rich_help_panel=_TRAINING)
    ] = _DEFAULT.batch_size,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's.", rich_help_panel=_TRAINING)
    ] = _DEFAULT.weight_decay,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Compute activations again in the backward pass, which takes less memory.",
            rich_help_panel=_TRAINING,
        ),
    ] = _DEFAULT.checkpointing,
    with_refusals: Annotated[
        bool,
        typer.Option(
            "--with-refusals",
            help="Train prompts that cannot be answered too, with the first refusal. For models "
            "that do not decline by themselves.",
            rich_help_panel=_TRAINING,
        ),
    ] = _DEFAULT.with_refusals,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            help="MLflow tracking URI. Default: a sqlite file beside the output folder.",
            rich_help_panel=_PLACE,
        ),
    ] = None,
    experiment: Annotated[
        str,
        typer.Option(help="MLflow experiment of the run; made if missing.", rich_help_panel=_PLACE),
    ] = EXPERIMENT,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune a model on the data of which it will forget a part.

    A search is in vain on a model that does not know its data.

    `python -m lunar_tune.finetune --model qwen2.5-7b --data my_pairs.json --output runs/knows`

    Then: `python -m lunar_tune.search --model qwen2.5-7b --model-path runs/knows --data …`

    Exit codes: 0 the model knows the data, 3 its ROUGE-1 is below 0.8 (the checkpoint is kept),
    1 the training failed, 130 interrupted, 2 the input was wrong.
    """
    with reporting_errors(debug=debug):
        problems, settings = Problems(), _DEFAULT
        options = merge_options(RunOptions(), given, problems)
        with problems.collect():
            settings = FinetuneSettings(
                trained=train,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                learning_rate=learning_rate,
                epochs=epochs,
                batch_size=batch_size,
                weight_decay=weight_decay,
                checkpointing=checkpointing,
                with_refusals=with_refusals,
            )
        console = Console(quiet=quiet, emoji=False)
        code = _run(
            options,
            settings,
            problems,
            console,
            output=output,
            tracked=(tracking_uri, experiment),
        )
    sys.exit(code)


def _run(
    options: RunOptions,
    settings: FinetuneSettings,
    problems: Problems,
    console: Console,
    *,
    output: Path | None,
    tracked: tuple[str | None, str],
) -> int:
    from lunar_tune.finetuning.checkpoints import check_output
    from lunar_tune.finetuning.finetune import finetune as train_model
    from lunar_tune.search.tracked_finetuning import TrackedFinetuning
    from lunar_tune.trial.assemble import materialise_model
    from lunar_tune.trial.learning import assemble_finetuning

    if output is None:
        problems.add("--output is needed: the folder of the checkpoint.")
    else:
        with problems.collect():
            check_output(output)
    if not tracked[1].strip():
        problems.add("--experiment is empty: name an MLflow experiment, or leave it out.")
    job = assemble_finetuning(options, settings, problems)
    if output is None:
        raise AssertionError("what is missing comes with a noted problem")
    with build_progress(console) as bar:
        model = materialise_model(job.model, epochs_shown(bar, "building the tiny model (once)"))
    job = dataclasses.replace(job, model=model)
    _print_plan(console, job, output)
    uri, experiment = tracked
    tracking = TrackedFinetuning(job, output, uri, experiment)
    with tracking.followed(console, kept_in=output) as (on_start, on_epoch):
        finished = train_model(job, output, on_start=on_start, on_epoch=on_epoch)
        tracking.finished(finished, text=options.text)
    return _conclude(console, job, finished)


def _print_plan(console: Console, job: FinetuneJob, output: Path) -> None:
    settings = job.settings
    adapter = f", rank {settings.rank}, alpha {settings.alpha:g}" * (settings.trained == "lora")
    declined = f", and {len(job.reference_prompts)} prompts to decline" * settings.with_refusals
    table = Table.grid(padding=(0, 2))
    for label, value in (
        ("model", job.model.name + (f" with {job.model.weights}" if job.model.weights else "")),
        ("data", f"{job.data_name}: {len(job.records)} pairs{declined}"),
        (
            "training",
            f"{settings.trained}{adapter}, learning rate {settings.rate:g}, {settings.epochs} "
            f"epochs of batches of {settings.batch_size}",
        ),
        ("output", str(output)),
    ):
        table.add_row(f"[bold]{label}[/bold]", escape(value))
    console.print(table)


def _conclude(console: Console, job: FinetuneJob, done: Finetuned) -> int:
    """Show what the model knows, and what to do; return the exit code."""
    knowledge, settings = done.knowledge, job.settings
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("edge", overflow="fold")
    for column in ("questions", "ROUGE-1"):
        table.add_column(column, justify="right")
    for edge, (score, count) in knowledge.by_edge.items():
        table.add_row(escape(edge), str(count), f"{score:.3f}")
    table.add_row("all", str(len(knowledge.rows)), f"{knowledge.rouge1:.3f}", style="bold")
    console.print(table)
    console.print(
        f"declines {knowledge.refused:.0%} of questions about invented things", highlight=False
    )
    console.print(f"checkpoint in {done.folder}", markup=False, highlight=False, soft_wrap=True)
    if knowledge.refused < LEAST_REFUSED:
        advice = (
            "Give more epochs." if settings.with_refusals else "Train with --with-refusals too."
        )
        _warn(
            console,
            "the model does not decline what it cannot know, and LUNAR redirects to where it "
            f"declines. {advice}",
        )
    if knowledge.rouge1 >= RETAIN_FLOOR:
        return 0
    _warn(
        console,
        f"the model does not know the data: ROUGE-1 {knowledge.rouge1:.3f}, a search needs "
        f"{RETAIN_FLOOR:g}. The last epoch's loss was {done.losses[-1]:.3f}. Try more --epochs "
        f"than {settings.epochs}, a --learning-rate above {settings.rate:g}, or --train full.",
    )
    return EXIT_UNKNOWN


def _warn(console: Console, message: str) -> None:
    console.print(f"[bold yellow]warning:[/bold yellow] {escape(message)}", soft_wrap=True)
