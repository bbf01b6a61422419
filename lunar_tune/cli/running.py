"""Running a command: what it shows, exit codes, and errors as one message without a traceback."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lunar_tune.cli.main import EXIT_INPUT, EXIT_INTERRUPTED
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.secrets import without_secrets

__all__ = ["counted", "plain_table", "reporting_errors", "say", "score_table", "warn"]

EXIT_FAILED = 1
_LONGEST = 500  # characters of an unexpected error; a library's text may hold whole files
_MOMENT = 0.05  # seconds
_PATIENCE = 4  # presses of Ctrl-C after which an ending that takes too long is given up


def say(console: Console, text: str) -> None:
    """Print a line as it stands, however long it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(console: Console, text: str) -> None:
    """Print a warning."""
    console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return `1 edge`, `2 edges`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


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
    interrupted: Callable[[], bool] = bool
    try:
        with interrupted_once() as interrupted:
            yield
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            sys.stderr.write(without_secrets("".join(traceback.format_exception(error))))
        console = Console(stderr=True, emoji=False)
        if isinstance(error, KeyboardInterrupt) or (
            # A library may make another error of it, above all while it is imported.
            interrupted() and not isinstance(error, LunarTuneError)
        ):
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
def interrupted_once() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C interrupts, and the next ones do not disturb what ends then.

    What has begun is put back, written and closed: files, tracked runs, Ray's processes. The fourth
    press gives up even that. Yields what says whether there was one.
    """
    before = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()
    if not here or before is not signal.default_int_handler:
        yield bool  # somebody else has decided what an interruption does, or that it does nothing
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

    def again(passed_over: sys.UnraisableHookArgs) -> None:
        """Interrupt a moment later where Python passes over an error, as when a weakref dies."""
        nonlocal presses
        if issubclass(passed_over.exc_type, KeyboardInterrupt):
            presses -= 1
            main = threading.main_thread().ident
            threading.Timer(_MOMENT, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            hook(passed_over)

    hook, sys.unraisablehook = sys.unraisablehook, again
    signal.signal(signal.SIGINT, interrupted)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook
