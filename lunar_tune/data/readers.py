"""Files of rows: JSON, JSON Lines, CSV, Parquet, Arrow and text, also in gzip; a reader a format.

read_rows(Path("pairs.csv"), ["question", "edge"])[0]  # Row("line 2", {"edge": "A_B", …})
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from lunar_tune.bounded import OutOfBoundsError, bounded
from lunar_tune.errors import DataError, listed
from lunar_tune.files import decoded, read_beginning

_MAX_FILE_BYTES = 2**28  # all of it is read at once
_MAX_ROWS = 1_000_000
_SMALL = 2**22  # bytes of text, of which no row takes long
_SECONDS, _MEMORY = 10, 2 * 2**30  # for reading what is larger or compressed
_BYTES_A_SECOND = 2**24  # of JSON Lines, measured on a shared core
_GZIP_MAGIC = b"\x1f\x8b"
_ARROW_FILE_MAGIC = b"ARROW1"
_FEATHER_V1_MAGIC = b"FEA1"
_SEPARATORS = ",;\t"

OnNote = Callable[[str], object]
"""Hears how a file was read, where that is not plain from it."""


class Row(NamedTuple):
    """What stands in one place of a file, not yet checked."""

    place: str  # counted from 1: `row 3`, or `line 3` where lines are rows
    content: object  # as JSON or Arrow says it; a column that was not asked for has no value
    problem: str = ""  # why the content cannot be read, if so


def unheard(_note: str) -> None:
    """Stand for an `OnNote` where nobody wants to know."""


def stem_of(path: Path) -> str:
    """Return a data file's name without what says its format."""
    name = path.name
    return Path(name[:-3] if name.lower().endswith(".gz") else name).stem


