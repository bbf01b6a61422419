"""A command: a class of options, and a function that takes an instance of it.

From the fields of the class follow flags, help and checks (`config.fields`); cyclopts reads the
command line and writes the help.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import App, Group, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lunar_tune import __version__
from lunar_tune.config.fields import (
    Option,
    flag_of,
    from_document,
    option,
    options_of,
    same_option,
    types_of,
)
from lunar_tune.config.run_options import ANSWERS, DATA, MEMORY, METHOD, MODEL
from lunar_tune.config.search_config import PLACE, SEARCH, SearchConfig
from lunar_tune.errors import InputError, LunarTuneError, Problems
from lunar_tune.secrets import without_secrets

__all__ = [
    "Command",
    "CommonOptions",
    "Reused",
    "TrialOptions",
    "interrupted_once",
    "plain_table",
    "reporting_errors",
    "say",
    "score_table",
    "warn",
]

SUBJECT, OUTPUT = "Subject", "Output"
GROUPS = (SUBJECT, MODEL, DATA, METHOD, SEARCH, ANSWERS, MEMORY, PLACE, OUTPUT)
"""Headings of the help, in their order; the first is of what a command is about."""
HELP_ALL = "--help-all"
EXIT_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130
_LONGEST = 500  # characters of an unexpected error; a library's text may hold whole files
_PATIENCE = 4  # presses of Ctrl-C after which an ending that takes too long is given up


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every command takes."""

    config: Path | None = option(
        None,
        "Take options from a YAML file, by their names; those of the command line win.",
        OUTPUT,
        metavar="FILE",
        stored=False,
    )
    quiet: bool = option(False, "Show errors only.", OUTPUT, stored=False)
    debug: bool = option(False, "Show tracebacks of errors too.", OUTPUT, stored=False)
    given: Mapping[str, str] = field(default_factory=dict)
    """Where values come from that were not left at their default, by field name."""

    def console(self) -> Console:
        """Return the screen, on which nothing is shown if the command is to be quiet."""
        return Console(quiet=self.quiet, emoji=False)


@dataclass(frozen=True, kw_only=True)
class Reused:
    """What several commands take, each with a help of its own (`same_option`)."""

    json: Path | None = option(None, "Write JSON.", OUTPUT, metavar="FILE", common=True)
    save: Path | None = option(None, "Write files.", OUTPUT, metavar="DIR", common=True)
    dry_run: bool = option(
        False,
        "Check what needs no weights, show the plan, and stop.",
        PLACE,
        common=True,
        stored=False,
    )


@dataclass(frozen=True, kw_only=True)
class TrialOptions(CommonOptions):
    """What a command takes that runs a search's trial again."""

    search: str = option(MISSING, "A search's folder, or its name.", SUBJECT, positional=True)
    trial: int | None = option(
        None, "Number of the trial. Default: the confirmed best.", SUBJECT, common=True
    )
    output: Path = same_option(
        SearchConfig, "output", help="Where names of searches are looked up."
    )
    device: str | None = same_option(
        SearchConfig, "device", default=None, help="cpu, cuda or auto. Default: the search's."
    )


