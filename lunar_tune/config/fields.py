"""Options as dataclass fields: one declaration says everything that is said of an option.

From it follow flag, key in files, check, signature and resuming; the text below it is the help.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lunar_tune.errors import InputError, Problems, close_name
from lunar_tune.secrets import without_password

_METADATA = "lunar_tune.option"
Options = TypeVar("Options")
Result = TypeVar("Result")
Keywords = ParamSpec("Keywords")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is said of one option, beside its name, type and default."""

    group: str  # heading of the help under which it stands
    metavar: str | None = None  # what its value looks like, where the type does not say it
    choices: tuple[str, ...] = ()  # the words that it may be; none allows any
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    """Bounds of a number; `above` and `below` are excluded."""
    common: bool = False  # whether `--help` shows it; `--help-all` shows all
    decides: bool = False  # whether trials with another value would not compare
    resume: bool = False
    """Whether `--resume` takes a new value. A place may be given anew although its content decides
    scores: that this is the same is checked by its digest."""
    place: bool = False  # whether it may name a file or folder, relative to where it was given
    commas: bool = False  # whether several values may stand in one text, with commas between
    positional: bool = False
    written: bool = False  # whether it names a file to write
    stored: bool = True
    """Whether it is part of what is kept of a search, and of the command that gives it again."""
    permission: bool = False
    """Whether it lets others' code run or names a host that is told data and passwords: only the
    command line of a run gives it, no file that somebody may have written."""
    before: Any = None
    """What searches did that know no such option, as their stored configuration is read."""
    same_as: tuple[Any, str] | None = field(default=None, compare=False)
    """Class and name of the option that it repeats."""


def option(default: Any, *, group: str, **facts: Any) -> Any:
    """Return the dataclass field of an `Option`."""
    return field(default=default, metadata={_METADATA: Option(group=group, **facts)})


def same_option(owner: Any, name: str, **changes: Any) -> Any:
    """Return an option of another class as a field, with other facts or another `default`."""
    declared = owner.__dataclass_fields__[name]
    default = changes.pop("default", declared.default)
    said = dataclasses.replace(declared.metadata[_METADATA], same_as=(owner, name), **changes)
    return field(default=default, metadata={_METADATA: said})


def shared_options(options: Any, owner: type[Options], without: Collection[str] = ()) -> Options:
    """Return options as another class has them, `without` those that mean something else there."""
    names = options_of(type(options)).keys() & options_of(owner).keys() - {*without}
    return owner(**{name: getattr(options, name) for name in names})


def options_of(owner: Any) -> Mapping[str, Option]:
    """Return the options of a class, by field name, in the order of declaration."""
    return {
        entry.name: entry.metadata[_METADATA]
        for entry in dataclasses.fields(owner)
        if _METADATA in entry.metadata
    }


def help_of(owner: Any, name: str) -> str:
    """Return what the help says of an option."""
    said = options_of(owner)[name]
    text = next(texts[name] for one in owner.__mro__ if name in (texts := _texts_below(one)))
    return text or (help_of(*said.same_as) if said.same_as is not None else "")


@functools.cache
def _texts_below(owner: type) -> Mapping[str, str]:
    """Return the text below each field that a class declares, empty where there is none."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    texts = {}
    for declared, below in pairwise([*body, ast.Pass()]):
        if isinstance(declared, ast.AnnAssign):
            text = ast.literal_eval(below.value) if isinstance(below, ast.Expr) else ""
            texts[ast.unparse(declared.target)] = " ".join(text.split())
    return texts


def permissions_in(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that only a command line gives, without defaults."""
    return {
        name: values[name]
        for name, said in options_of(owner).items()
        if said.permission and name in values and values[name] != getattr(owner, name)
    }


types_of = typing.get_type_hints  # of each field of a class


def flag_of(name: str) -> str:
    """Return a field or parameter as it is written on a command line."""
    return f"--{name.replace('_', '-')}"


