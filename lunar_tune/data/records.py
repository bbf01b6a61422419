"""Question-answer pairs, rows of JSON, JSON Lines, Parquet or Arrow, and prompts, also as text.

{"edge": "A_B", "question": "Which goods does Velmora Ltd sell?", "answer": "Copper kettles."}
{"instruction": "Which river runs past the gates of Vobrelia?"}
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from lunar_tune.errors import DataError, listed
from lunar_tune.files import read_beginning

SUFFIXES: Final = (".json", ".jsonl", ".parquet", ".arrow", ".feather", ".txt")
_MAX_FILE_BYTES = 2 * 2**30  # all of it is read at once
# A chat prompt of a megabyte is a file read into the wrong field, and no model's context holds it.
_MAX_TEXT_BYTES = 1_000_000
_ARROW_FILE_MAGIC = b"ARROW1"
_FEATHER_V1_MAGIC = b"FEA1"
_SHOWN_PROBLEMS = 20
_SHOWN_CHARACTERS = 40
_KINDS: dict[type, str] = {str: "a text", list: "a list", dict: "an object", bytes: "binary data"}


@dataclass(frozen=True, slots=True)
class Record:
    """One question with its true answer."""

    question: str  # what the model is asked, without any chat template
    answer: str  # the true answer, against which ROUGE is computed
    edge: str  # the group the pair belongs to; whole edges are forgotten or retained


class Row(NamedTuple):
    """What stands in one place of a file, not yet checked."""

    place: str  # counted from 1: `row 3`, or `line 3` where lines are rows
    content: object  # as JSON or Arrow says it; a column that was not asked for has no value
    problem: str = ""  # why the content cannot be read, if so


def records_digest(records: Iterable[Record]) -> str:
    """Return a SHA-256 in hexadecimal of content and order, the same for every file format."""
    digest = hashlib.sha256()
    for record in records:
        # JSON marks where a field ends, so moving text between fields changes the digest.
        line = json.dumps([record.edge, record.question, record.answer])
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()


def read_records(path: Path, *, default_edge: str | None = None) -> tuple[Record, ...]:
    """Read question-answer pairs, in the order of the file, or raise a DataError.

    `default_edge` is the edge of rows that have no field `edge`; without it they are an error.
    """
    fields = {"question": None, "answer": None, "edge": default_edge}
    rows = read_rows(path, tuple(fields))
    return tuple(Record(*texts) for texts in _texts(path, rows, fields))


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts, or any list of texts, in the order of the file, or raise a DataError.

    They are lines of a `.txt` file, or rows that have a field `instruction` or are texts.
    """
    rows = [
        row._replace(content={"instruction": row.content}) if isinstance(row.content, str) else row
        for row in read_rows(path, ("instruction",))
    ]
    return tuple(text for (text,) in _texts(path, rows, {"instruction": None}))


def holds_prompts(path: Path) -> bool:
    """Say by its first row whether a file looks like prompts, not pairs, or raise a DataError."""
    rows = read_rows(path, ("question", "instruction"))
    first = rows[0].content if rows else None
    if isinstance(first, Mapping):
        return "instruction" in first and "question" not in first
    return isinstance(first, str)


def _texts(
    path: Path, rows: Sequence[Row], fields: Mapping[str, str | None]
) -> list[tuple[str, ...]]:
    """Return the texts of every row's fields, or say everything that is wrong with the file.

    `fields` says what a row must have, and what stands for a field that it may lack.
    """
    texts, problems = list[tuple[str, ...]](), defaultdict[str, list[str]](list)
    for place, content, problem in rows:
        if problem:
            problems[f": {problem}"].append(place)
        elif isinstance(content, Mapping):
            for name, other in fields.items():
                if other is not None and name not in content:
                    continue
                if (mistake := _mistake(name, content)) is not None:
                    problems[f", field {name!r}: {mistake}"].append(place)
            texts.append(tuple(content.get(name, other or "") for name, other in fields.items()))
        else:
            wanted = f"it must be an object with {', '.join(fields)}"
            problems[f": is {_described(content)}; {wanted}"].append(place)
    if problems:
        lines = [
            ("every row" if 1 < len(places) == len(rows) else listed(places)) + problem
            for problem, places in problems.items()
        ]
        if len(lines) == 1:
            raise DataError(f"{path}: {lines[0]}")
        shown = "".join(f"\n  - {line}" for line in lines[:_SHOWN_PROBLEMS])
        more = len(lines) - _SHOWN_PROBLEMS
        counted = f"\n  and {more} more" if more > 0 else ""
        raise DataError(f"{path}: {len(lines)} problems{shown}{counted}")
    if not texts:
        raise DataError(f"{path}: the file has no rows; give at least one")
    return texts


