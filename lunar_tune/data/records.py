"""One question-answer pair, and a set of them as a digest or a table.

A record, as it stands in a JSON file:

    {"edge": "A_B", "question": "Which goods does Velmora Ltd sell to Tasko Inc?",
     "answer": "Copper kettles."}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

__all__ = ["Record", "records_digest", "records_from_table", "records_table"]

_SCHEMA = pa.schema([(name, pa.string()) for name in ("edge", "question", "answer")])


@dataclass(frozen=True, slots=True)
class Record:
    """One question with its true answer.

    Attributes:
        question: What the model is asked, without any chat template.
        answer: The true answer, against which ROUGE is computed.
        edge: The group the pair belongs to; whole edges are forgotten or retained.
    """

    question: str
    answer: str
    edge: str


def records_digest(records: Iterable[Record]) -> str:
    """Return a SHA-256 in hexadecimal of the records' content and order.

    The same records give the same digest whatever file format they came from.
    """
    digest = hashlib.sha256()
    for record in records:
        # JSON marks where a field ends, so moving text between fields changes the digest.
        line = json.dumps([record.edge, record.question, record.answer])
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()


def records_table(records: Iterable[Record]) -> pa.Table:
    """Return the records as an Arrow table with the string columns edge, question, answer."""
    rows = [
        {"edge": record.edge, "question": record.question, "answer": record.answer}
        for record in records
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def records_from_table(table: pa.Table) -> tuple[Record, ...]:
    """Return the records of a table that `records_table` made, in order.

    A table from elsewhere is read with `readers.read_records`, which checks every row.
    """
    return tuple(Record(**row) for row in table.select(_SCHEMA.names).to_pylist())