@dataclass(frozen=True)
class Command:
    """A command by name.

    Args:
        run: Takes an instance of `options` and returns the exit code, None for 0. Its name is the
            command's, its docstring the help.
        options: A dataclass that extends `CommonOptions`.
    """

    run: Callable[[Any], int | None]
    options: type[Any]

    def app(self, shown: Literal["common", "all"] | None = None) -> App:
        """Return the command line, where help is asked for with the options that it shows."""
        app = App(
            name=f"lunar-tune {self.run.__name__}",
            help=inspect.getdoc(self.run),
            help_format="markdown",
            version=__version__,
            help_epilogue=f"{HELP_ALL} shows every option." if shown == "common" else None,
            group_commands=Group("Commands", show=False),
            suppress_keyboard_interrupt=False,
        )
        app.default(self._taken(shown))
        return app

    def main(self, arguments: Sequence[str]) -> int:
        """Run the command and return its exit code."""
        given = ["--help" if one == HELP_ALL else one for one in arguments]
        with reporting_errors(debug="--debug" in given):
            if not {"--help", "-h"}.isdisjoint(given):
                app = self.app("all" if HELP_ALL in arguments else "common")
            else:
                app = self.app()
            try:
                values = app(
                    given, exit_on_error=False, print_error=False, result_action="return_value"
                )
            except cyclopts.CycloptsError as error:
                advice = f"(lunar-tune {self.run.__name__} --help)"
                raise InputError(f"{str(error).strip()} {advice}") from error
            if not isinstance(values, dict):  # help or version was shown
                return 0
            origins = dict.fromkeys(values, "command line")
            if (file := values.get("config")) is not None:
                stated = self._from_file(file)
                origins = dict.fromkeys(stated, str(file)) | origins
                values = {**stated, **values}
            problems = Problems()
            for name, said in options_of(self.options).items():
                if name not in values and self._default(name) is MISSING:
                    written = name.upper() if said.positional else flag_of(name)
                    problems.add(f"{written} is needed: {said.help}")
            problems.raise_if_any()
            return self.run(self.options(**values, given=origins)) or 0

    def _from_file(self, file: Path) -> dict[str, Any]:
        from lunar_tune.yaml_files import read_yaml

        document = read_yaml(file)
        if isinstance(options := document.get("options"), dict):  # what a search has kept
            known = options_of(self.options)
            document = {
                name: entry["value"]
                for name, entry in options.items()
                if isinstance(entry, dict)
                and entry.get("origin") not in {"default", "derived"}
                and (name not in known or known[name].stored)
            }
        return from_document(self.options, document, source=str(file))

    def _taken(self, shown: str | None) -> Callable[..., dict[str, Any]]:
        """Return a function whose signature is the options, each None where it is not given."""
        kinds = types_of(self.options)
        parameters = [
            self._parameter(name, said, kinds[name], shown)
            for name, said in options_of(self.options).items()
        ]
        signature = inspect.Signature(sorted(parameters, key=lambda one: one.kind))

        def take(*positional: Any, **values: Any) -> dict[str, Any]:
            bound = signature.bind(*positional, **values).arguments
            given = {name: value for name, value in bound.items() if value not in (None, ())}
            return from_document(self.options, given)

        take.__signature__ = signature  # type: ignore[attr-defined]
        take.__annotations__ = {one.name: one.annotation for one in parameters}
        return take

    def _parameter(
        self, name: str, said: Option, kind: Any, shown: str | None
    ) -> inspect.Parameter:
        default, off = self._default(name), f"--no-{name.replace('_', '-')}"
        # In the help a switch has one form, the one that changes something.
        flag = off if shown and default is True else flag_of(name)
        text = ", ".join(default) if isinstance(default, tuple) else str(default)
        has_text = default not in (None, (), False, True, MISSING)
        several = "tuple" in str(kind)
        metavar = f"{said.metavar} …" if several and not said.commas else said.metavar
        parameter = Parameter(
            name=None if said.positional else flag,
            help=said.help,
            group=Group(said.group, sort_key=GROUPS.index(said.group)),
            show=said.common or said.positional or shown != "common",
            negative=off if kind is bool and not shown else (),
            show_default=(lambda _: text) if has_text else False,
            metavar=None if said.positional else metavar,
            consume_multiple=False,
            allow_repeating=None if several else True,
        )
        if said.positional and several:
            rest = inspect.Parameter.VAR_POSITIONAL
            return inspect.Parameter(name, rest, annotation=Annotated[str, parameter])
        by_place, by_name = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(
            name,
            by_place if said.positional else by_name,
            default=None,
            annotation=Annotated[kind | None, parameter],
        )

    def _default(self, name: str) -> Any:
        return self.options.__dataclass_fields__[name].default


def say(console: Console, text: str) -> None:
    """Print a line as it stands, however long it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(console: Console, text: str) -> None:
    """Print a warning."""
    console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def plain_table(
    columns: Sequence[str],
    rows: Iterable[Iterable[object]],
    *,
    left: Collection[str] = ("",),
    folded: Collection[str] = (),
) -> Table:
    """Return a table without lines, its texts shown as they stand.

    Columns named in `left` hold texts, as do those in `folded`, which may be folded on a narrow
    screen; all others hold numbers.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_text = column in left or column in folded
        table.add_column(
            column,
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=column not in folded,
        )
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def score_table(rows: Mapping[str, Sequence[str]]) -> Table:
    """Return the headline scores of several models as a table."""
    columns = ("", "forget", "retain", "factual", "deviation score")
    return plain_table(columns, ((who, *cells) for who, cells in rows.items()))


@contextmanager
def reporting_errors(*, debug: bool) -> Iterator[None]:
    """Inside, an error ends the program with one message and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows a "?"
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        with interrupted_once():
            yield
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            sys.stderr.write(without_secrets("".join(traceback.format_exception(error))))
        console = Console(stderr=True, emoji=False)
        if isinstance(error, KeyboardInterrupt):
            console.print("interrupted")
            sys.exit(EXIT_INTERRUPTED)
        if isinstance(error, LunarTuneError):
            console.print("[bold red]error:[/bold red]", end=" ")
            say(console, without_secrets(str(error)))
            sys.exit(EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED)
        console.print("[bold red]unexpected error:[/bold red]", end=" ")
        first = without_secrets(next(iter(str(error).splitlines()), ""))[:_LONGEST]
        where = "" if debug else "run the command again with --debug to see where; "
        advice = f"({where}if it is a mistake of the program, please report that)"
        say(console, f"{type(error).__name__}: {first} {advice}")
        sys.exit(EXIT_FAILED)


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Inside, the first Ctrl-C interrupts, and the next ones do not disturb what ends then.

    What has begun is put back, written and closed: files, tracked runs, Ray's processes. The fourth
    press gives up even that.
    """
    before = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()
    if not here or before is not signal.default_int_handler:
        yield  # somebody else has decided what an interruption does, or that it does nothing
        return
    presses = 0

    def interrupted(_signal: int, _frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses in {1, _PATIENCE}:
            raise KeyboardInterrupt
        if presses < _PATIENCE:
            more = _PATIENCE - presses
            os.write(2, f"ending; {more} more to end at once, whatever is left open\n".encode())

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
