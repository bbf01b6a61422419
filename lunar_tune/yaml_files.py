"""Reads YAML mappings strictly, and says in plain words what is wrong with them.

Covers: numbers, truth values and nulls as YAML 1.2 has them (PyYAML alone reads `1e-4` and
`1.0e2` as text, and `no` as false), repeated keys, tags, encodings, syntax with line and column;
plain words for what pydantic finds in such a file.
Does not cover: what the keys mean; the readers of the layers above check that.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from lunar_tune.errors import InputError
from lunar_tune.files import read_beginning

__all__ = ["describe_mistakes", "looks_like_number", "read_yaml_mapping", "shown", "suggestion"]

_MAX_BYTES: Final = 1_000_000  # settings that people write; PyYAML is slow
_TAG = "tag:yaml.org,2002:"
# The core schema of YAML 1.2 (section 10.3.2), with the characters that a value may start with.
_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_CORE_SCHEMA: Final = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)
_NUMBER: Final = re.compile(rf"(?:{_INT}|{_FLOAT})\Z")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, text keys that stand once, and no other tags."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.deep_construct = True  # so that an alias inside its own anchor is refused

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping; a key that is no text or stands twice is an error."""
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag != f"{_TAG}str":
                written = getattr(key_node, "value", "")
                name = repr(written) if isinstance(written, str) else "a list or mapping"
                raise _problem(key_node, f"the key {name} is no text; put it in quotes")
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                first = seen[key_node.value]
                raise _problem(
                    key_node,
                    f"the key {key_node.value!r} stands in line {first} already; keep one of them",
                )
            seen[key_node.value] = line
        return {key.value: self.construct_object(value, deep) for key, value in node.value}

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        """Return true or false; `yes`, `no`, `on` and `off` are text in YAML 1.2."""
        text = str(node.value).lower()
        if text not in ("true", "false"):
            raise _problem(node, f"{shown(text)} is neither true nor false")
        return text == "true"

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number; digits, 0o17 or 0x1F."""
        text = str(node.value)
        try:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        except ValueError as error:
            raise _problem(node, f"{shown(text)} cannot be read as a whole number") from error

    def construct_float(self, node: yaml.ScalarNode) -> float:
        """Return a number with a point or an exponent, infinity or NaN."""
        text = str(node.value)
        try:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            raise _problem(node, f"{shown(text)} cannot be read as a number") from error

    def refuse(self, node: yaml.Node) -> None:
        """Refuse a tag such as `!!python/object` or `!mine`."""
        tag = str(node.tag).replace(_TAG, "!!")
        raise _problem(node, f"the tag {tag} is not allowed; write plain values")


def _problem(node: yaml.Node, words: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=words, problem_mark=node.start_mark)


for _name, _pattern, _first in _CORE_SCHEMA:
    _StrictLoader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)
# Only these are known; sets, dates, binary data and everything of a user's own are refused.
_CONSTRUCTORS: Final[dict[Any, Any]] = {
    f"{_TAG}null": _StrictLoader.construct_yaml_null,
    f"{_TAG}bool": _StrictLoader.construct_bool,
    f"{_TAG}int": _StrictLoader.construct_int,
    f"{_TAG}float": _StrictLoader.construct_float,
    f"{_TAG}str": _StrictLoader.construct_yaml_str,
    f"{_TAG}seq": _StrictLoader.construct_yaml_seq,
    f"{_TAG}map": _StrictLoader.construct_yaml_map,
    None: _StrictLoader.refuse,
}
_StrictLoader.yaml_constructors = _CONSTRUCTORS


def read_yaml_mapping(path: Path, *, error_class: type[InputError] = InputError) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: The file, in UTF-8.
        error_class: What is raised.

    Raises:
        InputError: The file is missing, empty, not UTF-8, not YAML, repeats a key, uses a tag or
            is no mapping; `error_class` is raised, with file and place.
    """
    path = Path(path)
    text = _read_text(path, error_class)
    try:
        content = _StrictLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise error_class(f"{path}: {_syntax_problem(error, text)}") from error
    if content is None:
        raise error_class(f"{path}: the file is empty; write `key: value` lines")
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else shown(content)
        raise error_class(f"{path}: holds {kind}; its top level must be `key: value` lines")
    return content


