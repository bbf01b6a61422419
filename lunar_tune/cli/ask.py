"""The command `lunar-tune ask`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lunar_tune.cli.commands import Command, TrialOptions
from lunar_tune.config.fields import option, same_option
from lunar_tune.config.options import SUBJECT, Reused, RunOptions
from lunar_tune.display import say, screen
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import decoded, write_json

if TYPE_CHECKING:
    from lunar_tune.trial.single import SideBySide

_MOST = 10_000_000  # bytes of questions


@dataclass(frozen=True, kw_only=True)
class AskOptions(TrialOptions):
    """What the command takes."""

    questions: tuple[str, ...] = option((), group=SUBJECT, positional=True)
    """What to ask; without one, questions are read from the terminal, or a line each from standard
    input."""
    max_new_tokens: int = same_option(RunOptions, "max_new_tokens", default=128, common=True)
    """Token budget of an answer."""
    json: Path | None = same_option(Reused, "json")
    """Write questions and answers as JSON."""


@Command
def ask(options: AskOptions, problems: Problems) -> None:
    """Ask the base model and the unlearned model the same questions.

    The setting of the search's best trial, or of any other, is fitted once; then both models answer
    greedily, in the search's chat format. A question of the data comes with its true answer.

    `lunar-tune ask NAME 'Which goods does the seller deliver?'`

    Without a question, questions are asked for until an empty line or Ctrl-D. `--quiet` silences
    all but the answers.
    """
    console = options.console
    answered = screen()  # also when quiet: answers are what was asked for
    if not all(question.strip() for question in options.questions):
        problems.add("a question is empty.")
    with options.working("reading the search"), problems.collect():
        from lunar_tune.export.export_job import assemble_again
        from lunar_tune.report.results import SearchResults
        from lunar_tune.trial.assemble import materialise
        from lunar_tune.trial.single import asking

        results = SearchResults.read(options.search, runs=options.output)
        with problems.collect():
            row = results.trial(options.trial)
        with problems.collect():
            spec = assemble_again(
                results,
                problems,
                device=options.device,
                trust_remote_code=options.trusted,
            )
    problems.raise_if_any()
    is_typed = not options.questions and sys.stdin.isatty()
    batches = _typed() if is_typed else [options.questions or _piped()]
    asked: list[SideBySide] = []
    spec = materialise(spec, console)
    try:
        with contextlib.ExitStack() as held:
            with console.status("loading the model and unlearning"):
                epochs, budget = len(row.losses) or None, options.max_new_tokens
                fitted = asking(spec, row.parameters, epochs=epochs, max_new_tokens=budget)
                ask_both = held.enter_context(fitted)
            say(console, f"trial {row.number}: {row.label}")
            for questions in batches:
                for one in ask_both(questions):
                    asked.append(one)
                    answered.print(_answers(one, with_question=not is_typed))
                    answered.print()
    finally:
        if options.json is not None and asked:
            document = {
                "search": results.folder.name,
                "trial": row.number,
                "parameters": dict(row.parameters),
                "max_new_tokens": options.max_new_tokens,
                "answers": [dataclasses.asdict(one) for one in asked],
            }
            write_json(options.json, document)
            say(console, f"answers written to {options.json}")


def _piped() -> list[str]:
    """Return the questions on standard input, a line each, whatever encoding a mark says."""
    content = sys.stdin.buffer.read(_MOST + 1)
    if len(content) > _MOST:
        raise InputError(f"standard input: is longer than the {_MOST:,} bytes that are read")
    text, _ = decoded(content, "standard input")
    questions = [line.strip() for line in text.split("\n") if line.strip()]
    if not questions:
        raise InputError(
            "no question: give it after the search, or a line each on standard input; in a "
            "terminal you are asked for it."
        )
    return questions


def _typed() -> Iterator[list[str]]:
    """Yield one question after the other that is typed, until an empty line or end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 lines can be edited and called back
    try:
        while question := input("question: ").strip():
            yield [question]
    except EOFError:
        sys.stdout.write("\n")


def _answers(one: SideBySide, *, with_question: bool) -> Table:
    """Return one question's answers, below each other."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [("question", one.question)] if with_question else []
    rows += [("base model", one.base_model), ("unlearned model", one.unlearned)]
    if one.truth is not None:
        rows.append(("true answer", f"{one.truth} ({one.set_name})"))
    for label, text in rows:
        table.add_row(label, Text(text))
    return table
