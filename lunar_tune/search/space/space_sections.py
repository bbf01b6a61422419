"""The sections of a search-space file: from what YAML holds to checked parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from lunar_tune.errors import Problems, suggestion
from lunar_tune.search.space.space_kinds import KINDS, Choice, Depth, Parameter, block_at
from lunar_tune.yaml_files import describe_mistakes, shown

__all__ = [
    "Resolved",
    "Section",
    "admitted_values",
    "choose_section",
    "read_sections",
    "resolve_section",
]

LAYER: Final = "layer"
# A rate or a relative ridge of zero or less means nothing, whatever the method.
POSITIVE: Final = ("learning_rate", "ridge")
SECTION_KEYS: Final = ("parameters", "starting_points")


@dataclass(frozen=True, slots=True)
class Section:
    """One variant's section as read; a parameter that could not be read is None."""

    kinds: dict[str, Parameter | Depth | None]
    points: list[dict[str, int | float]]


@dataclass(frozen=True, slots=True)
class Resolved:
    """One variant's section with depths resolved."""

    parameters: dict[str, Parameter]
    points: list[dict[str, int | float]]


Sections = dict[str, dict[str, Section]]


def read_sections(content: Mapping[str, Any], n_layers: int | None, problems: Problems) -> Sections:
    """Read every section of a file by method and variant; note what is wrong."""
    sections: Sections = {}
    for method, variants in content.items():
        sections[method] = {}
        if not isinstance(variants, dict) or not variants:
            problems.add(f"{method}: is {shown(variants)}; a section for each variant is needed")
            continue
        for variant, raw in variants.items():
            place = f"{method}.{variant}"
            sections[method][variant] = _read_section(place, raw, n_layers, problems)
    return sections


def _read_section(place: str, raw: object, n_layers: int | None, problems: Problems) -> Section:
    if not isinstance(raw, dict):
        problems.add(f"{place}: is {shown(raw)}; it needs {' and '.join(SECTION_KEYS)}")
        return Section({}, [])
    for key in [key for key in raw if key not in SECTION_KEYS]:
        problems.add(f"{place}.{key}: is unknown.{suggestion(key, SECTION_KEYS)}")
    kinds = _read_parameters(f"{place}.parameters", raw.get("parameters"), n_layers, problems)
    points = _read_points(
        f"{place}.starting_points", raw.get("starting_points", []), kinds, problems
    )
    return Section(kinds, points)


def _read_parameters(
    place: str, raw: object, n_layers: int | None, problems: Problems
) -> dict[str, Parameter | Depth | None]:
    if not isinstance(raw, dict) or not raw:
        problems.add(f"{place}: is {shown(raw)}; write each parameter as name: {{type: …}}")
        return {}
    kinds = {}
    for name, value in raw.items():
        kinds[name] = _read_parameter(f"{place}.{name}", name, value, problems)
        _check_rules(f"{place}.{name}", name, kinds[name], n_layers, problems)
    return kinds


def _read_points(
    place: str,
    raw: object,
    kinds: Mapping[str, Parameter | Depth | None],
    problems: Problems,
) -> list[dict[str, int | float]]:
    if not isinstance(raw, list):
        problems.add(f"{place}: is {shown(raw)}; a list is needed, [] for none")
        return []
    if not kinds:  # that is noted already, and would make every value unknown
        return []
    return [
        admitted_values(f"{place}[{index}]", point, kinds, problems)
        for index, point in enumerate(raw)
    ]


def _read_parameter(
    place: str, name: str, raw: object, problems: Problems
) -> Parameter | Depth | None:
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
        return kind.model_validate(raw)
    except ValidationError as error:
        for message in describe_mistakes(error, kind.model_fields, place=place):
            problems.add(message)
    return None


def _check_rules(
    place: str,
    name: str,
    kind: Parameter | Depth | None,
    n_layers: int | None,
    problems: Problems,
) -> None:
    """Check what holds for a parameter of that name, whatever the file says."""
    if kind is None or isinstance(kind, Depth):
        return
    low, high = kind.bounds
    if name in POSITIVE and low <= 0:
        problems.add(f"{place}: holds {low}; {name} must be more than 0")
    if name != LAYER:
        return
    values = kind.values if isinstance(kind, Choice) else kind.bounds
    if not all(isinstance(value, int) for value in values):
        problems.add(f"{place}: holds {kind.describe()}; layers are whole numbers, use type int")
    elif low < 0:
        problems.add(f"{place}: holds {low}; the first block is 0")
    elif n_layers is not None and high >= n_layers:
        problems.add(
            f"{place}: goes up to {high}, but the model has {n_layers} blocks: 0 to {n_layers - 1}"
        )


def admitted_values(
    place: str,
    point: object,
    kinds: Mapping[str, Parameter | Depth | None],
    problems: Problems,
) -> dict[str, int | float]:
    """Return a point's values as their kinds hold them; note what is wrong."""
    start = f"{place}." if place else ""
    if not isinstance(point, Mapping):
        problems.add(f"{place}: is {shown(point)}; write {{{', '.join(f'{n}: …' for n in kinds)}}}")
        return {}
    for name in point:
        if name not in kinds:
            problems.add(f"{start}{name}: is unknown.{suggestion(str(name), kinds)}")
    admitted: dict[str, int | float] = {}
    for name, kind in kinds.items():
        if name not in point:
            problems.add(f"{start}{name}: is missing")
        elif kind is not None:
            try:
                admitted[name] = kind.admit(point[name])
            except ValueError as error:
                problems.add(f"{start}{name}: {error}")
    return admitted


def choose_section(sections: Sections, method: str, variant: str, problems: Problems) -> Section:
    """Return one section, an empty one where it is not there, which is then noted."""
    if method not in sections:
        problems.add(f"has no section for the method {method!r}.{suggestion(method, sections)}")
    elif variant not in sections[method]:
        # An unreadable section is named already.
        if sections[method]:
            near = suggestion(variant, sections[method])
            problems.add(f"{method}: has no section for {variant!r}.{near}")
    else:
        return sections[method][variant]
    return Section({}, [])


def resolve_section(
    section: Section,
    place: str,
    parameters: tuple[str, ...],
    n_layers: int | None,
    problems: Problems,
    *,
    optional: tuple[str, ...] = (),
) -> Resolved:
    """Turn depths into blocks, and check that the parameters are the method's."""
    for name in parameters:
        if section.kinds and name not in section.kinds:
            problems.add(f"{place}.parameters.{name}: is missing; a trial needs it")
    resolved: dict[str, Parameter] = {}
    points = [dict(point) for point in section.points]
    for name, kind in section.kinds.items():
        if name not in (*parameters, *optional):
            near = suggestion(name, (*parameters, *optional))
            problems.add(f"{place}.parameters.{name}: is unknown to the method.{near}")
        if isinstance(kind, Depth):
            if n_layers is None:
                problems.add(
                    f"{place}.parameters.{name}: is given by depth, but the model's number of "
                    "blocks is not known; give --space FILE with type int"
                )
                continue
            resolved[name] = kind.resolved(n_layers)
            for point in points:
                if name in point:
                    point[name] = block_at(point[name], n_layers)
        elif kind is not None:
            resolved[name] = kind
    return Resolved(resolved, points)
