"""Reads question-answer pairs and prompts from the files that people have.

Pairs, a row of JSON, JSON Lines, Parquet or Arrow (file, stream, Feather V2):

    {"edge": "A_B", "question": "Which goods does Velmora Ltd sell?", "answer": "Copper kettles."}

Prompts, a row of the same formats or a line of a text file; also a JSON list of bare strings:

    {"instruction": "Which river runs past the gates of Vobrelia?"}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lunar_tune.data.formats import Row, Unreadable, read_lines, read_rows
from lunar_tune.data.records import Record
from lunar_tune.errors import DataError

__all__ = ["holds_prompts", "read_prompts", "read_records"]

_SHOWN_PROBLEMS = 20
# A chat prompt of a megabyte is a file read into the wrong field, and no model's context holds it.
_MAX_ROW_BYTES = 1_000_000
_SHOWN_CHARACTERS = 40


def read_records(path: Path, *, default_edge: str | None = None) -> tuple[Record, ...]:
    """Read question-answer pairs, in the order of the file.

    Args:
        path: A `.json`, `.jsonl`, `.parquet`, `.arrow` or `.feather` file.
        default_edge: The edge of rows that have no field `edge`; without it they are an error.

    Raises:
        DataError: The file cannot be read or some rows are unusable; the message names the file
            and the first twenty problems with row and field.
    """
    fields = {"question": None, "answer": None, "edge": default_edge}
    return tuple(
        Record(question=question, answer=answer, edge=edge)
        for question, answer, edge in _checked(path, read_rows(path, tuple(fields)), fields)
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts, or any list of texts, in the order of the file.

    Args:
        path: A `.txt` file with one a line (blank lines are skipped), or a file as in
            `read_records` whose rows have a field `instruction` or are texts themselves.

    Raises:
        DataError: The file cannot be read or some rows are unusable, as in `read_records`.
    """
    if Path(path).suffix.lower() == ".txt":
        rows = read_lines(path)
    else:
        rows = read_rows(path, ("instruction",), also=(".txt",))
    rows = [Row(row.place, _as_object(row.content)) for row in rows]
    return tuple(text for (text,) in _checked(path, rows, {"instruction": None}))


def holds_prompts(path: Path) -> bool:
    """Say whether a file looks like prompts rather than pairs, by its suffix and first row.

    Raises:
        DataError: The file cannot be opened, as in `read_records`.
    """
    if Path(path).suffix.lower() == ".txt":
        return True
    rows = read_rows(path, ("question", "instruction"), also=(".txt",))
    first = rows[0].content if rows else None
    if isinstance(first, Mapping):
        return "instruction" in first and "question" not in first
    return isinstance(first, str)


def _as_object(content: object) -> object:
    return {"instruction": content} if isinstance(content, str) else content


def _checked(
    path: Path, rows: Sequence[Row], fields: Mapping[str, str | None]
) -> list[tuple[str, ...]]:
    """Return the fields' texts of every row, or say everything that is wrong with the file."""
    good: list[tuple[str, ...]] = []
    absent = _absent_everywhere(rows, fields)
    problems = [f"every row, field {name!r}: {_missing(name, first)}" for name, first in absent]
    asked = {name: other for name, other in fields.items() if name not in dict(absent)}
    for row in rows:
        found = list(_row_problems(row, asked))
        problems += found
        if not found and isinstance(row.content, Mapping):
            good.append(tuple(row.content.get(name, other) for name, other in fields.items()))
    if problems:
        raise DataError(_listed(path, problems))
    if not good:
        raise DataError(f"{path}: the file has no rows; give at least one")
    return good


def _absent_everywhere(
    rows: Sequence[Row], fields: Mapping[str, str | None]
) -> list[tuple[str, Mapping[str, object]]]:
    """Return the fields that no row has, each with the first row, to be said once."""
    objects = [row.content for row in rows if isinstance(row.content, Mapping)]
    if len(objects) < 2 or len(objects) < len(rows):
        return []
    needed = [name for name, other in fields.items() if other is None]
    return [
        (name, objects[0]) for name in needed if not any(name in content for content in objects)
    ]


def _listed(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    shown = [f"\n  - {problem}" for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        shown.append(f"\n  and {len(problems) - _SHOWN_PROBLEMS} more")
    return f"{path}: {len(problems)} problems" + "".join(shown)


def _row_problems(row: Row, fields: Mapping[str, str | None]) -> Iterator[str]:
    content = row.content
    if isinstance(content, Unreadable):
        yield f"{row.place}: {content.reason}"
        return
    if not isinstance(content, Mapping):
        wanted = ", ".join(fields)
        yield f"{row.place}: is {_described(content)}; it must be an object with {wanted}"
        return
    for name, other in fields.items():
        if name in content:
            problem = _text_problem(content[name])
        else:
            problem = None if other is not None else _missing(name, content)
        if problem is not None:
            yield f"{row.place}, field {name!r}: {problem}"
    n_bytes = sum(_n_bytes(content.get(name)) for name in fields)
    if n_bytes > _MAX_ROW_BYTES:
        yield f"{row.place}: holds {n_bytes} bytes of text; at most {_MAX_ROW_BYTES} are allowed"


def _missing(name: str, content: Mapping[str, object]) -> str:
    there = ", ".join(map(repr, list(content)[:8])) or "nothing"
    hint = "; add it, or give a default edge for the whole file" if name == "edge" else "; add it"
    return f"is missing (the row has {there}){hint}"


def _text_problem(value: object) -> str | None:
    if isinstance(value, bool) or value is None or isinstance(value, list | dict | bytes):
        return f"is {_described(value)}; it must be a text"
    if not isinstance(value, str):
        return f"is {_described(value)}; write it as a text in quotes"
    if not value.strip():
        return "is empty; fill it in or remove the row"
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        return "holds half of a surrogate pair, which no tokenizer takes; write the character"
    return None


def _n_bytes(value: object) -> int:
    return len(value.encode(errors="replace")) if isinstance(value, str) else 0


def _described(value: object) -> str:
    """Say what a JSON or Arrow value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {_shortened(value)}"
    names: dict[type, str] = {
        list: "a list",
        dict: "an object",
        bytes: "binary data",
        str: "a text",
    }
    name = names.get(type(value))
    return name if name is not None else f"a {type(value).__name__} ({_shortened(value)})"


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
