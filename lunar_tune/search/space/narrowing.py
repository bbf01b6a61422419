"""A search space with single parameters fixed or narrowed on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from lunar_tune.config.fields import types_of
from lunar_tune.config.run_options import read_range
from lunar_tune.errors import InputError, Problems
from lunar_tune.methods.contract import Method
from lunar_tune.methods.method_registry import METHODS
from lunar_tune.search.space.space import SearchSpace
from lunar_tune.search.space.space_kinds import (
    Choice,
    Fixed,
    FloatRange,
    IntRange,
    Parameter,
    middle_of,
)
from lunar_tune.yaml_files import describe_mistakes

__all__ = ["narrowed"]

Kind = TypeVar("Kind", IntRange, FloatRange, Fixed)


def narrowed(
    space: SearchSpace,
    method: Method,
    *,
    fixed: Mapping[str, Any],
    settings: Collection[str],
    ranges: Collection[str],
    n_layers: int,
) -> SearchSpace:
    """Return a space with some parameters fixed and others narrowed.

    Its starting points have what is fixed and the middle of what they did not name; those that lie
    outside a range are sorted out later.

    Args:
        space: As its file has it.
        method: What is searched.
        fixed: Values of parameters, by name.
        settings: Names of the method's settings that are fixed; the space searches them no more.
        ranges: Texts `NAME=LOW:HIGH`.
        n_layers: Number of the model's decoder blocks.

    Raises:
        InputError: A range means nothing here; all of it is said.
    """
    problems = Problems()
    parameters = {name: kind for name, kind in space.parameters.items() if name not in settings}
    for name, value in fixed.items():
        with problems.collect():
            parameters[name] = _fixed(f"--fix {name}={value}", value, whole=name == "layer")
    named = {*fixed, *settings}
    for text in ranges:
        with problems.collect():
            name, low, high = read_range(text)
            if name in named:
                raise InputError(f"--range {text}: {name} is named twice; leave one of them out.")
            known = {*parameters, *method.optional_parameters}
            if name not in known:
                raise InputError(
                    f"--range {text}: --method {method.name} ({method.variant}) searches no "
                    f"{name}. There are: {', '.join(sorted(known))}."
                )
            named.add(name)
            whole = name == "layer" or types_of(METHODS[method.name].settings).get(name) is int
            parameters[name] = _ranged(text, parameters.get(name), low, high, whole=whole)
    problems.raise_if_any(InputError)
    _check_ends(parameters, method, n_layers, named=bool(fixed or ranges))
    points = tuple(_completed(point, parameters) for point in space.starting_points)
    return dataclasses.replace(space, parameters=parameters, starting_points=points)


def _check_ends(
    parameters: Mapping[str, Parameter], method: Method, n_layers: int, *, named: bool
) -> None:
    """Check that the model has the layers, and that the method takes both ends of what is named.

    Raises:
        InputError: It does not.
    """
    problems = Problems()
    ends = [{name: kind.bounds[end] for name, kind in parameters.items()} for end in (0, 1)]
    for setting in ends if named else ():
        if not 0 <= setting.get("layer", 0) < n_layers:
            layer = f"{setting['layer']:g}"
            problems.add(f"layer {layer}: the model has blocks 0 to {n_layers - 1}.")
        with problems.collect():
            method.check_parameters(setting)
    problems.raise_if_any(InputError)


def _completed(
    point: Mapping[str, int | float], parameters: Mapping[str, Parameter]
) -> dict[str, int | float]:
    """Return a starting point with what is fixed, and the middle of what it does not name."""
    return {
        name: middle_of(kind) if isinstance(kind, Fixed) or name not in point else point[name]
        for name, kind in parameters.items()
    }


def _fixed(option: str, value: Any, *, whole: bool) -> Fixed:
    number = value
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = _as_whole(value) if whole else float(value)
    if whole and isinstance(number, float):
        raise InputError(f"{option}: a whole number is needed.")
    return _made(Fixed, option, value=number)


def _ranged(
    text: str, kind: Parameter | None, low: float, high: float, *, whole: bool
) -> Parameter:
    """Return a parameter within bounds; one that was chosen from a list keeps what lies in them."""
    option = f"--range {text}"
    if isinstance(kind, Choice):
        values = tuple(value for value in kind.values if low <= value <= high)
        if not values:
            raise InputError(f"{option}: holds none of {kind.describe()}.")
        return Choice(values=values)
    if low == high:
        return _fixed(option, low, whole=whole)
    if whole:
        return _made(IntRange, option, low=_as_whole(low), high=_as_whole(high))
    log = isinstance(kind, FloatRange) and kind.log
    return _made(FloatRange, option, low=low, high=high, log=log)


def _as_whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _made(kind: type[Kind], option: str, **values: Any) -> Kind:
    """Return a parameter.

    Raises:
        InputError: The values are none of its kind.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(f"{option}: {'; '.join(describe_mistakes(error, ()))}.") from error
