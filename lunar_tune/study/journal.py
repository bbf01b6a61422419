"""Optuna's journal as a file: opened, locked, mended, read, and refused where it is damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

from lunar_tune.errors import InputError

__all__ = ["open_journal", "read_journal", "reading"]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, whatever a damaged journal leads to is an `InputError`.

    A journal is JSON, a line a change, and Optuna unpickles nothing of it (snapshots are, which
    files have none of; CMA-ES keeps its own state so, and is not offered here). It trusts the lines
    and stumbles over them in any way.

    Raises:
        InputError: Optuna could not read it.
    """
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise InputError(
            f"{path}: is damaged, or not the journal of a search ({type(error).__name__}: "
            f"{reason}). Take it from a copy, or name another search."
        ) from error


def open_journal(path: Path) -> JournalStorage:
    """Open a journal for writing; a last line that a kill or a full disk has torn is cut off first.

    Optuna 5.0 cannot read past such a line, and every later read would raise. It is looked for
    before every writing: a disk that was full for one line may have room for the next.
    """
    lock = _JournalLock(path)
    lock.acquire()
    lock.release()
    # Optuna asks a lock for no more than these two methods; its base class is not public.
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]


def read_journal(path: Path) -> JournalStorage:
    """Return a journal as it stands: it is read at once, and nothing beside it is touched.

    No lock is needed: whoever writes adds whole lines, and one that is not whole yet is left out.
    """
    return JournalStorage(_Lines(path))


class _Lines(BaseJournalBackend):
    """The whole lines of a journal, in memory."""

    def __init__(self, path: Path) -> None:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        self._logs: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """Return the lines from a number on."""
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Refuse: what is read here is not written."""
        raise TypeError(f"{len(logs)} lines for a journal that was opened for reading")


class _JournalLock:
    """A journal's lock, which the system takes back from a process that dies.

    Optuna's own are files that a killed process leaves; they are waited for 30 seconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))

    def acquire(self) -> bool:
        """Wait for the lock; then the journal ends with a whole line."""
        self._lock.acquire()
        try:
            _cut_torn_line(self._path)
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        """Give it to who waits."""
        self._lock.release()


def _cut_torn_line(path: Path) -> None:
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