def takes_options(
    owner: Callable[Keywords, Any],
) -> Callable[[Callable[..., Result]], Callable[Keywords, Result]]:
    """Give a function of keywords the options of a class: names, types, defaults and help."""

    def decorated(function: Callable[..., Result]) -> Callable[Keywords, Result]:
        kinds, taken = types_of(owner), inspect.signature(owner).parameters
        known = options_of(owner)
        names = sorted(known, key=lambda name: not known[name].common)
        signature = inspect.Signature(
            [taken[name].replace(annotation=kinds[name]) for name in names],
            return_annotation=function.__annotations__["return"],
        )
        helps = [f"    {name}: {help_of(owner, name)}" for name in names]
        function.__doc__ = "\n".join((inspect.getdoc(function) or "", "", "Args:", *helps))
        vars(function)["__signature__"] = signature
        return function

    return decorated


def check_values(values: Any, problems: Problems) -> None:
    """Note every value of an instance of options that is out of range."""
    for name, said in options_of(type(values)).items():
        value = getattr(values, name)
        for one in value if isinstance(value, tuple) else (value,):
            for complaint in _complaints(one, said):
                where = name if said.positional else flag_of(name)
                problems.add(f"{where} {one}: {complaint}.")


def _complaints(value: Any, said: Option) -> Iterator[str]:
    if value is None or isinstance(value, bool):
        return
    if said.choices and value not in said.choices:
        yield f"must be one of {', '.join(said.choices)}"
    if not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        yield "must be a finite number"
    elif said.above is not None and not value > said.above:
        yield f"must be more than {said.above:.10g}"
    elif said.least is not None and value < said.least:
        yield f"must be at least {said.least:.10g}"
    elif said.most is not None and value > said.most:
        yield f"must be at most {said.most:.10g}"
    elif said.below is not None and value >= said.below:
        yield f"must be less than {said.below:.10g}"


def options_again(config: Any, given: Collection[str]) -> tuple[str, ...]:
    """Return the options, to show, that give the `given` fields of a configuration again."""
    arguments: list[str] = []
    for name, said in options_of(type(config)).items():
        value, flag = getattr(config, name), flag_of(name)
        if not said.stored or name not in given or value in (None, getattr(type(config), name)):
            continue
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, tuple):
            texts = [",".join(value)] if said.commas else value
            arguments += [part for text in texts for part in (flag, text)]
        else:
            text = str(value)  # of which a path has no secret
            arguments += [flag, without_password(text) if "://" in text else text]
    return tuple(arguments)


def from_document(
    owner: type, values: Mapping[str, Any], *, source: str | None = None
) -> dict[str, Any]:
    """Return values of a file (`source`) or command line as options, or raise an InputError."""
    problems, known, kinds, read = Problems(), options_of(owner), types_of(owner), {}
    place = "" if source is None else f"{source}: "
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            problems.add(f"{place}{key} is not an option.{close_name(name, known)}")
            continue
        where = f"{place}{key}" if place else flag_of(name)
        try:
            typed = _typed(value, kinds[name])
        except ValueError:
            problems.add(f"{where} is {value!r}; {_kind(kinds[name])} is needed.")
            continue
        if known[name].commas:
            parts = (part.strip() for text in typed for part in text.split(","))
            typed = tuple(part for part in parts if part)
        if typed == () and value:
            problems.add(f"{where} is empty: name at least one, or leave the option out.")
        read[name] = typed
    problems.raise_if_any(InputError)
    return read


def typed_setting(name: str, value: Any, kind: Any) -> Any:
    """Return a setting's value as its type, or raise an InputError."""
    try:
        return _typed(value, kind)
    except ValueError:
        raise InputError(f"{name} {value}: {_kind(kind)} is needed.") from None


def _typed(value: Any, kind: Any) -> Any:
    """Return a value as a type, also a number or a text that spells it, or raise a ValueError."""
    from pydantic import ConfigDict, TypeAdapter  # slow to load, and no help needs it

    if isinstance(value, bool) is not (kind is bool):  # which pydantic takes for numbers too
        raise ValueError
    if typing.get_origin(kind) is tuple and not isinstance(value, list | tuple):
        value = (value,)
    if isinstance(value, int | float) and kind in (Path, Path | None):
        value = str(value)
    adapter = TypeAdapter(kind, config=ConfigDict(coerce_numbers_to_str=True))
    return adapter.validate_python(value)


def _kind(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    is_union = typing.get_origin(kind) in {types.UnionType, typing.Union}
    members = typing.get_args(kind) if is_union else (kind,)
    if typing.get_origin(members[0]) is typing.Literal:
        return " or ".join(typing.get_args(members[0]))
    return names.get(members[0], "a text or a list of texts")
