"""A limit on how long a task may take, kept by the worker itself.

It works while Python itself is stuck in a library: `faulthandler` has a thread of its own that
needs no interpreter lock.
"""

from __future__ import annotations

import faulthandler
import tempfile
from pathlib import Path
from typing import IO

from lunar_tune.study.folder import Folder

__all__ = ["Watchdog", "crash_reason"]

IN_FULL = 10
"""How many times as long as a trial the tasks may take that ask every question to its end."""


class Watchdog:
    """Ends this process when a task takes too long.

    Args:
        folder: Of the search; where it is not on this machine, what the process was doing stays in
            the temporary folder.
        limit: Seconds that a trial may take; None watches nothing.
    """

    def __init__(self, folder: Folder, limit: float | None) -> None:
        here = folder if folder.path.is_dir() else Folder(Path(tempfile.gettempdir()))
        self._folder, self._limit = here, limit
        self._file: IO[str] | None = None
        self._path: Path | None = None

    def begin(self, number: int, full: bool) -> None:
        """Watch a part of a task from now on.

        Args:
            number: Of its trial.
            full: Whether it asks every question to its end.
        """
        self.end()
        if self._limit is None:
            return
        limit = self._limit * (IN_FULL if full else 1)
        self._path = self._folder.stack(number)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        told = f"{IN_FULL} times --trial-timeout" if full else "--trial-timeout"
        self._file.write(f"took longer than {limit:g} s ({told})\n")
        self._file.flush()
        faulthandler.dump_traceback_later(limit, exit=True, file=self._file)

    def end(self) -> None:
        """Watch no longer: the task has ended."""
        if self._file is None or self._path is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._path.unlink(missing_ok=True)
        self._file = self._path = None


def crash_reason(folder: Folder, number: int, error: str) -> str:
    """Return why a task's worker was lost: what its watchdog left, or what Ray says.

    Args:
        folder: Of the search.
        number: Of the trial.
        error: What Ray says.
    """
    path = folder.stack(number)
    try:
        first, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    except OSError:
        return error
    # A worker that was killed before its limit leaves the file without a stack.
    return f"{first}; what it was doing is in {path.name}" if rest.strip() else error
