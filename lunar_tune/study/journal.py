"""The file of a study, and whether what it says can be what a search has written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lunar_tune.study.rows import COMPLETE, TrialRow

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from lunar_tune.metrics.goal import Goal


_ROUNDING = 1e-9  # of a logarithm and back


def open_journal(path: Path) -> JournalStorage:
    """Return a journal as Optuna's storage; it is made if missing."""
    return JournalStorage(_Journal(path))


def studies_in(path: Path) -> list[optuna.Study]:
    """Return the studies of a journal."""
    storage = open_journal(path)
    names = optuna.get_all_study_names(storage)
    return [optuna.load_study(study_name=name, storage=storage) for name in names]


def repeats_itself(path: Path) -> bool:
    """Say whether the end of a trial, to the microsecond, is written twice: it was pasted."""
    ends = [line for line in path.read_bytes().splitlines() if b'"op_code":6,' in line]
    return len({*ends}) < len(ends)


def mistakes_in(
    rows: Sequence[TrialRow],
    goal: Goal,
    distributions: Mapping[int, Mapping[str, BaseDistribution]],
    table: Mapping[int, str],
) -> Iterator[str]:
    """Say what no search has written: of trials, with what each was drawn from, and of their table.

    The table is made of the journal when a search ends: digests of answers by number of the trial.
    """
    known = {row.number: row.answers_digest for row in rows}
    if lacking := [number for number, digest in table.items() if known.get(number) != digest]:
        yield (
            f"trials.parquet has the answers of {len(lacking)} trials (the first is {lacking[0]}) "
            "that the journal does not know, or knows otherwise"
        )
    for row in rows:
        for name, value in row.parameters.items():
            kind: Any = distributions[row.number][name]
            low, high = getattr(kind, "low", value), getattr(kind, "high", value)
            if low != high and not low - _ROUNDING * abs(low) <= value <= high + _ROUNDING * abs(
                high
            ):
                yield f"trial {row.number}: {name} is {value}, outside {low} … {high}"
        if row.state == COMPLETE:
            objective = goal.value(row.scores)
            told = math.nan if row.objective is None else row.objective
            scores = (told, objective, *goal.violations(row.scores).values())
            if not all(map(math.isfinite, scores)):
                yield f"trial {row.number}: a score is not a finite number"
            elif not math.isclose(told, objective, abs_tol=_ROUNDING):
                yield f"trial {row.number}: its objective is not that of its scores"


class _Journal(JournalFileBackend):
    """Optuna's journal with a lock that the system takes back from a process that dies.

    Optuna's own locks are files that a killed process leaves; they are waited for 30 seconds.
    A journal is JSON, a line a change, and nothing of it is unpickled (snapshots are, which files
    have none of; CMA-ES keeps its own state so, and is not offered here). Reading takes no lock.
    """

    def __init__(self, path: Path) -> None:
        # Optuna asks a lock to acquire and release; the base class of its own is not public.
        lock: Any = FileLock(path.with_name(f".{path.name}.lock"))
        super().__init__(str(path), lock)
        self._path, self._alone = path, lock

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines; a last one that a kill or a full disk has torn is cut off first.

        Optuna 5.0 cannot read past such a line, and every later read would raise. It is looked for
        before every writing: a disk that was full for one line may have room for the next.
        """
        with self._alone:
            with self._path.open("r+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                if file.read() not in {b"", b"\n"}:
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            super().append_logs(logs)