def _read_text(path: Path, error_class: type[InputError]) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise error_class(
                f"{path}: is {path.stat().st_size:,} bytes large; at most {_MAX_BYTES:,} are read"
            )
        content = read_beginning(path, _MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise error_class(f"{path}: does not end; at most {_MAX_BYTES:,} bytes are read")
    except FileNotFoundError as error:
        raise error_class(f"{path}: there is no such file; check the path") from error
    except IsADirectoryError as error:
        raise error_class(f"{path}: is a folder; give a file in it") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise error_class(f"{path}: cannot be read ({reason})") from error
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte, line = content[error.start], content.count(b"\n", 0, error.start) + 1
        raise error_class(
            f"{path}: line {line}: is not UTF-8 (byte 0x{byte:02x}); save it as UTF-8"
        ) from error


def _syntax_problem(error: Exception, text: str) -> str:
    """Say what is wrong, after the place if it is known."""
    if isinstance(error, RecursionError):
        return "is nested too deeply; write fewer levels"
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        return f"line {line}, column {column}: holds a control character; remove it"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"is not valid YAML ({error})"
    mark = error.problem_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}"
    if type(error) is yaml.MarkedYAMLError:  # our own words
        return f"{place}: {error.problem}"
    problem = str(error.problem)
    if problem.startswith("but "):
        problem = f"{error.context} {problem}"
    advice = "indent with spaces" if "'\\t'" in problem else "mend that place"
    return f"{place}: is not valid YAML ({problem}); {advice}"


def shown(value: object) -> str:
    """Return a value as a message shows it, at most some eighty characters long."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    text = _SHORT.repr(value)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[: _SHOWN_CHARACTERS - 1]}…"
    return f"the text {text}" if isinstance(value, str) else text


_SHOWN_CHARACTERS: Final = 70
_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = 60
_SHORT.maxlevel = 2


def suggestion(name: str, existing: Iterable[str]) -> str:
    """Return ` Did you mean …? There are: ….` for a name that does not exist."""
    names = list(existing)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} There are: {', '.join(names) or 'none'}."


def looks_like_number(text: str) -> bool:
    """Say whether a text would be a number without its quotes."""
    return _NUMBER.match(text) is not None


def describe_mistakes(
    error: ValidationError, known_keys: Iterable[str], *, place: str = ""
) -> list[str]:
    """Return what pydantic found, a message for each mistake, that starts with the key.

    Args:
        error: Of the validation of a mapping that stood in a file.
        known_keys: Which keys there are, for those that are unknown.
        place: Where the mapping stood, as `lunar.adamw`; empty for the top level.
    """
    keys = list(known_keys)
    messages = []
    for mistake in error.errors(include_url=False):
        parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in mistake["loc"])
        key = f"{place}{''.join(parts)}".removeprefix(".")
        if mistake["type"] == "extra_forbidden":
            reason = f"is unknown.{suggestion(str(mistake['loc'][-1]), keys)}"
        else:
            reason = _reason(mistake["type"], mistake["input"], mistake.get("ctx", {}))
        messages.append(f"{key}: {reason}" if key else reason)
    return messages


_WANTED: Final = {
    "int_type": "a whole number is needed",
    "float_type": "a number is needed",
    "bool_type": "write true or false",
    "string_type": "a text is needed; put it in quotes",
    "list_type": "a list is needed, in square brackets",
    "dict_type": "`key: value` lines are needed",
    "finite_number": "a finite number is needed",
    "too_short": "at least one is needed",
}

_BOUNDS: Final = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _reason(kind: str, value: object, context: Mapping[str, Any]) -> str:
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("int_type", "float_type") and isinstance(value, str) and looks_like_number(value):
        return f"is {shown(value)}; remove the quotes to make it a number"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"is {shown(value)}; it must be {words} {context[bound]}"
    return f"is {shown(value)}; {_WANTED.get(kind, kind.replace('_', ' '))}"