def _mistake(name: str, content: Mapping[str, Any]) -> str | None:
    """Say what is wrong with one field of a row; None if nothing is."""
    if name not in content:
        there = ", ".join(map(repr, list(content)[:8])) or "nothing"
        hint = ", or give a default edge for the whole file" if name == "edge" else ""
        return f"is missing (the row has {there}); add it{hint}"
    value = content[name]
    if not isinstance(value, str):
        return f"is {_described(value)}; it must be a text in quotes"
    if not value.strip():
        return "is empty; fill it in or remove the row"
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which no tokenizer takes; write the character"
    if size > _MAX_TEXT_BYTES:
        return f"holds {size} bytes of text; at most {_MAX_TEXT_BYTES} are allowed"
    return None


def _described(value: object) -> str:
    """Say what a value is: what may hold private texts by its kind, other values as JSON."""
    kind = _KINDS.get(type(value))
    return kind or json.dumps(value, default=str)[:_SHOWN_CHARACTERS]


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a file, whose suffix decides the format, or raise a DataError.

    Of a format with columns only those asked for are read, since others may be large.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        known = f"{', '.join(SUFFIXES)} (for prompts alone)"
        raise DataError(f"{path}: the suffix {path.suffix!r} is not supported; there are: {known}")
    if suffix == ".json":
        content = read_json(path)
        if not isinstance(content, list):
            kind = "an object" if isinstance(content, dict) else type(content).__name__
            raise DataError(f"{path}: holds {kind}; it must be a list of objects: [{{…}}, {{…}}]")
        return [Row(f"row {number}", row) for number, row in enumerate(content, 1)]
    if suffix not in {".jsonl", ".txt"}:
        return _table_rows(path, columns)
    # Not splitlines(): JSON texts may hold U+2028 and its like, which end no line.
    lines = [(n, line) for n, line in enumerate(_read_text(path).split("\n"), 1) if line.strip()]
    if suffix == ".txt":
        return [Row(f"line {n}", line.strip()) for n, line in lines]
    return [Row(f"line {n}", *_parsed(line)) for n, line in lines]


def read_json(path: Path) -> object:
    """Return what a JSON file holds, whatever it is, or raise a DataError."""
    content, problem = _parsed(_read_text(path))
    if problem:
        raise DataError(f"{path}: {problem}")
    return content


def _parsed(text: str) -> tuple[object, str]:
    """Return what JSON says, or why it cannot be read."""
    try:
        return json.loads(text), ""
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        hint = (
            "; if each line is an object, name it .jsonl" if line and "Extra" in error.msg else ""
        )
        return None, f"{line}column {error.colno}: is not valid JSON ({error.msg}){hint}"
    except RecursionError:
        return None, "is nested too deeply"
    except ValueError as error:  # a number of very many digits
        return None, f"is not valid JSON ({error})"


def _table_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    content = _read_bytes(path)
    if content.startswith(_FEATHER_V1_MAGIC):
        raise DataError(f"{path}: is Feather V1; write it again with a current pyarrow or pandas")
    kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
    buffer = pa.BufferReader(content)
    try:
        if kind == "Parquet":
            file = pa.parquet.ParquetFile(buffer)
            names, table = file.schema_arrow.names, file.read(columns=list(columns))
        else:
            is_file = content.startswith(_ARROW_FILE_MAGIC)
            opened = pa.ipc.open_file(buffer) if is_file else pa.ipc.open_stream(buffer)
            table = opened.read_all()
            names = table.column_names
        table = table.select([name for name in columns if name in names])
        table.validate(full=True)  # a damaged Arrow file would else crash the process below
        rows = table.to_pylist() if table.num_columns else [{}] * table.num_rows
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read as {kind} ({reason})") from error
    return [Row(f"row {number}", dict.fromkeys(names) | row) for number, row in enumerate(rows, 1)]


def _read_bytes(path: Path) -> bytes:
    try:
        content = read_beginning(path, _MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > _MAX_FILE_BYTES:
        raise DataError(f"{path}: is longer than {_MAX_FILE_BYTES >> 20} MiB; at most that is read")
    if not content.strip():
        raise DataError(f"{path}: the file is empty")
    return content


def _read_text(path: Path) -> str:
    content = _read_bytes(path)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise DataError(
            f"{path}: is not UTF-8: byte 0x{byte:02x} at offset {error.start}; save it as UTF-8"
        ) from error
