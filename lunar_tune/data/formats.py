"""Opens the file formats of rows: JSON, JSON Lines, Parquet, Arrow, and text lines.

A row is what stands in one place of a file, not yet checked:

    Row(place="row 3", content={"question": "…", "answer": "…", "edge": "A_B"})
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from lunar_tune.errors import DataError
from lunar_tune.files import read_beginning

__all__ = ["PAIR_SUFFIXES", "PROMPT_SUFFIXES", "Row", "Unreadable", "read_json", "read_rows"]

_MAX_FILE_BYTES = 2 * 2**30  # all of it is read at once
_ARROW_FILE_MAGIC = b"ARROW1"
_FEATHER_V1_MAGIC = b"FEA1"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for the content of a row that cannot be read."""

    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file."""

    place: str
    """Counted from 1: `row 3`, or `line 3` where lines are rows."""
    content: object
    """An object, a text, anything else that JSON or Arrow can say. Columns that were not asked for
    are there by name, without a value."""


def read_rows(path: Path, columns: Sequence[str], suffixes: Sequence[str]) -> list[Row]:
    """Return the rows of a file.

    Args:
        path: The file; its suffix decides the format.
        columns: What to read of a format with columns, where others may be large.
        suffixes: Those of the formats that will do, `PAIR_SUFFIXES` or `PROMPT_SUFFIXES`.

    Raises:
        DataError: The file is missing, empty, of another format or of broken syntax.
    """
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        supported = ", ".join(suffixes)
        raise DataError(
            f"{path}: the suffix {path.suffix!r} is not supported; there are: {supported}"
        )
    return _READERS[suffix](path, columns)


def read_json(path: Path) -> object:
    """Return what a JSON file holds, whatever it is.

    Raises:
        DataError: The file is missing, empty, not UTF-8 or not JSON.
    """
    try:
        content: object = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        hint = "; if each line is an object, name it .jsonl" if "Extra data" in str(error) else ""
        place = f"line {error.lineno}, " if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}: {place}{_json_problem(error)}{hint}") from error
    return content


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: is not valid JSON ({error.msg})"
    return f"is not valid JSON ({error})"


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


def _json_rows(path: Path, _columns: Sequence[str]) -> list[Row]:
    content = read_json(path)
    if not isinstance(content, list):
        kind = "an object" if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: holds {kind}; it must be a list of objects: [{{…}}, {{…}}]")
    return [Row(f"row {number}", row) for number, row in enumerate(content, 1)]


def _line_rows(path: Path, parse: Callable[[str], object]) -> list[Row]:
    # Not splitlines(): JSON texts may hold U+2028 and its like, which end no line.
    lines = _read_text(path).split("\n")
    return [Row(f"line {n}", parse(line)) for n, line in enumerate(lines, 1) if line.strip()]


def _json_line(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(_json_problem(error))


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


_READERS: Final[dict[str, Callable[[Path, Sequence[str]], list[Row]]]] = {
    ".json": _json_rows,
    ".jsonl": lambda path, _columns: _line_rows(path, _json_line),
    ".parquet": _table_rows,
    ".arrow": _table_rows,
    ".feather": _table_rows,
    ".txt": lambda path, _columns: _line_rows(path, str.strip),
}

PROMPT_SUFFIXES: Final = tuple(_READERS)
PAIR_SUFFIXES: Final = tuple(suffix for suffix in _READERS if suffix != ".txt")
