"""The command `lunar-tune finetune`: the model learns the data, before it forgets."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.cli.commands import Command, CommonOptions, plain_table
from lunar_tune.config.fields import same_option, shared_options
from lunar_tune.config.options import (
    EXPERIMENT,
    RETAIN_FLOOR,
    ModelOptions,
    Reused,
    RunOptions,
    SearchConfig,
    read_assignments,
)
from lunar_tune.display import say, warn
from lunar_tune.errors import Problems
from lunar_tune.metrics.rouge import lost_letters
from lunar_tune.report.progress import working

if TYPE_CHECKING:
    from lunar_tune.finetuning.finetune import Finetuned
    from lunar_tune.finetuning.finetune_job import FinetuneSettings

# Most of what the model cannot know should be declined: LUNAR redirects to where it declines.
LEAST_REFUSED = 0.5
EXIT_UNKNOWN = 3


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(ModelOptions, CommonOptions):
    """What the command takes."""

    data: str | None = same_option(RunOptions, "data")
    """Pairs to learn: a shipped or fetched name, or a file. Default: mini for tiny, else
    contracts."""
    edge: str | None = same_option(RunOptions, "edge")
    reference_prompts: str | None = same_option(RunOptions, "reference_prompts")
    """Prompts to decline, with --fix with_refusals=true: unverifiable (the default), harmful,
    private, or a file."""
    refusals: str = same_option(RunOptions, "refusals")
    text: bool = same_option(RunOptions, "text")
    rouge_tokenizer: str = same_option(RunOptions, "rouge_tokenizer")
    seed: int = same_option(RunOptions, "seed")
    fix: tuple[str, ...] = same_option(RunOptions, "fix")
    """Fix a setting of the training: trained=full, epochs=30; a wrong name lists all. Default:
    the settings with which a search would fine-tune this model."""
    save: Path = same_option(Reused, "save", default=MISSING)
    """Folder of the checkpoint. The same command resumes an unfinished fine-tuning."""
    tracking_uri: str | None = same_option(SearchConfig, "tracking_uri")
    """MLflow tracking URI. Default: MLFLOW_TRACKING_URI, or a sqlite file beside the checkpoint."""


@Command
def finetune(options: FinetuneOptions, problems: Problems) -> int:
    """Fine-tune a model on the data of which it will forget a part.

    A search finds nothing on a model that does not know the data.

    `lunar-tune finetune --model qwen2.5-7b --data my_pairs.json --save runs/knows`

    Then: `lunar-tune search --model qwen2.5-7b --model-path runs/knows --data …`

    Exit codes: 0 the model knows the data, 3 its ROUGE-1 is below 0.8 (the checkpoint is kept),
    1 the training failed, 130 interrupted, 2 the input was wrong.
    """
    console, fixed = options.console, {}
    with options.working("reading data"):
        from lunar_tune.driver.prerequisite import finetune_tracked
        from lunar_tune.report.summary import print_plan
        from lunar_tune.tracking.address import default_tracking_uri, named_uri
        from lunar_tune.tracking.sync import Tracker
        from lunar_tune.training.checkpoints import check_save_folder
        from lunar_tune.trial.assemble import assemble_finetuning, first_prompts, materialise

        with problems.collect():
            fixed = read_assignments(options.fix)
        with problems.collect():
            check_save_folder(options.save, resumable=True)
        run = shared_options(options, RunOptions, without={"fix"})
        uri = problems.attempt(lambda: named_uri(options.tracking_uri))
        job = assemble_finetuning(run, fixed, problems)
    job = materialise(job, console)
    model, settings = job.model, job.settings
    adapter = f", rank {settings.rank}, alpha {settings.alpha:g}" * (settings.trained == "lora")
    declined = f", and {len(job.reference_prompts)} prompts to decline" * settings.with_refusals
    lost = lost_letters(job.records, job.rouge_tokenizer)
    facts = {
        "model": model.name + (f" with {model.weights}" if model.weights else ""),
        "data": f"{job.data_name}: {len(job.records)} pairs{declined}",
        **({"  lost letters": lost} if lost else {}),
        "training": f"{settings.trained}{adapter}, learning rate {settings.rate:g}, "
        f"{settings.epochs} epochs of batches of {settings.batch_size}",
        **({"  note": "; ".join(job.notes)} if job.notes else {}),
        "output": str(options.save),
        **first_prompts(
            model, job.chat, {"first": job.records[0].question} if options.text else {}
        ),
    }
    print_plan(console, facts)
    place = options.save.resolve()
    uri = uri or default_tracking_uri(place.parent)
    with working(console, "opening the tracking store"):
        tracker = Tracker(uri, EXPERIMENT, place.name)
    done = finetune_tracked(job, options.save, console=console, tracker=tracker, text=options.text)
    return _conclude(console, options.save, job.settings, done)


def _conclude(console: Console, folder: Path, settings: FinetuneSettings, done: Finetuned) -> int:
    """Show what the model knows, and what to do; return the exit code."""
    rows = [(edge, count, f"{score:.3f}") for edge, count, score in done.by_edge.itertuples()]
    rows.append(("all", len(done.answers), f"{done.rouge1:.3f}"))
    console.print(plain_table(("edge", "questions", "ROUGE-1"), rows, folded=("edge",)))
    say(console, f"the model declines {done.refused:.0%} of questions about invented things")
    say(console, f"checkpoint in {folder}")
    if done.refused < LEAST_REFUSED:
        taught = settings.with_refusals
        advice = "Give more epochs." if taught else "Train with --fix with_refusals=true too."
        warn(
            console,
            "the model does not decline what it cannot know, and LUNAR needs prompts that the "
            f"model declines. {advice}",
        )
    if done.rouge1 >= RETAIN_FLOOR:
        return 0
    warn(
        console,
        f"the model does not know the data: ROUGE-1 {done.rouge1:.3f}, a search needs "
        f"{RETAIN_FLOOR:g}. The last epoch's loss was {done.losses[-1]:.3f}. Try --fix epochs "
        f"above {settings.epochs}, or --fix learning_rate above {settings.rate:g}"
        f"{', or --fix trained=full' if settings.trained != 'full' else ''}.",
    )
    return EXIT_UNKNOWN
