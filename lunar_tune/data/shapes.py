"""Rows under the names that others give them: Alpaca's fields, completions, chats of one exchange.

shaped({"instruction": "Sum up.", "input": "It is late.", "output": "Late."}, PAIR).content
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

PAIR: Final = ("question", "answer")
PROMPT: Final = ("instruction",)
QUESTION: Final = ("question",)
_NAMES: Final = {
    PAIR: (
        ("instruction", "output"),
        ("instruction", "response"),
        ("prompt", "completion"),
        ("prompt", "response"),
    ),
    PROMPT: (("prompt",),),
    QUESTION: (("instruction",), ("prompt",)),
}
_CHATS: Final = ("messages", "conversations")
_ROLES: Final = {
    **{"user": "question", "human": "question", "system": "system"},
    **{"assistant": "answer", "gpt": "answer", "model": "answer"},
}
_BESIDE: Final = ("input", "context", "system")  # a question may mean something else without it
FIELDS: Final = (
    *(*PAIR, "edge", "instruction", "output", "prompt", "completion", "response"),
    *(*_CHATS, *_BESIDE, "history"),
)
"""Every field that is looked at."""


class Shaped(NamedTuple):
    """A row in which a field has every text that is wanted."""

    content: Mapping[str, Any]
    names: Mapping[str, str]  # the field of each text, where it may have another name
    notes: tuple[str, ...] = ()
    problem: str = ""


def shaped(row: Mapping[str, Any], wanted: tuple[str, ...]) -> Shaped:
    """Return a row as a `PAIR`, `PROMPT` or `QUESTION`; unchanged if it has none or several."""
    if row.get("history"):
        problem = "has a 'history'; one question and its answer are needed"
        return Shaped(row, {}, problem=problem)
    chats = [name for name in _CHATS if name in row and wanted == PAIR]
    found = [names for names in _NAMES[wanted] if row.keys() >= {*names}]
    is_own = bool(row.keys() & {*wanted}) or len(chats) + len(found) != 1
    if chats and not is_own:
        return _exchange(row, chats[0])
    names = dict(zip(wanted, wanted if is_own else found[0], strict=True))
    with_input = "instruction" in row and "instruction" in names.values()
    beside = [name for name in _BESIDE if row.get(name) and not (with_input and name == "input")]
    notes = [f"{name!r} is left out" for name in beside]
    if not is_own:
        notes.insert(0, ", ".join(f"the {name} is {own!r}" for name, own in names.items()))
    shape = Shaped(row, names, tuple(notes))
    return _with_input(shape) if with_input else shape


def _with_input(shape: Shaped) -> Shaped:
    """Put an Alpaca row's input below its instruction, as LLaMA-Factory does."""
    instruction, text = shape.content["instruction"], shape.content.get("input") or ""
    if not isinstance(text, str):
        return shape._replace(problem="has an 'input' that is no text in quotes")
    if not text.strip() or not isinstance(instruction, str):
        return shape
    joined = {**shape.content, "instruction": f"{instruction}\n{text}"}
    note = "'input' stands below 'instruction', in a line of its own"
    return shape._replace(content=joined, notes=(*shape.notes, note))


def _exchange(row: Mapping[str, Any], name: str) -> Shaped:
    """Return a chat of one question and its answer as a pair."""
    chat = row[name] if isinstance(row[name], list) else []
    turns = [turn if isinstance(turn, Mapping) else {} for turn in chat]
    roles = [str(turn.get("role") or turn.get("from")) for turn in turns]
    kinds = [_ROLES.get(role, role) for role in roles]
    if [kind for kind in kinds if kind != "system"] != [*PAIR]:
        speakers = ", ".join(roles[:6]) or "nobody"
        problem = f"{name!r} holds turns of {speakers}; one question and its answer are needed"
        return Shaped(row, {}, problem=problem)
    said = [turn.get("content", turn.get("value")) for turn in turns]
    texts = {kind: text for kind, text in zip(kinds, said, strict=True) if kind != "system"}
    notes = [f"the question and the answer are the turns of {name!r}"]
    if "system" in kinds:
        notes.append("system turns are left out (--system-prompt gives one)")
    return Shaped({**row, **texts}, {}, tuple(notes))
