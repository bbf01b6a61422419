"""The command `lunar-tune collect`: data from what a model itself knows."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.cli.commands import Command, CommonOptions, plain_table
from lunar_tune.config.fields import option, same_option, shared_options
from lunar_tune.config.options import (
    COLLECTED_TOKENS,
    DATA,
    DECLINED,
    NONE,
    OWN_QUESTIONS,
    ModelOptions,
    Reused,
    RunOptions,
)
from lunar_tune.data.splits import edges_of
from lunar_tune.display import printable, say, warn
from lunar_tune.errors import Problems
from lunar_tune.files import check_writable, write_json

if TYPE_CHECKING:
    from lunar_tune.trial.collecting import Collected, Collection

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class CollectOptions(ModelOptions, CommonOptions):
    """What the command takes."""

    questions: str = option(OWN_QUESTIONS, group=DATA, common=True, place=True)
    """Questions with edges, whose answers are not read: general, or a file."""
    edge: str | None = same_option(RunOptions, "edge")
    reference_prompts: str = same_option(
        RunOptions, "reference_prompts", default="private", common=True
    )
    """Prompts of which those are kept that the model declines: private, unverifiable, harmful, a
    file, or none."""
    refusals: str = same_option(RunOptions, "refusals")
    max_new_tokens: int = same_option(
        RunOptions, "max_new_tokens", default=COLLECTED_TOKENS, common=True
    )
    """Token budget of an answer; a question whose answer does not end within is left out."""
    rouge_tokenizer: str = same_option(RunOptions, "rouge_tokenizer")
    save: Path | None = same_option(Reused, "save")
    """Folder for pairs.json and references.json."""


@Command
def collect(options: CollectOptions, problems: Problems) -> None:
    """Make data of what a model knows by itself, to unlearn without fine-tuning.

    The model is asked. Its own answers, as far as they end by themselves, are the truth that it is
    to forget or to keep, right or wrong; the prompts that it declines are the reference prompts. A
    search whose data are `general`, as for most models is the default, does so by itself. What was
    answered before is kept, and used.

    `lunar-tune collect --model smollm2-135m --save knows`

    `lunar-tune collect --model qwen2.5-7b --questions my_questions.json --save knows`
    """
    console, prompts = options.console, tuple[str, ...]()
    with options.working("reading questions") as doing:
        from lunar_tune.trial.assemble import assemble_collection, materialise
        from lunar_tune.trial.spec import read_prompts_of

        with problems.collect():
            if options.reference_prompts != NONE:
                prompts = read_prompts_of(options.reference_prompts)
        with problems.collect():
            if options.save is not None:
                check_writable(options.save, f"--save {options.save}")
        run = shared_options(options, RunOptions, without={"max_new_tokens"})
        run = replace(run, data=options.questions)
        job = assemble_collection(run, problems, max_new_tokens=options.max_new_tokens)
        doing("loading torch")
        from lunar_tune.models.loading import load_model
        from lunar_tune.training.answer_loss import Encoder
        from lunar_tune.trial.collecting import ensure_collected
        from lunar_tune.trial.references import ask_references
    job = materialise(job, console)
    with console.status(f"loading {job.model.name}"):
        loaded = load_model(job.model, job.chat)
    found = ensure_collected(job, console, loaded)
    _show(job, found, console)
    declined = tuple[str, ...]()
    if prompts:  # as a search asks them
        encoder = Encoder(loaded, job.chat.of_fit)
        asked = ask_references(encoder, prompts, job.refusals, console=console)
        asked.show(console, DECLINED)
        declined = asked.chosen(prompts, DECLINED)
        if (problem := asked.problem(DECLINED)) is not None:
            warn(console, problem)
    pairs, references = job.kept_file(), options.reference_prompts
    if options.save is not None:
        pairs = options.save / "pairs.json"
        write_json(pairs, list(map(asdict, found.records)))
        if declined:
            references = str(options.save / "references.json")
            write_json(Path(references), [{"instruction": prompt} for prompt in declined])
    say(console, f"pairs written to {pairs}")
    _next(options, job, found, console, pairs=str(pairs), references=references)


def _show(job: Collection, found: Collected, console: Console) -> None:
    """Show what was asked and kept by edge, and a few answers."""
    from lunar_tune.trial.collecting import LEFT_OUT

    kept = edges_of(found.records)
    lost = Counter((record.edge, reason) for record, reason in found.left_out)
    reasons = [reason for reason in LEFT_OUT if any(reason == why for _, why in lost)]
    rows = [
        (edge, asked, kept.get(edge, 0), *(lost[edge, reason] for reason in reasons))
        for edge, asked in edges_of(job.questions).items()
    ]
    if len(rows) > 1:
        rows.append(("all", *map(sum, zip(*(row[1:] for row in rows), strict=True))))
    console.print(plain_table(("edge", "asked", "kept", *reasons), rows, folded=("edge",)))
    for record in found.records[:: max(1, len(found.records) // _SHOWN)][:_SHOWN]:
        say(console, f"  {printable(record.question)} {printable(record.answer)}")


def _next(
    options: CollectOptions,
    job: Collection,
    found: Collected,
    console: Console,
    *,
    pairs: str,
    references: str,
) -> None:
    """Show the command that searches on the data, if one can."""
    from lunar_tune.trial.collecting import asking_options
    from lunar_tune.trial.spec import DEFAULT_EDGES

    edges = edges_of(found.records)
    if len(edges) < 2:
        warn(console, "all pairs have one edge, and a search keeps another: ask for more.")
        return
    default = next((edge for edge in DEFAULT_EDGES if edge in edges), None)
    command = [sys.executable, "-m", "lunar_tune.search", *asking_options(options)]
    usual = options.questions == OWN_QUESTIONS and job.max_new_tokens == COLLECTED_TOKENS
    if options.save is not None or not usual:
        command += ["--data", pairs, "--factual-data", NONE]
        if references != NONE:
            command += ["--reference-prompts", references]
    if default is None:
        command += ["--forget-edge", next(iter(edges))]
    say(console, f"search what makes it forget an edge:\n  {shlex.join(command)}")
