"""Running a command: exit codes, and errors as one message instead of a traceback."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.secrets import without_secrets

__all__ = [
    "interrupted_once",
    "reporting_errors",
    "say",
]

_LONGEST = 500  # characters of what is not foreseen; a library's text may hold whole files
logger = logging.getLogger(__name__)
EXIT_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130
# Presses of Ctrl-C after which an ending that takes too long is given up.
_PATIENCE = 4


def say(console: Console, text: str) -> None:
    """Print a line as it stands, however long it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def reporting_errors(*, debug: bool) -> Iterator[None]:
    """Inside, an error on purpose ends the program with one message and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows a "?"
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        with interrupted_once():
            yield
    except LunarTuneError as error:
        _trace(error, wanted=debug)
        console = Console(stderr=True, emoji=False)
        console.print("[bold red]error:[/bold red]", end=" ")
        console.print(without_secrets(str(error)), markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED)
    except Exception as error:
        _trace(error, wanted=debug)
        logger.debug("not expected", exc_info=True)
        _show_unexpected(error, traced=debug)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt as error:
        _trace(error, wanted=debug)
        Console(stderr=True, emoji=False).print("interrupted")
        sys.exit(EXIT_INTERRUPTED)


def _trace(error: BaseException, *, wanted: bool) -> None:
    """Show where an error comes from."""
    if wanted:
        sys.stderr.write(without_secrets("".join(traceback.format_exception(error))))


def _show_unexpected(error: Exception, *, traced: bool) -> None:
    """Say what was not foreseen in one line, and how to learn more."""
    console = Console(stderr=True, emoji=False)
    console.print("[bold red]unexpected error:[/bold red]", end=" ")
    first = without_secrets(next(iter(str(error).splitlines()), ""))
    where = "" if traced else "run the command again with --debug to see where; "
    advice = f"({where}if it is a mistake of the program, please report that)"
    say(console, f"{type(error).__name__}: {first[:_LONGEST]} {advice}")


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
