"""Tables on disk: one row a trial, and one row an answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from lunar_tune.files import write_atomically
from lunar_tune.metrics.evaluate import AnswerRow, paired
from lunar_tune.study.rows import TrialRow

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["answers_beside", "read_answers", "write_answers", "write_trials"]

_LOSSES = b"lunar_tune.losses"
_TEXTS = ("question", "truth", "answer")
# Columns that every trials.parquet has, with these types, also where no trial was completed.
_COLUMNS = {
    "number": pa.int64(),
    "state": pa.string(),
    "forget_rouge1": pa.float64(),
    "retain_rouge1": pa.float64(),
    "factual_rouge1": pa.float64(),
    "deviation_score": pa.float64(),
    "objective": pa.float64(),
    "feasible": pa.bool_(),
    "retain_rows": pa.int64(),
    "retain_exact": pa.bool_(),
    "max_new_tokens": pa.int64(),
    "seconds": pa.float64(),
    "started": pa.timestamp("us"),
    "ended": pa.timestamp("us"),
    "failure": pa.string(),
    "again": pa.bool_(),
    "answers_digest": pa.string(),
}


def write_answers(
    path: Path,
    rows: Iterable[AnswerRow],
    losses: Sequence[float],
    *,
    text: bool = True,
) -> str:
    """Write a trial's answers, a row each, and its loss curve; return the file's SHA-256.

    Args:
        path: Where.
        rows: The answers.
        losses: Of the fit.
        text: Whether to keep `question`, `truth` and `answer`; the number in `row` stands for them
            where they are left out.
    """
    left_out = () if text else _TEXTS
    flat = [
        {name: value for name, value in dataclasses.asdict(row).items() if name not in left_out}
        for row in rows
    ]
    table = pa.Table.from_pylist(flat)
    table = table.replace_schema_metadata({_LOSSES: json.dumps(list(losses)).encode()})
    content = _parquet(table)
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def read_answers(path: Path) -> tuple[list[AnswerRow], tuple[float, ...]]:
    """Read what `write_answers` wrote: the answers and the loss curve.

    Texts that were left out are empty.
    """
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    losses = tuple(json.loads(metadata.get(_LOSSES, b"[]")))
    without = dict.fromkeys(_TEXTS, "")
    return [AnswerRow(**(without | row)) for row in table.to_pylist()], losses


def answers_beside(before: Sequence[AnswerRow], after: Sequence[AnswerRow]) -> pd.DataFrame:
    """Return answers beside others to the same questions, in the order of `after`.

    Args:
        before: The base model's answers; what is missing there is empty.
        after: A trial's answers.

    Returns:
        `set`, `edge`, `row`, `question`, `truth`, `unmodified`, `answer`, `rouge1_before`,
        `rouge1`. Texts that were not kept are empty; what the base model was not asked is
        missing.
    """
    import pandas as pd

    pairs = paired(after, before)
    columns = {
        "set": [row.set_name for row in after],
        "edge": [row.edge for row in after],
        "row": pd.array([row.row for row in after], dtype="Int64"),
        "question": [row.question for row in after],
        "truth": [row.truth for row in after],
        "unmodified": [None if other is None else other.answer for _, other in pairs],
        "answer": [row.answer for row in after],
        "rouge1_before": [math.nan if other is None else other.rouge1 for _, other in pairs],
        "rouge1": [row.rouge1 for row in after],
    }
    return pd.DataFrame(columns)


def write_trials(path: Path, rows: Sequence[TrialRow]) -> None:
    """Write `trials.parquet`, a row a trial."""
    flat = [row.flat() for row in rows]
    # The fullest row knows the best order; what it lacks follows.
    names = dict.fromkeys(name for row in sorted(flat, key=len, reverse=True) for name in row)
    columns = {
        name: pa.array([row.get(name) for row in flat], _COLUMNS.get(name))
        for name in (names | dict.fromkeys(_COLUMNS))
    }
    write_atomically(path, _parquet(pa.table(columns)))


def _parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    content: bytes = buffer.getvalue().to_pybytes()
    return content
