"""Question-answer pairs and prompts, whatever file they stand in, checked and in one form.

{"edge": "A_B", "question": "Which goods does Velmora Ltd sell?", "answer": "Copper kettles."}
{"instruction": "Which river runs past the gates of Vobrelia?"}
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunar_tune.data.readers import OnNote, read_rows, unheard
from lunar_tune.data.shapes import FIELDS, PAIR, PROMPT, QUESTION, shaped
from lunar_tune.data.texts import composed, edge_name
from lunar_tune.errors import DataError, listed

# A chat prompt of a megabyte is a file read into the wrong field, and no model's context holds it.
_MAX_TEXT_BYTES = 1_000_000
_SHOWN_PROBLEMS = 20
_SHOWN_CHARACTERS = 40
_HINTS = {
    "edge": ", or give all rows that lack it one edge with --edge NAME",
    "answer": ", or let a model answer: lunar-tune collect --questions FILE",
}
_KINDS: dict[type, str] = {str: "a text", list: "a list", dict: "an object", bytes: "binary data"}


@dataclass(frozen=True, slots=True)
class Record:
    """One question with its true answer."""

    question: str  # what the model is asked, without any chat template
    answer: str  # the true answer, against which ROUGE is computed
    edge: str  # the group the pair belongs to; whole edges are forgotten or retained


def records_digest(records: Iterable[Record]) -> str:
    """Return a SHA-256 in hexadecimal of content and order, the same for every file format."""
    digest = hashlib.sha256()
    for record in records:
        # JSON marks where a field ends, so moving text between fields changes the digest.
        line = json.dumps([record.edge, record.question, record.answer])
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()


def prompts_digest(prompts: Iterable[str]) -> str:
    """Return a SHA-256 in hexadecimal of prompts and their order."""
    return records_digest(Record(prompt, answer="", edge="") for prompt in prompts)


def read_records(
    path: Path, *, default_edge: str | None = None, on_note: OnNote = unheard
) -> tuple[Record, ...]:
    """Read question-answer pairs, in the order of the file, or raise a DataError.

    `default_edge` is the edge of rows that have no field `edge`; without it they are an error.
    Texts are read in Unicode's form NFC, edges as `edge_name` has them.
    """
    return _records(path, PAIR, default_edge, on_note)


def read_questions(
    path: Path, *, default_edge: str | None = None, on_note: OnNote = unheard
) -> tuple[Record, ...]:
    """Read questions as `read_records` reads pairs, but no answers, which are empty.

    They may stand in a `.txt` file too, one a line, with a `default_edge`.
    """
    return _records(path, QUESTION, default_edge, on_note)


def _records(
    path: Path, wanted: tuple[str, ...], default_edge: str | None, on_note: OnNote
) -> tuple[Record, ...]:
    default = None if default_edge is None else edge_name(default_edge)
    spelled, records = Counter[str](), list[Record]()
    for question, *answer, edge in _texts(path, wanted, on_note, edge=default):
        spelled[edge] += 1
        records.append(Record(question, "".join(answer), edge_name(edge)))
    if other := [edge for edge in spelled if edge != edge_name(edge)]:
        count = len(records)
        said = [f"{e!r} as {edge_name(e)!r} ({spelled[e]} of {count} rows)" for e in other]
        on_note(f"{path.name}: edges are read without odd white space: {listed(said)}")
    return tuple(records)


def read_prompts(path: Path, *, on_note: OnNote = unheard) -> tuple[str, ...]:
    """Read prompts, or any list of texts, in the order of the file, or raise a DataError.

    They are lines of a `.txt` file, or rows that have a field `instruction` or are texts.
    """
    return tuple(text for (text,) in _texts(path, PROMPT, on_note))


def holds_prompts(path: Path) -> bool:
    """Say by its first row whether a file looks like prompts, not pairs, or raise a DataError."""
    rows = read_rows(path, FIELDS)
    first = rows[0].content if rows else None
    if isinstance(first, Mapping):
        is_pair, is_prompt = (
            first.keys() >= {*shaped(first, wanted).names.values()} for wanted in (PAIR, PROMPT)
        )
        return is_prompt and not is_pair and first.keys().isdisjoint(PAIR)
    return isinstance(first, str)


def _texts(
    path: Path, wanted: tuple[str, ...], on_note: OnNote, **others: str | None
) -> list[tuple[str, ...]]:
    """Return every row's texts in NFC, or say everything that is wrong with the file.

    `wanted` are texts that may have other names, `others` fields that have none, with what stands
    for each where a row lacks it.
    """
    rows, notes = read_rows(path, FIELDS, on_note), Counter[str]()
    texts, problems = list[tuple[str, ...]](), defaultdict[str, list[str]](list)
    for place, content, unread in rows:
        row = content
        if len(wanted) == 1 and isinstance(content, str):
            row = {wanted[0]: content}
        if unread or not isinstance(row, Mapping):
            fields = ", ".join((*wanted, *others))
            wrong = f"is {_described(row)}; it must be an object with {fields}"
            problems[f": {unread or wrong}"].append(place)
            continue
        shape = shaped(row, wanted)
        notes.update(shape.notes)
        if shape.problem:
            problems[f": {shape.problem}"].append(place)
            continue
        found = {n: other for n, other in others.items() if other is not None} | dict(shape.content)
        names = [shape.names.get(name, name) for name in (*wanted, *others)]
        for name in names:
            if (mistake := _mistake(name, found)) is not None:
                problems[f", field {name!r}: {mistake}"].append(place)
        texts.append(tuple(found.get(name, "") for name in names))
    if problems:
        raise DataError(f"{path}: {_told(problems, len(rows))}")
    if not texts:
        raise DataError(f"{path}: the file has no rows; give at least one")
    formed = [tuple(map(composed, row)) for row in texts]
    notes["texts are read in Unicode's form NFC"] += sum(map(tuple.__ne__, texts, formed))
    damaged = "letters are lost: U+FFFD stands where something was decoded wrongly"
    notes[damaged] += sum("\ufffd" in "".join(row) for row in formed)
    for note, count in notes.items():
        if count:
            on_note(
                f"{path.name}: {note}" + f" ({count} of {len(rows)} rows)" * (count < len(rows))
            )
    return formed


def _told(problems: Mapping[str, Sequence[str]], count: int) -> str:
    """Return the problems of a file of so many rows, each with the places where it is."""
    lines = [
        ("every row" if 1 < len(places) == count else listed(places)) + problem
        for problem, places in problems.items()
    ]
    if len(lines) == 1:
        return lines[0]
    shown = "".join(f"\n  - {line}" for line in lines[:_SHOWN_PROBLEMS])
    more = len(lines) - _SHOWN_PROBLEMS
    return f"{len(lines)} problems{shown}" + (f"\n  and {more} more" if more > 0 else "")


def _mistake(name: str, content: Mapping[str, Any]) -> str | None:
    """Say what is wrong with one field of a row; None if nothing is."""
    if name not in content:
        there = ", ".join(map(repr, list(content)[:8])) or "nothing"
        hint = _HINTS.get(name, "")
        return f"is missing (the row has {there}); add it{hint}"
    value = content[name]
    if not isinstance(value, str):
        return f"is {_described(value)}; it must be a text in quotes"
    if not edge_name(value):  # also where all of it is invisible
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
