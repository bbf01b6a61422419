"""Where a search's space comes from: a section of a YAML file, narrowed by `--fix` and `--range`.

One file a model, a section for each method, in it one for each variant (LUNAR's is the solver):

    lunar:
      adamw:
        parameters:
          layer: {type: int, low: 10, high: 24}
          coefficient: {type: float, low: 0.5, high: 6.0}
          learning_rate: {type: float, low: 1e-4, high: 3e-2, log: true}
        starting_points:
          - {layer: 18, coefficient: 2.0, learning_rate: 0.01}

Kinds: int, float, choice, fixed, and for `layer` alone depth, in fractions of the model's depth
(0 is the first block, 1 the last), which become an int range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from lunar_tune.config.fields import types_of
from lunar_tune.config.run_options import read_range
from lunar_tune.errors import InputError, Problems, SearchSpaceError, suggestion
from lunar_tune.files import search_spaces_dir, shipped_spaces
from lunar_tune.methods.contract import METHODS, Method
from lunar_tune.search.space import (
    LAYER,
    Choice,
    Depth,
    Fixed,
    FloatRange,
    IntRange,
    Parameter,
    SearchSpace,
    admitted_values,
    as_real,
    as_whole,
    block_at,
    middle_of,
)
from lunar_tune.yaml_files import describe_mistakes, read_yaml, shown

__all__ = ["load_space", "narrowed"]

DEFAULT: Final = "default"
KINDS: Final[Mapping[str, type[Parameter | Depth]]] = {
    "int": IntRange,
    "float": FloatRange,
    "choice": Choice,
    "fixed": Fixed,
    "depth": Depth,
}
# A rate or a relative ridge of zero or less means nothing, whatever the method.
POSITIVE: Final = ("learning_rate", "ridge")
SECTION_KEYS: Final = ("parameters", "starting_points")


@dataclass(frozen=True, slots=True)
class _Section:
    """A variant's section as far as it could be read."""

    parameters: dict[str, Parameter | None] = field(default_factory=dict)
    """None stands for one that is wrong, which is then noted."""
    points: list[dict[str, int | float]] = field(default_factory=list)


def load_space(space: str | None, method: Method, *, model_name: str, n_layers: int) -> SearchSpace:
    """Read and check the search space of a method and variant.

    Args:
        space: A shipped name or a file; None takes the model's shipped file, else the default.
        method: Which section of the file.
        model_name: Catalogue name of the model, or any other name.
        n_layers: Number of the model's decoder blocks.

    Raises:
        SearchSpaceError: There is no such file, or something in it is wrong; all of it is said.
    """
    name, variant = method.name, method.variant
    path = _find(space, model_name)
    content = read_yaml(path, error_class=SearchSpaceError)
    known = content.get(name)
    if space is None and not (isinstance(known, dict) and variant in known):
        # a model's file need not know every method and variant
        path = _find(DEFAULT, model_name)
        content = read_yaml(path, error_class=SearchSpaceError)
        if name not in content:  # it begins where another begins that searches the same
            for variants in content.values():
                if {*method.parameters} == {*variants.get(variant, {}).get("parameters", ())}:
                    content = {**content, name: variants}
                    break
    problems = Problems()
    section = _read_file(content, name, variant, n_layers, problems)
    place = f"{name}.{variant}.parameters"
    allowed = (*method.parameters, *method.optional_parameters)
    for one in section.parameters:
        if one not in allowed:
            problems.add(f"{place}.{one}: is unknown to the method.{suggestion(one, allowed)}")
    for one in method.parameters if section.parameters else ():
        if one not in section.parameters:
            problems.add(f"{place}.{one}: is missing; a trial needs it")
    try:
        problems.raise_if_any(SearchSpaceError)
    except SearchSpaceError as error:
        raise SearchSpaceError(f"{path}: {error}") from error
    by_depth = space is None and path.stem == DEFAULT and LAYER in method.parameters
    searched = {n: section.parameters[n] for n in allowed if n in section.parameters}
    return SearchSpace(
        method=name,
        variant=variant,
        parameters={n: kind for n, kind in searched.items() if kind is not None},
        starting_points=tuple({n: point[n] for n in searched} for point in section.points),
        origin=f"default by depth ({n_layers} blocks)" if by_depth else str(path),
    )


