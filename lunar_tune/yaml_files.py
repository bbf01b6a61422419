"""Reads and writes YAML 1.2 mappings; says what is wrong with one, and where."""

from __future__ import annotations

import io
import re
import reprlib
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError, YAMLWarning
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from lunar_tune.errors import InputError, suggestion
from lunar_tune.files import decoded, read_settings

MAX_DEPTH: Final = 50  # the parser takes seconds for hundreds of levels
MAX_VALUES: Final = 100_000  # with aliases, ten lines can stand for a billion values
_PLAIN: Final = (dict, list, str, int, float, bool, type(None))
# Texts that a reader of YAML 1.1, such as PyYAML, takes for something else without quotes.
_AMBIGUOUS: Final = re.compile(
    r"[-+.~0-9=<].*|y|n|yes|no|on|off|true|false|null|.*[\x85\u2028\u2029].*", re.I | re.S
)


def read_yaml(source: Path | str, *, error_class: type[InputError] = InputError) -> dict[str, Any]:
    """Read a YAML mapping of plain values with text keys, from a file or a text.

    What cannot be read, repeats a key, is too large or deep, or holds anything but plain values
    raises an `error_class` with file and place.
    """
    try:
        text = source
        if isinstance(source, Path):
            text, _ = decoded(read_settings(source), source, error_class=error_class)
        # The parser in C, which `pure` rules out, follows YAML 1.1.
        yaml = YAML(typ="safe", pure=True)
        yaml.max_depth = MAX_DEPTH
        with warnings.catch_warnings():
            warnings.simplefilter("error", YAMLWarning)  # as for an anchor that stands twice
            return _checked(yaml.load(text))
    except RecursionError:
        problem = "is nested too deeply, or contains itself; write fewer levels"
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        problem = place + ", ".join(filter(None, (error.context, error.problem)))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except (YAMLError, YAMLWarning, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"cannot be read: {error}"
    where = f"{source}: " if isinstance(source, Path) else ""
    raise error_class(where + textwrap.shorten(problem, 300, placeholder=" …"))


def _checked(document: Any) -> dict[str, Any]:
    """Return the document if it is a mapping of plain values that is not too large."""
    if not isinstance(document, dict):
        raise ValueError(f"it is {shown(document)}; write `key: value` lines")
    for number, value in enumerate(_values(document)):
        if number == MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values, aliases counted in full")
        if type(value) not in _PLAIN:
            raise ValueError(f"it holds {shown(value)}; write a number, a text in quotes, a list")
        odd = [key for key in value if not isinstance(key, str)] if type(value) is dict else []
        if odd:
            raise ValueError(f"the key {shown(odd[0])} is no text; put it in quotes")
    return document


def _values(value: object) -> Iterator[object]:
    """Yield a value and all that it holds, as often as aliases repeat it."""
    yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _values(part)


class _Representer(SafeRepresenter):
    """Writes numbers and texts so that YAML 1.1 and 1.2 read the same."""

    def represent_text(self, text: str) -> ScalarNode:
        """Quote what could be something else."""
        style = '"' if _AMBIGUOUS.fullmatch(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def represent_number(self, number: float) -> ScalarNode:
        """Write a point, without which 1e-05 is a text in YAML 1.1."""
        node: ScalarNode = self.represent_float(number)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


_Representer.add_representer(str, _Representer.represent_text)
_Representer.add_representer(float, _Representer.represent_number)


def write_yaml(document: Mapping[str, Any]) -> str:
    """Return a mapping of plain values as YAML, its keys in their order."""
    yaml: Any = YAML(typ="safe", pure=True)  # its attributes are typed by their first values
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(dict(document), stream)
    return stream.getvalue()


def shown(value: object) -> str:
    """Return a value as a message shows it, at most some eighty characters long."""
    if value is None or isinstance(value, bool):
        return "empty" if value is None else str(value).lower()
    text = textwrap.shorten(_SHORT.repr(value), 70, placeholder="…")
    return f"the text {text}" if isinstance(value, str) else text


_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = 60
_SHORT.maxlevel = 2


def describe_mistakes(
    error: ValidationError, known_keys: Iterable[str] = (), *, place: str = ""
) -> str:
    """Return what pydantic found in a file's mapping, every mistake with its key.

    `place` is where the mapping stood, as `lunar.adamw`; empty for the top level.
    """
    keys = list(known_keys)
    messages = []
    for mistake in error.errors(include_url=False):
        parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in mistake["loc"])
        key = f"{place}{''.join(parts)}".removeprefix(".")
        words = mistake["msg"].replace("Input should", "it should")
        name = str(mistake["loc"][-1]) if mistake["loc"] else ""
        reason = {
            "extra_forbidden": f"is unknown.{suggestion(name, keys)}",
            "unexpected_keyword_argument": f"is unknown.{suggestion(name, keys)}",
            "missing": "is missing",
            "missing_keyword_only_argument": "is missing",
            "value_error": str(mistake.get("ctx", {}).get("error")),
        }.get(mistake["type"], f"is {shown(mistake['input'])}; {words}")
        messages.append(f"{key}: {reason}" if key else reason)
    return "; ".join(messages)
