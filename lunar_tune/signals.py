"""Signals that end a program in order, and output that nobody reads any more."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

EXIT_INTERRUPTED = 130
_STDOUT, _STDERR = 1, 2
_NO_READER = {errno.EPIPE, errno.EIO}  # of a pipe, of a terminal
_MOMENT = 0.05  # seconds
_PATIENCE = 4  # presses of Ctrl-C after which an ending that takes too long is given up


def leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    """End the process at once: a handler as long as there is nothing to put back."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


_DEFAULTS = {signal.SIG_DFL, signal.default_int_handler, leave}
_received: list[int] = []  # signals, in their order


def is_interrupted() -> bool:
    """Say whether a signal has ended what is inside of `interrupted_once`.

    Libraries make another error of an interruption, or forget it. No other thread is interrupted.
    """
    return bool(_received) and threading.current_thread() is threading.main_thread()


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Inside, the first Ctrl-C or SIGTERM interrupts, and what ends then is not disturbed.

    What has begun is put back, written and closed: files, tracked runs, Ray's processes. The fourth
    Ctrl-C gives up even that. A terminal that is closed (SIGHUP) does nothing. A signal that
    somebody else handles or ignores, as `nohup` does, is left to them.
    """

    def interrupted(number: int, _frame: FrameType | None) -> None:
        _received.append(number)
        presses = _received.count(signal.SIGINT)
        if len(_received) == 1 or presses >= _PATIENCE:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            more = f"ending; {_PATIENCE - presses} more Ctrl-C to end at once, without cleaning up"
            with suppress(OSError):
                os.write(2, f"{more}\n".encode())

    def again(passed_over: sys.UnraisableHookArgs) -> None:
        """Interrupt a moment later where Python passes over an error, as when a weakref dies."""
        if issubclass(passed_over.exc_type, KeyboardInterrupt):
            number = (_received or [signal.SIGINT])[-1]
            _received.clear()
            main = threading.main_thread().ident
            threading.Timer(_MOMENT, signal.pthread_kill, (main, number)).start()
        else:
            hook(passed_over)

    handlers: dict[int, Callable[[int, FrameType | None], None] | signal.Handlers] = {
        signal.SIGINT: interrupted,
        signal.SIGTERM: interrupted,
        signal.SIGHUP: signal.SIG_IGN,
    }
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in handlers if here}
    before = {number: handler for number, handler in before.items() if handler in _DEFAULTS}
    hook = sys.unraisablehook
    if before:
        sys.unraisablehook = again
    for number in before:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        if before:
            _received.clear()


def heed_again() -> None:
    """Let SIGTERM reach Python's handler again, where C code has put the default in its place."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let an interruption wait for the end of the block, but for the fourth Ctrl-C."""
    waiting: list[int] = []

    def wait(number: int, _frame: FrameType | None) -> None:
        waiting.append(number)
        if waiting.count(signal.SIGINT) >= _PATIENCE:
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, wait) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if waiting:
            signal.raise_signal(waiting[0])


class _Lasting(io.FileIO):
    """Output that raises no error: its reader may be gone, or its disk full."""

    problem: OSError | None = None

    def write(self, content: Any, /) -> int:
        """Write what can be written and drop the rest."""
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in _NO_READER:
                _Lasting.problem = error
            return len(memoryview(content))


def output_problem() -> str | None:
    """Return why output was lost that somebody may read later, as in a file on a full disk."""
    return None if _Lasting.problem is None else _Lasting.problem.strerror


def outlast_outputs() -> None:
    """Let this process go on whether or not anybody reads its output; to be called first."""
    # A number that is free would be that of the next file, into which libraries would print.
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(number)
    for name, number in (("stdout", _STDOUT), ("stderr", _STDERR)):
        given = getattr(sys, name)
        if given is not None and (type(given) is not io.TextIOWrapper or given.fileno() != number):
            continue  # somebody has put another one in its place
        raw = _Lasting(number, "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=given.encoding if given is not None else "utf-8",
            errors="replace",  # a terminal that is not UTF-8 shows a "?"
            line_buffering=given is None or given.line_buffering,
            write_through=given is not None and given.write_through,
        )
        setattr(sys, name, stream)
