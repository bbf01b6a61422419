"""The command `lunar-tune finetune`: the model learns the data, before it forgets."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lunar_tune.cli.commands import Command, CommonOptions, Given, Reused
from lunar_tune.config.fields import check_values, same_option, shared_options
from lunar_tune.config.run_options import ModelOptions, RunOptions, read_assignments
from lunar_tune.config.search_config import EXPERIMENT, RETAIN_FLOOR, SearchConfig
from lunar_tune.errors import Problems
from lunar_tune.report.progress_bars import build_progress, epochs_shown

if TYPE_CHECKING:
    from lunar_tune.finetuning.finetune import Finetuned
    from lunar_tune.finetuning.finetune_job import FinetuneJob, FinetuneSettings

__all__ = ["COMMAND", "FinetuneOptions"]

# Most of what the model cannot know should be declined: LUNAR redirects to where it declines.
LEAST_REFUSED = 0.5
EXIT_UNKNOWN = 3


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(ModelOptions, CommonOptions):
    """What the command takes."""

    data: str | None = same_option(RunOptions, "data")
    reference_prompts: str = same_option(RunOptions, "reference_prompts")
    refusals: str = same_option(RunOptions, "refusals")
    text: bool = same_option(RunOptions, "text")
    rouge_tokenizer: str = same_option(RunOptions, "rouge_tokenizer")
    seed: int = same_option(RunOptions, "seed")
    fix: tuple[str, ...] = same_option(
        RunOptions,
        "fix",
        help="Fix a setting of the training: trained=full, epochs=30, learning_rate=1e-4, rank, "
        "alpha, dropout, batch_size, weight_decay, checkpointing, with_refusals. May be given "
        "several times.",
    )
    save: Path = same_option(
        Reused,
        "save",
        help="Folder of the checkpoint. The same command goes on with an unfinished one.",
        default=MISSING,
    )
    tracking_uri: str | None = same_option(
        SearchConfig,
        "tracking_uri",
        help="MLflow tracking URI. Default: a sqlite file beside the checkpoint's folder.",
    )


def finetune(options: FinetuneOptions, given: Given) -> int:  # noqa: ARG001
    """Fine-tune a model on the data of which it will forget a part.

    A search is in vain on a model that does not know its data.

    `lunar-tune finetune --model qwen2.5-7b --data my_pairs.json --save runs/knows`

    Then: `lunar-tune search --model qwen2.5-7b --model-path runs/knows --data …`

    Exit codes: 0 the model knows the data, 3 its ROUGE-1 is below 0.8 (the checkpoint is kept),
    1 the training failed, 130 interrupted, 2 the input was wrong.
    """
    from lunar_tune.finetuning.finetune_job import FinetuneSettings, read_settings

    problems, settings = Problems(), FinetuneSettings()
    check_values(options, problems)
    with problems.collect():
        settings = read_settings(read_assignments(options.fix))
    return _run(
        shared_options(options, RunOptions, without={"fix"}),
        settings,
        problems,
        Console(quiet=options.quiet, emoji=False),
        output=options.save,
        uri=options.tracking_uri,
    )


def _run(
    options: RunOptions,
    settings: FinetuneSettings,
    problems: Problems,
    console: Console,
    *,
    output: Path,
    uri: str | None,
) -> int:
    from lunar_tune.finetuning.checkpoints import check_output
    from lunar_tune.finetuning.finetune import finetune as train_model
    from lunar_tune.search.finetuning_run import (
        finetuning_content,
        finetuning_tables,
        shown_training,
    )
    from lunar_tune.tracking.store import default_tracking_uri
    from lunar_tune.tracking.tracker import Tracker
    from lunar_tune.trial.assemble import materialise_model
    from lunar_tune.trial.learning import assemble_finetuning

    with problems.collect():
        check_output(output)
    job = assemble_finetuning(options, settings, problems)
    with build_progress(console) as bar:
        model = materialise_model(job.model, epochs_shown(bar, "building the tiny model (once)"))
    job = dataclasses.replace(job, model=model)
    _print_plan(console, job, output)
    place = output.resolve()
    tracker = Tracker(uri or default_tracking_uri(place.parent), EXPERIMENT, place.name)
    started = datetime.now()
    with shown_training(job, console, kept_in=output) as (on_start, on_epoch, _):
        finished = train_model(job, output, on_start=on_start, on_epoch=on_epoch)
    knowledge = finished.knowledge
    content = finetuning_content(
        job,
        place.name,
        started=started,
        losses=dict(enumerate(finished.losses, 1)),
        known={"rouge1": knowledge.rouge1, "refused": knowledge.refused},
        tables=finetuning_tables(finished, text=options.text),
    )
    tracker.write(content)
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
            "Give more epochs."
            if settings.with_refusals
            else "Train with --fix with_refusals=true too."
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
        f"{RETAIN_FLOOR:g}. The last epoch's loss was {done.losses[-1]:.3f}. Try --fix epochs "
        f"above {settings.epochs}, --fix learning_rate above {settings.rate:g}, or --fix "
        "trained=full.",
    )
    return EXIT_UNKNOWN


def _warn(console: Console, message: str) -> None:
    console.print(f"[bold yellow]warning:[/bold yellow] {escape(message)}", soft_wrap=True)


COMMAND = Command(finetune, FinetuneOptions)