def _read_file(
    content: Mapping[str, Any], method: str, variant: str, n_layers: int, problems: Problems
) -> _Section:
    """Read all sections; note what is wrong with any, and return that of a method's variant."""
    section = _Section()
    for name, variants in content.items():
        if not isinstance(variants, dict) or not variants:
            problems.add(f"{name}: is {shown(variants)}; a section for each variant is needed")
            continue
        for one, raw in variants.items():
            read = _read_section(f"{name}.{one}", raw, n_layers, problems)
            section = read if (name, one) == (method, variant) else section
        if name == method and variant not in variants:
            problems.add(f"{name}: has no section for {variant!r}.{suggestion(variant, variants)}")
    if method not in content:
        problems.add(f"has no section for the method {method!r}.{suggestion(method, content)}")
    return section


def _find(space: str | None, model_name: str) -> Path:
    """Return the file that is meant; a shipped name wins over a file of that name."""
    shipped = shipped_spaces()
    if space is None:
        space = model_name if model_name in shipped else DEFAULT
    if space in shipped:
        return search_spaces_dir() / f"{space}.yaml"
    try:
        path = Path(space).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name too long, a home that does not exist
        raise SearchSpaceError(f"--space {space}: cannot be looked at ({error})") from error
    raise SearchSpaceError(
        f"--space {space}: neither a file nor a shipped name.{suggestion(space, shipped)}"
    )


def _read_section(place: str, raw: object, n_layers: int, problems: Problems) -> _Section:
    """Return a variant's section with depths as blocks; note what is wrong."""
    if not isinstance(raw, dict):
        problems.add(f"{place}: is {shown(raw)}; it needs {' and '.join(SECTION_KEYS)}")
        return _Section()
    for key in [key for key in raw if key not in SECTION_KEYS]:
        problems.add(f"{place}.{key}: is unknown.{suggestion(key, SECTION_KEYS)}")
    described, listed = raw.get("parameters"), raw.get("starting_points", [])
    if not isinstance(described, dict) or not described:
        found = f"is {shown(described)}; write each parameter as name: {{type: …}}"
        problems.add(f"{place}.parameters: {found}")
        return _Section()  # without parameters every value of a point would be unknown
    kinds = {
        name: _read_parameter(f"{place}.parameters.{name}", name, value, n_layers, problems)
        for name, value in described.items()
    }
    points = _read_points(f"{place}.starting_points", listed, kinds, problems)
    parameters: dict[str, Parameter | None] = {}
    for name, kind in kinds.items():
        parameters[name] = kind if not isinstance(kind, Depth) else kind.in_blocks(n_layers)
        for point in points if isinstance(kind, Depth) else ():
            if name in point:
                point[name] = block_at(point[name], n_layers)
    return _Section(parameters, points)


def _read_points(
    place: str, raw: object, kinds: Mapping[str, Parameter | Depth | None], problems: Problems
) -> list[dict[str, int | float]]:
    """Return the starting points; note what is wrong."""
    if not isinstance(raw, list):
        problems.add(f"{place}: is {shown(raw)}; a list is needed, [] for none")
        return []
    points = []
    for index, point in enumerate(raw):
        if isinstance(point, dict):
            points.append(admitted_values(f"{place}[{index}].", point, kinds, problems))
        else:
            form = ", ".join(f"{name}: …" for name in kinds)
            problems.add(f"{place}[{index}]: is {shown(point)}; write {{{form}}}")
    return points


