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

__all__ = ["ROW_SUFFIXES", "Row", "Unreadable", "read_json", "read_lines", "read_rows"]

OpenTable = Callable[[bytes, Sequence[str]], tuple[pa.Table, list[str]]]

_MAX_FILE_BYTES = 2 * 2**30  # all of it is read at once
_ARROW_FILE_MAGIC = b"ARROW1"
_FEATHER_V1_MAGIC = b"FEA1"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for the content of a row that has no readable content.

    Attributes:
        reason: Why not, for a message.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Attributes:
        place: Where it stands, counted from 1: `row 3`, or `line 3` where lines are rows.
        content: What stands there: an object, a text, anything else that JSON or Arrow can say.
            Columns that were not asked for are there by name, without a value.
    """

    place: str
    content: object


def read_rows(path: Path, columns: Sequence[str], *, also: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a file.

    Args:
        path: The file; its suffix decides the format.
        columns: What to read of a format with columns, where others may be large.
        also: Suffixes that the caller reads itself, to be named if the suffix is unknown.

    Raises:
        DataError: The file is missing, empty, of another format or of broken syntax.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        _check_exists(path)
        supported = ", ".join([*ROW_SUFFIXES, *also])
        raise DataError(
            f"{path}: the suffix {path.suffix!r} is not supported; there are: {supported}"
        )
    return reader(path, columns)


def read_lines(path: Path) -> list[Row]:
    """Return the lines of a text file that are not blank, without spaces around them.

    Raises:
        DataError: The file is missing, empty or not UTF-8.
    """
    lines = _read_text(Path(path)).split("\n")
    return [Row(f"line {n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]


def _check_exists(path: Path) -> None:
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise DataError(f"{path}: cannot be looked at ({error.strerror})") from error
    if is_folder:
        raise DataError(f"{path}: is a folder; give a file in it")
    if not exists:
        raise DataError(f"{path}: there is no such file{_neighbours(path)}")


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    alike = sorted(p.name for p in folder.iterdir() if p.stem == path.stem and p.is_file())
    return f"; in the same folder there is {', '.join(alike[:5])}" if alike else ""


def _read_bytes(path: Path) -> bytes:
    _check_exists(path)
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise DataError(
                f"{path}: is {size / 2**30:.1f} GiB large; at most {_MAX_FILE_BYTES >> 30} are read"
            )
        content = read_beginning(path, _MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > _MAX_FILE_BYTES:
        raise DataError(f"{path}: does not end; at most {_MAX_FILE_BYTES >> 30} GiB are read")
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


def _json_problem(error: ValueError | RecursionError) -> str:
    """Say what is wrong with JSON, apart from where."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error.msg})"
    return f"is not valid JSON ({error})"


def read_json(path: Path) -> object:
    """Return what a JSON file holds, whatever it is.

    Raises:
        DataError: The file is missing, empty, not UTF-8 or not JSON.
    """
    try:
        content: object = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        hint = "; if each line is an object, name it .jsonl" if error.msg == "Extra data" else ""
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: {place}: {_json_problem(error)}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_json_problem(error)}") from error
    return content


def _json_rows(path: Path, _columns: Sequence[str]) -> list[Row]:
    content = read_json(path)
    if not isinstance(content, list):
        kind = "an object" if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: holds {kind}; it must be a list of objects: [{{…}}, {{…}}]")
    return [Row(f"row {number}", row) for number, row in enumerate(content, 1)]


def _jsonl_rows(path: Path, _columns: Sequence[str]) -> list[Row]:
    # Not splitlines(): JSON texts may hold U+2028 and its like, which end no line.
    lines = _read_text(path).split("\n")
    return [Row(f"line {n}", _json_line(line)) for n, line in enumerate(lines, 1) if line.strip()]


def _json_line(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Unreadable(f"column {error.colno}: {_json_problem(error)}")
    except (ValueError, RecursionError) as error:
        return Unreadable(_json_problem(error))


def _among(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the columns that exist.

    Raises:
        ValueError: A column exists twice.
    """
    for name in columns:
        if names.count(name) > 1:
            raise ValueError(f"column {name!r} is there {names.count(name)} times")
    return [name for name in columns if name in names]


def _parquet_table(content: bytes, columns: Sequence[str]) -> tuple[pa.Table, list[str]]:
    file = pa.parquet.ParquetFile(pa.BufferReader(content))
    names = file.schema_arrow.names
    return file.read(columns=_among(columns, names)), names


def _arrow_table(content: bytes, columns: Sequence[str]) -> tuple[pa.Table, list[str]]:
    buffer = pa.BufferReader(content)
    is_file = content.startswith(_ARROW_FILE_MAGIC)
    table = (pa.ipc.open_file(buffer) if is_file else pa.ipc.open_stream(buffer)).read_all()
    return table.select(_among(columns, table.column_names)), table.column_names


def _table_rows(path: Path, columns: Sequence[str], kind: str, open_table: OpenTable) -> list[Row]:
    content = _read_bytes(path)
    if content.startswith(_FEATHER_V1_MAGIC):
        raise DataError(f"{path}: is Feather V1; write it again with a current pyarrow or pandas")
    try:
        table, names = open_table(content, columns)
        table.validate(full=True)  # a damaged Arrow file would else crash the process below
        rows = table.to_pylist() if table.num_columns else [{}] * table.num_rows
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read as {kind} ({reason})") from error
    return [Row(f"row {number}", dict.fromkeys(names) | row) for number, row in enumerate(rows, 1)]


def _parquet_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    return _table_rows(path, columns, "Parquet", _parquet_table)


def _arrow_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    return _table_rows(path, columns, "Arrow", _arrow_table)


_READERS: Final[dict[str, Callable[[Path, Sequence[str]], list[Row]]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".feather": _arrow_rows,
}

ROW_SUFFIXES: Final = tuple(_READERS)
