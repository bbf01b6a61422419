"""Question-answer pairs and prompts, read from the files that people have.

Pairs, a row of JSON, JSON Lines, Parquet or Arrow (file, stream, Feather V2):

    {"edge": "A_B", "question": "Which goods does Velmora Ltd sell?", "answer": "Copper kettles."}

Prompts, a row of the same formats or a line of a text file; also a JSON list of bare strings:

    {"instruction": "Which river runs past the gates of Vobrelia?"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lunar_tune.data.formats import PAIR_SUFFIXES, PROMPT_SUFFIXES, Row, Unreadable, read_rows
from lunar_tune.errors import DataError

__all__ = ["Record", "holds_prompts", "read_prompts", "read_records", "records_digest"]

_SHOWN_PROBLEMS = 20
# A chat prompt of a megabyte is a file read into the wrong field, and no model's context holds it.
_MAX_ROW_BYTES = 1_000_000
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Record:
    """One question with its true answer."""

    question: str
    """What the model is asked, without any chat template."""
    answer: str
    """The true answer, against which ROUGE is computed."""
    edge: str
    """The group the pair belongs to; whole edges are forgotten or retained."""


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
    rows = read_rows(path, tuple(fields), PAIR_SUFFIXES)
    return tuple(Record(*texts) for texts in _checked(path, rows, fields))


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts, or any list of texts, in the order of the file.

    Args:
        path: A `.txt` file with one a line (blank lines are skipped), or a file as in
            `read_records` whose rows have a field `instruction` or are texts themselves.

    Raises:
        DataError: The file cannot be read or some rows are unusable, as in `read_records`.
    """
    rows = [
        Row(row.place, {"instruction": row.content}) if isinstance(row.content, str) else row
        for row in read_rows(path, ("instruction",), PROMPT_SUFFIXES)
    ]
    return tuple(text for (text,) in _checked(path, rows, {"instruction": None}))


def holds_prompts(path: Path) -> bool:
    """Say whether a file looks like prompts rather than pairs, by its first row.

    Raises:
        DataError: The file cannot be opened, as in `read_records`.
    """
    rows = read_rows(path, ("question", "instruction"), PROMPT_SUFFIXES)
    first = rows[0].content if rows else None
    if isinstance(first, Mapping):
        return "instruction" in first and "question" not in first
    return isinstance(first, str)


def _checked(
    path: Path, rows: Sequence[Row], fields: Mapping[str, str | None]
) -> list[tuple[str, ...]]:
    """Return the texts of every row's fields, or say everything that is wrong with the file.

    Args:
        path: The file, for the message.
        rows: What it holds.
        fields: What a row must have, and what stands for a field that it may lack.
    """
    objects = [row.content for row in rows if isinstance(row.content, Mapping)]
    asked, problems = dict(fields), list[str]()
    if 1 < len(objects) == len(rows):
        for name, other in fields.items():
            if other is None and not any(name in content for content in objects):
                problems.append(f"every row, field {name!r}: {_missing(name, objects[0])}")
                del asked[name]  # said once
    problems += [problem for row in rows for problem in _row_problems(row, asked)]
    if len(problems) == 1:
        raise DataError(f"{path}: {problems[0]}")
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        more = len(problems) - _SHOWN_PROBLEMS
        counted = f"\n  and {more} more" if more > 0 else ""
        raise DataError(f"{path}: {len(problems)} problems{shown}{counted}")
    if not objects:
        raise DataError(f"{path}: the file has no rows; give at least one")
    return [tuple(row.get(name, other) for name, other in fields.items()) for row in objects]


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
    texts = [text for name in fields if isinstance(text := content.get(name), str)]
    n_bytes = sum(len(text.encode(errors="replace")) for text in texts)
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


def _described(value: object) -> str:
    """Say what a JSON or Arrow value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {
        list: "a list",
        dict: "an object",
        bytes: "binary data",
        str: "a text",
    }
    if (kind := kinds.get(type(value))) is not None:
        return kind
    text = str(value)
    shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
    is_number = isinstance(value, int | float)
    return f"the number {shown}" if is_number else f"a {type(value).__name__} ({shown})"