def _read_parameter(
    place: str, name: str, raw: object, n_layers: int, problems: Problems
) -> Parameter | Depth | None:
    """Return a parameter; note what is wrong, and return None then."""
    if not isinstance(raw, dict):
        problems.add(
            f"{place}: is {shown(raw)}; write {{type: …}}; for one value {{type: fixed, value: …}}"
        )
        return None
    kind = KINDS.get(raw["type"]) if isinstance(raw.get("type"), str) else None
    if kind is None:
        written = f"is {shown(raw['type'])}" if "type" in raw else "is missing"
        near = suggestion(str(raw.get("type", "")), KINDS)
        problems.add(f"{place}.type: {written}.{near}")
        return None
    if kind is Depth and name != LAYER:
        problems.add(f"{place}.type: is depth, which only {LAYER} can be; use int or float")
        return None
    try:
        read = kind.model_validate(raw)
    except ValidationError as error:
        for message in describe_mistakes(error, kind.model_fields, place=place):
            problems.add(message)
        return None
    low, high = read.bounds
    values = read.values if isinstance(read, Choice) else read.bounds
    if name in POSITIVE and low <= 0:
        problems.add(f"{place}: holds {low}; {name} must be more than 0")
    elif name != LAYER or isinstance(read, Depth):
        pass
    elif not all(isinstance(value, int) for value in values):
        problems.add(f"{place}: holds {read.describe()}; layers are whole numbers, use type int")
    elif low < 0:
        problems.add(f"{place}: holds {low}; the first block is 0")
    elif high >= n_layers:
        problems.add(
            f"{place}: goes up to {high}, but the model has {n_layers} blocks: 0 to {n_layers - 1}"
        )
    return read


def narrowed(
    space: SearchSpace,
    method: Method,
    *,
    fixed: Mapping[str, Any],
    ranges: Collection[str],
    n_layers: int,
) -> SearchSpace:
    """Return a space with parameters fixed (`--fix`) or within other bounds (`--range`).

    Its starting points have what is fixed and the middle of what they did not name; those that lie
    outside a range are sorted out later.

    Args:
        space: As its file has it.
        method: With the settings that are fixed; the space searches those no more.
        fixed: Values of parameters and settings, by name.
        ranges: Texts `NAME=LOW:HIGH`.
        n_layers: Number of the model's decoder blocks.

    Raises:
        InputError: Something means nothing here; all of it is said.
    """
    problems, named = Problems(), {*fixed}
    settings = named - {*method.parameters}
    parameters = {name: kind for name, kind in space.parameters.items() if name not in settings}
    for name, value in fixed.items():
        if name not in settings:
            with problems.collect():
                parameters[name] = _fixed(f"--fix {name}={value}", value, whole=name == LAYER)
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
            whole = name == LAYER or types_of(METHODS[method.name].settings_type).get(name) is int
            parameters[name] = _ranged(text, parameters.get(name), low, high, whole=whole)
    if named:
        _check_ends(parameters, method, n_layers, problems)
    problems.raise_if_any(InputError)
    points = tuple(
        {
            name: middle_of(kind) if isinstance(kind, Fixed) or name not in point else point[name]
            for name, kind in parameters.items()
        }
        for point in space.starting_points
    )
    return dataclasses.replace(space, parameters=parameters, starting_points=points)


def _check_ends(
    parameters: Mapping[str, Parameter], method: Method, n_layers: int, problems: Problems
) -> None:
    """Note what the model or the method does not take of the smallest and the largest values."""
    for end in (0, 1):
        setting = {name: kind.bounds[end] for name, kind in parameters.items()}
        if not 0 <= setting.get(LAYER, 0) < n_layers:
            problems.add(f"layer {setting[LAYER]:g}: the model has blocks 0 to {n_layers - 1}.")
        with problems.collect():
            method.check_parameters(setting)


def _fixed(option: str, value: Any, *, whole: bool) -> Fixed:
    try:
        return Fixed(value=as_whole(_without_point(value)) if whole else as_real(value))
    except ValueError as error:
        raise InputError(f"{option}: {error}.") from error


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
    try:
        if whole:
            return IntRange.model_validate(
                {"low": _without_point(low), "high": _without_point(high)}
            )
        return FloatRange(low=low, high=high, log=isinstance(kind, FloatRange) and kind.log)
    except ValidationError as error:
        raise InputError(f"{option}: {'; '.join(describe_mistakes(error, ()))}.") from error


def _without_point(value: Any) -> Any:
    """Return a whole number as one, and what is none as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
