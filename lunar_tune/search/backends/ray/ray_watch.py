"""Whether the processes of a Ray that was started here are still there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import psutil

from lunar_tune.search.backends.interface import BackendLostError

__all__ = ["watched"]

_NAMES = ("gcs_server", "raylet")
_EVERY_SECONDS = 1.0
# A signal to all processes of the search ends Ray's too; the search then hears of it by itself.
_GRACE_SECONDS = 10.0
_SIGNAL = signal.SIGUSR2


@contextmanager
def watched(
    last_word: Callable[[str], None], processes: Sequence[psutil.Process] | None = None
) -> Iterator[None]:
    """Inside, the end of one of Ray's processes interrupts the main thread.

    Args:
        last_word: Says what has ended, in another thread, where the main thread does not react;
            the process is ended after it.
        processes: They; None looks for them among the children of this process.

    Raises:
        BackendLostError: In the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if processes is None:
        processes = [one for one in psutil.Process().children() if one.name() in _NAMES]
    names = {one: one.name() for one in processes}
    over = threading.Event()
    gone: list[str] = []

    def lost(_signal: int, _frame: FrameType | None) -> None:
        raise BackendLostError(told())

    def told() -> str:
        return f"Ray's {gone[0]} has ended"

    def watch() -> None:
        while not over.wait(_EVERY_SECONDS):
            gone.extend(name for one, name in names.items() if not _lives(one))
            if gone and not over.wait(_GRACE_SECONDS):
                os.kill(os.getpid(), _SIGNAL)
                if not over.wait(_GRACE_SECONDS):
                    last_word(told())
                    os._exit(1)
                return

    before = signal.signal(_SIGNAL, lost)
    watcher = threading.Thread(target=watch, name="ray-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(_SIGNAL, before)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
