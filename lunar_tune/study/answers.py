"""Tables on disk: a file of answers an evaluation, and `trials.parquet`, a row a trial.

trials/00007.parquet  set_name  edge  row  question  truth  answer  rouge1  rouge_l  ended
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from lunar_tune.errors import InputError
from lunar_tune.files import write_atomically
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.study.rows import HEADLINE_SCORES, TrialRow

if TYPE_CHECKING:
    from lunar_tune.trial.worker import TrialResult  # loads torch

__all__ = ["read_answers", "write_answers", "write_result", "write_trials"]

_LOSSES = b"lunar_tune.losses"
_TEXTS = ("question", "truth", "answer")
# Columns that every trials.parquet has, with these types, also where no trial was completed.
_COLUMNS = {
    **dict.fromkeys(("number", "retain_rows", "max_new_tokens"), pa.int64()),
    **dict.fromkeys((*HEADLINE_SCORES, "objective", "seconds"), pa.float64()),
    **dict.fromkeys(("feasible", "retain_exact", "again"), pa.bool_()),
    **dict.fromkeys(("state", "failure", "answers_digest"), pa.string()),
    **dict.fromkeys(("started", "ended"), pa.timestamp("us")),
}


def write_result(path: Path, result: TrialResult, *, text: bool = True) -> str:
    """Write the answers of an evaluation as `write_answers` does; return the file's SHA-256."""
    return write_answers(path, result.evaluation.rows, result.losses, text=text)


def write_answers(
    path: Path, rows: Iterable[AnswerRow], losses: Sequence[float], *, text: bool = True
) -> str:
    """Write answers, and the losses of each epoch before them; return the file's SHA-256.

    Without `text`, the number in `row` stands for `question`, `truth` and `answer`.
    """
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in rows])
    if not text:
        table = table.drop_columns([name for name in _TEXTS if name in table.column_names])
    table = table.replace_schema_metadata({_LOSSES: json.dumps(list(losses)).encode()})
    content = _parquet(table)
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def read_answers(path: Path) -> list[AnswerRow]:
    """Read a file of answers; texts that were left out are empty.

    Raises:
        InputError: It is damaged, or holds something else.
    """
    without = dict.fromkeys(_TEXTS, "")
    try:
        return [AnswerRow(**(without | row)) for row in pq.read_table(path).to_pylist()]
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise InputError(f"{path}: is damaged, or holds no answers ({reason}).") from error


def write_trials(path: Path, rows: Sequence[TrialRow]) -> None:
    """Write `trials.parquet`, a row a trial."""
    flat = [row.flat() for row in rows]
    # The fullest row knows the best order; what it lacks follows.
    names = dict.fromkeys(name for row in sorted(flat, key=len, reverse=True) for name in row)
    columns = {
        name: pa.array([row.get(name) for row in flat], _COLUMNS.get(name))
        for name in names | dict.fromkeys(_COLUMNS)
    }
    write_atomically(path, _parquet(pa.table(columns)))


def _parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    content: bytes = buffer.getvalue().to_pybytes()
    return content
