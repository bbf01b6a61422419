"""The command `lunar-tune ask`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lunar_tune.cli.commands import SUBJECT, Command, CommonOptions, Given, Reused
from lunar_tune.cli.running import say
from lunar_tune.config.fields import option, same_option
from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError, Problems
from lunar_tune.paths import check_writable_file
from lunar_tune.report.progress_bars import build_progress, epochs_shown

if TYPE_CHECKING:
    from lunar_tune.report.results import SearchResults
    from lunar_tune.study.rows import TrialRow
    from lunar_tune.trial.asking import SideBySide
    from lunar_tune.trial.spec import TrialSpec

_PROMPT = "question: "


@dataclass(frozen=True, kw_only=True)
class AskOptions(CommonOptions):
    """What the command takes."""

    search: str = option(MISSING, "A search's folder or name.", SUBJECT, positional=True)
    questions: tuple[str, ...] = option(
        (),
        "What to ask; without one, questions are read from the terminal, or a line each from "
        "standard input.",
        SUBJECT,
        positional=True,
    )
    trial: int | None = same_option(
        Reused, "trial", help="Number of the trial. Default: the confirmed best."
    )
    max_new_tokens: int = same_option(
        RunOptions, "max_new_tokens", default=128, help="Token budget of an answer.", common=True
    )
    device: str | None = same_option(
        RunOptions, "device", default=None, help="cpu, cuda or auto. Default: the search's."
    )
    output: Path = same_option(
        SearchConfig, "output", help="Where names of searches are looked up."
    )
    json: Path | None = same_option(Reused, "json", help="Write questions and answers as JSON.")


def ask(options: AskOptions, _: Given) -> None:
    """Ask the unmodified and the unlearned model, side by side.

    The setting of the search's best trial, or of any other, is fitted once; then both models answer
    greedily, in the search's chat format. A question of the data comes with its true answer.

    `lunar-tune ask NAME 'Which goods does the seller deliver?'`

    Without a question one is asked for until an empty line or Ctrl-D. `--quiet` silences all but
    the answers.
    """
    console, problems = Console(quiet=options.quiet, emoji=False), Problems()
    answered = Console(emoji=False)  # also when quiet: answers are what was asked for
    results, row, spec = _checked(
        options.search,
        options.trial,
        options.output,
        options.device,
        problems,
        questions=options.questions,
        max_new_tokens=options.max_new_tokens,
        json_file=options.json,
    )
    interactive = not options.questions and sys.stdin.isatty()
    given = options.questions or ([] if interactive else _piped())
    asked: list[SideBySide] = []
    try:
        with _asking(spec, row, console, options.max_new_tokens) as answers:
            if not interactive:
                asked += answers(given)
                answered.print(_table(asked))
            for question in _typed() if interactive else ():
                asked += answers([question])
                answered.print(_one(asked[-1]))
    finally:
        if options.json is not None and asked:
            _write(options.json, results, row, asked, options.max_new_tokens)
            say(console, f"answers written to {options.json}")


def _checked(
    search: str,
    trial: int | None,
    runs: Path,
    device: str | None,
    problems: Problems,
    *,
    questions: Sequence[str],
    max_new_tokens: int,
    json_file: Path | None,
) -> tuple[SearchResults, TrialRow, TrialSpec]:
    """Return the search, the trial and what trials share, or say everything that is wrong."""
    from lunar_tune.report.results import load_search
    from lunar_tune.search.resume import check_same_data
    from lunar_tune.trial.asking import check_asked_tokens, check_questions
    from lunar_tune.trial.assemble import assemble

    results = row = spec = None
    with problems.collect():
        check_asked_tokens(max_new_tokens)
    with problems.collect():
        check_questions(questions)
    with problems.collect():
        check_writable_file(json_file, "--json")
    with problems.collect():
        results = load_search(search, runs=runs)
    if results is not None:
        with problems.collect():
            row = results.trial(trial)
        with problems.collect():
            options = results.config.trial_options
            if device is not None:
                options = dataclasses.replace(options, device=device)
            spec = assemble(options)
            check_same_data(results, spec)
    problems.raise_if_any()
    if results is None or row is None or spec is None:
        raise AssertionError("every None above comes with a noted problem")
    return results, row, spec


@contextlib.contextmanager
def _asking(
    spec: TrialSpec, row: TrialRow, console: Console, max_new_tokens: int
) -> Iterator[Callable[[Sequence[str]], list[SideBySide]]]:
    """Inside, both models answer; load and fit them first."""
    from lunar_tune.trial.asking import asking
    from lunar_tune.trial.assemble import materialise

    with build_progress(console) as bar:
        ready = materialise(spec, epochs_shown(bar, "building the tiny model (once)"))
    with contextlib.ExitStack() as held:
        with console.status("loading the model and unlearning"):
            asker = held.enter_context(
                asking(
                    ready,
                    row.parameters,
                    epochs=len(row.losses) or None,
                    max_new_tokens=max_new_tokens,
                )
            )
        say(console, f"trial {row.number}: {row.label}")
        yield asker.ask


def _piped() -> list[str]:
    """Return the questions on standard input, a line each.

    Raises:
        InputError: There is none.
    """
    questions = [line.strip() for line in sys.stdin if line.strip()]
    if not questions:
        raise InputError(
            "no question: give it after the search, or a line each on standard input; in a "
            "terminal you are asked for it."
        )
    return questions


def _typed() -> Iterator[str]:
    """Yield what is typed at the prompt until an empty line or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 lines can be edited and called back
    while True:
        try:
            question = input(_PROMPT).strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        if not question:
            return
        yield question


def _table(asked: Sequence[SideBySide]) -> Table:
    """Return all answers as one table."""
    table = Table(show_lines=True, header_style="bold")
    known = any(one.truth is not None for one in asked)
    columns = ["question", "unmodified", "unlearned", *(["true answer", "set"] if known else [])]
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "set")
    for one in asked:
        cells = [one.question, one.unmodified, one.unlearned]
        cells += [one.truth or "", one.set_name or ""] if known else []
        table.add_row(*map(_shown, cells))
    return table


def _one(one: SideBySide) -> Table:
    """Return one question's answers, below each other."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("unmodified", _shown(one.unmodified))
    table.add_row("unlearned", _shown(one.unlearned))
    if one.truth is not None:
        table.add_row("true answer", _shown(f"{one.truth} ({one.set_name})"))
    return table


def _shown(text: str) -> Text:
    """Return text as it stands, with control characters, which a model may say, made visible."""
    visible = (
        repr(sign)[1:-1] if unicodedata.category(sign) == "Cc" and sign != "\n" else sign
        for sign in text
    )
    return Text("".join(visible))


def _write(
    path: Path,
    results: SearchResults,
    row: TrialRow,
    asked: Sequence[SideBySide],
    max_new_tokens: int,
) -> None:
    from lunar_tune.files import write_atomically

    document: dict[str, Any] = {
        "search": results.folder.name,
        "trial": row.number,
        "parameters": dict(row.parameters),
        "max_new_tokens": max_new_tokens,
        "answers": [dataclasses.asdict(one) for one in asked],
    }
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


COMMAND = Command(ask, AskOptions)