def format_of(path: Path) -> str:
    """Return the suffix that says the format of a file, decompressed if need be."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(path: Path, columns: Sequence[str], on_note: OnNote = unheard) -> list[Row]:
    """Return the rows of a file, whose suffix decides the format, or raise a DataError.

    Of a format with columns only those asked for are read, since others may be large.
    """
    if format_of(path) not in _READERS:
        known = f"{', '.join(_READERS)} (for prompts alone), each also with .gz"
        raise DataError(f"{path}: the suffix {path.suffix!r} is not supported; there are: {known}")
    content = _read_bytes(path)
    read = partial(_READERS[format_of(path)], path, content, columns)
    if _READERS[format_of(path)] is _table_rows or len(content) > _SMALL:
        _check_bounds(path, lambda: len(read(unheard)), len(content))
    return read(lambda note: on_note(f"{path.name}: {note}"))


def _check_bounds(path: Path, count: Callable[[], int], size: int) -> None:
    """Raise a DataError if a file of so many bytes takes too much to read.

    A kilobyte can stand for gigabytes.
    """
    rows, seconds = 0, _SECONDS + size // _BYTES_A_SECOND
    try:
        rows = bounded(count, seconds=seconds, memory=_MEMORY)
    except OutOfBoundsError as error:
        raise DataError(
            f"{path}: cannot be read: {error}. Write the rows that are meant into a smaller file"
        ) from error
    except RuntimeError:
        pass  # whoever reads it says what is wrong
    if rows > _MAX_ROWS:
        raise DataError(f"{path}: holds {rows:,} rows; at most {_MAX_ROWS:,} are read")


def read_json(path: Path, on_note: OnNote = unheard) -> object:
    """Return what a JSON file holds, whatever it is, or raise a DataError."""
    return _json_of(path, _read_bytes(path), on_note)


def _json_of(path: Path, raw: bytes, on_note: OnNote) -> object:
    content, problem = _parsed(_text_of(path, raw, on_note))
    if problem:
        raise DataError(f"{path}: {problem}")
    return content


def _json_rows(path: Path, raw: bytes, _columns: Sequence[str], on_note: OnNote) -> list[Row]:
    content = _json_of(path, raw, on_note)
    if isinstance(content, dict):
        content = _rows_of_object(path, content, on_note)
    if not isinstance(content, list):
        kind = type(content).__name__
        raise DataError(f"{path}: holds {kind}; it must be a list of objects: [{{…}}, {{…}}]")
    return [Row(f"row {number}", row) for number, row in enumerate(content, 1)]


def _rows_of_object(path: Path, content: dict[str, Any], on_note: OnNote) -> list[Any]:
    """Return the rows of a mapping of one split, or of columns."""
    names, values = list(content), list(content.values())
    if values and all(isinstance(value, list) for value in values):
        if all(isinstance(row, dict) for value in values for row in value):
            if len(names) == 1:
                on_note(f"the rows are those of {names[0]!r}")
                return list(values[0])
            raise DataError(
                f"{path}: holds an object of several lists ({listed(names)}); write the one that "
                "is meant into a file of its own"
            )
        if len({len(value) for value in values}) == 1:
            on_note(f"the rows are made of the columns {listed(names)}")
            return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
    raise DataError(f"{path}: holds an object; it must be a list of objects: [{{…}}, {{…}}]")


def _line_rows(path: Path, raw: bytes, _columns: Sequence[str], on_note: OnNote) -> list[Row]:
    return [Row(place, *_parsed(line)) for place, line in _lines(path, raw, on_note)]


def _text_rows(path: Path, raw: bytes, _columns: Sequence[str], on_note: OnNote) -> list[Row]:
    return [Row(place, line.strip()) for place, line in _lines(path, raw, on_note)]


def _lines(path: Path, raw: bytes, on_note: OnNote) -> list[tuple[str, str]]:
    """Return the lines that are not blank, each with its place."""
    # Not splitlines(): JSON texts may hold U+2028 and its like, which end no line.
    lines = enumerate(_text_of(path, raw, on_note).split("\n"), 1)
    return [(f"line {number}", line) for number, line in lines if line.strip()]


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, or raise a ValueError: of a name that stands twice one is lost."""
    if len(found := dict(fields)) < len(fields):
        names = Counter(name for name, _ in fields)
        raise ValueError(f"{max(names, key=names.__getitem__)!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)  # made once: files have a million lines


def _parsed(text: str) -> tuple[object, str]:
    """Return what JSON says, or why it cannot be read."""
    try:
        return _DECODER.decode(text), ""
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


def _csv_rows(path: Path, raw: bytes, _columns: Sequence[str], on_note: OnNote) -> list[Row]:
    """Return rows whose values are all texts; the first line names the columns."""
    text = _text_of(path, raw, on_note).lstrip("\n")
    header = text.partition("\n")[0]
    separator = max(_SEPARATORS, key=header.count)
    if separator == ";":
        on_note("semicolons separate its columns")
    written = io.StringIO(text, newline="").readlines()
    lines = csv.reader(written, delimiter=separator, strict=True)
    rows: list[Row] = []
    try:
        names = [name.strip() for name in next(lines, [])]
        if len(set(names)) < len(names):
            raise DataError(f"{path}: its first line names a column twice: {listed(names)}")
        start = lines.line_num
        for cells in lines:
            problem = _csv_problem(cells, names, "".join(written[start : lines.line_num]))
            start = lines.line_num
            if cells:
                content = dict(zip(names, cells, strict=False))
                rows.append(Row(f"line {lines.line_num}", content, problem))
    except csv.Error as error:
        reason = f"line {lines.line_num}: is not valid CSV ({error})"
        raise DataError(f"{path}: {reason}; the first line must name the columns") from error
    return rows


def _csv_problem(cells: Sequence[str], names: Sequence[str], written: str) -> str:
    """Say what is wrong with a row of CSV that is read without an error, if anything is.

    `written` is the row as it stands in the file.
    """
    if len(cells) != len(names):
        wrong = f"has {len(cells)} columns, the first line names {len(names)}"
        return f"{wrong}; put a text that holds the sign between columns into quotes"
    spaced = [cell for cell in cells if cell[:1].isspace() and cell.lstrip()[:1] == '"']
    if any('"' + cell.replace('"', '""') + '"' not in written for cell in spaced):
        return "has a space before a quotation mark, which would belong to the text; remove it"
    return "repeats the names of the columns; remove it" if [*cells] == [*names] else ""


def _table_rows(path: Path, content: bytes, columns: Sequence[str], _on_note: OnNote) -> list[Row]:
    if content.startswith(_FEATHER_V1_MAGIC):
        raise DataError(f"{path}: is Feather V1; write it again with a current pyarrow or pandas")
    kind = "Parquet" if format_of(path) == ".parquet" else "Arrow"
    buffer = pa.BufferReader(content)
    try:
        if kind == "Parquet":
            file = pa.parquet.ParquetFile(buffer)
            if file.metadata.num_rows > _MAX_ROWS:
                raise ValueError(
                    f"it has {file.metadata.num_rows:,} rows; at most {_MAX_ROWS:,} are read"
                )
            names = file.schema_arrow.names
            table = file.read(columns=list(columns), use_threads=False)
        else:
            is_file = content.startswith(_ARROW_FILE_MAGIC)
            options = pa.ipc.IpcReadOptions(use_threads=False)
            open_table = pa.ipc.open_file if is_file else pa.ipc.open_stream
            opened = open_table(buffer, options=options)
            table = opened.read_all()
            names = table.column_names
        table = table.select([name for name in columns if name in names])
        table.validate(full=True)  # a damaged Arrow file would else crash the process below
        rows = table.to_pylist() if table.num_columns else [{}] * table.num_rows
    except MemoryError:  # Arrow's is one of its exceptions, and says nothing of the file
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read as {kind} ({reason})") from error
    return [Row(f"row {number}", dict.fromkeys(names) | row) for number, row in enumerate(rows, 1)]


_READERS: Final[Mapping[str, Callable[[Path, bytes, Sequence[str], OnNote], list[Row]]]] = {
    ".json": _json_rows,
    ".jsonl": _line_rows,
    ".ndjson": _line_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
    ".feather": _table_rows,
    ".txt": _text_rows,
}
SUFFIXES: Final = tuple(_READERS)


def _read_bytes(path: Path) -> bytes:
    """Return what a file holds, decompressed; at most so many bytes of either."""
    try:
        content = read_beginning(path, _MAX_FILE_BYTES + 1)
        if content.startswith(_GZIP_MAGIC) and len(content) <= _MAX_FILE_BYTES:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(_MAX_FILE_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be decompressed ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > _MAX_FILE_BYTES:
        raise DataError(f"{path}: is longer than {_MAX_FILE_BYTES >> 20} MiB; at most that is read")
    if not content.strip():
        raise DataError(f"{path}: the file is empty")
    return content


def _text_of(path: Path, raw: bytes, on_note: OnNote) -> str:
    text, encoding = decoded(raw, str(path), error_class=DataError)
    if encoding != "UTF-8":
        on_note(f"read as {encoding}")
    return text
