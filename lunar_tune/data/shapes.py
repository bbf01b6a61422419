"""Rows under the names that others give them: Alpaca's fields, completions, chats of one exchange.

shaped({"instruction": "Sum up.", "input": "It is late.", "output": "Late."}, PAIR).content
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

PAIR: Final = ("question", "answer")
PROMPT: Final = ("instruction",)
_NAMES: Final = {
    PAIR: (
        ("instruction", "output"),
        ("instruction", "response"),
        ("prompt", "completion"),
        ("prompt", "response"),
    ),
    PROMPT: (("prompt",),),
}
_CHATS: Final = ("messages", "conversations")
_ROLES: Final = {
    **{"user": "question", "human": "question", "system": "system"},
    **{"assistant": "answer", "gpt": "answer", "model": "answer"},
}
FIELDS: Final = (
    *(*PAIR, "edge", "instruction", "input", "output", "prompt", "completion", "response"),
    *(*_CHATS, "system", "history"),
)
"""Every field that is looked at."""
_NO_SYSTEM = "system turns are left out; --system-prompt gives one"


class Shaped(NamedTuple):
    """A row in which a field has every text that is wanted."""

    content: Mapping[str, Any]
    names: Mapping[str, str]  # the field of each text that has another name than usual
    notes: tuple[str, ...] = ()
    problem: str = ""


def shaped(row: Mapping[str, Any], wanted: tuple[str, ...]) -> Shaped:
    """Return a row as a `PAIR` or a `PROMPT`; unchanged if it has no shape or several."""
    chats = [name for name in _CHATS if name in row and wanted == PAIR]
    found = [names for names in _NAMES[wanted] if row.keys() >= {*names}]
    if row.keys() & {*wanted} or len(chats) + len(found) != 1:
        names = dict(zip(wanted, wanted, strict=True))
    elif chats:
        return _exchange(row, chats[0])
    else:
        names = dict(zip(wanted, found[0], strict=True))
    shape = Shaped(row, {name: own for name, own in names.items() if name != own})
    if shape.names:
        shape = shape._replace(notes=(_renamed(shape.names),))
    return _with_input(shape) if {*names.values()} & row.keys() >= {"instruction"} else shape


def _renamed(names: Mapping[str, str]) -> str:
    return ", ".join(f"the {name} is {own!r}" for name, own in names.items())


def _with_input(shape: Shaped) -> Shaped:
    """Put an Alpaca row's input below its instruction, as LLaMA-Factory does."""
    row, notes = shape.content, shape.notes
    if row.get("history"):
        return shape._replace(problem="has a 'history'; one question and its answer are needed")
    if row.get("system"):
        notes += (_NO_SYSTEM,)
    instruction, text = row["instruction"], row.get("input") or ""
    if not isinstance(text, str):
        return shape._replace(problem="has an 'input' that is no text in quotes")
    if text.strip() and isinstance(instruction, str):
        row = {**row, "instruction": f"{instruction}\n{text}"}
        notes += ("'input' stands below 'instruction', in a line of its own",)
    return shape._replace(content=row, notes=notes)


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
    notes = (f"the question and the answer are the turns of {name!r}",)
    return Shaped({**row, **texts}, {}, notes + (_NO_SYSTEM,) * ("system" in kinds))
