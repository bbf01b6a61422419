"""Where a search's space comes from: a section of a YAML file, narrowed by `--fix` and `--range`.

One file a model, a section for each method, in it one for each variant (docs/search-space.md).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from lunar_tune.config.fields import types_of
from lunar_tune.config.options import AUTO, SearchConfig, read_assignments, read_range
from lunar_tune.driver.space import (
    KINDS,
    Parameter,
    SearchSpace,
    admitted_values,
    as_number,
    as_whole,
    block_at,
    bounds_of,
    described,
    middle_of,
    numbers_in,
)
from lunar_tune.errors import InputError, Problems, SearchSpaceError, suggestion
from lunar_tune.files import is_file, is_plain, shipped_folder, shipped_spaces
from lunar_tune.methods.contract import Method
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import LAYER
from lunar_tune.study.stored_search import StoredConfig
from lunar_tune.yaml_files import describe_mistakes, read_yaml, shown

DEFAULT: Final = "default"
# A rate or a relative ridge of zero or less means nothing, whatever the method.
POSITIVE: Final = ("learning_rate", "ridge")
WHOLE_SPACE: Final = "space_before_layers"  # in `config.yaml`: before scored layers narrowed it
LOST_SPACE: Final = (
    "It has not kept the space in which its layers were scored: if that is not shipped any more, "
    "its results can still be read, and a new search goes on from its best setting (--start-from)."
)
SECTION_KEYS: Final = ("parameters", "starting_points")
Points = list[dict[str, int | float]]


def space_begun_with(config: SearchConfig) -> Mapping[str, Any] | None:
    """Return the space of a search that is gone on with; None where it is read from its file.

    An older search that scored its layers itself has not kept it. If its file is not shipped any
    more either, that is an InputError.
    """
    named = config.space
    is_shipped = named is None or named in shipped_spaces()
    was_shipped = not is_shipped and is_plain(str(named)) and not is_file(Path(str(named)))
    if config.resume is None or not (is_shipped or was_shipped):
        return None
    stored = StoredConfig.begun(Folder((config.output / config.resume).resolve()))
    if stored is None or stored.search.space != named:
        return None
    space: Mapping[str, Any] | None
    space = stored.resolved.get(WHOLE_SPACE if config.layer_prior == AUTO else "space")
    if was_shipped and space is None:
        raise InputError(f"{config.resume}: was begun with the space {named}. {LOST_SPACE}")
    return space


def load_space(
    space: str | None,
    method: Method,
    *,
    model_name: str,
    n_layers: int,
    begun_with: Mapping[str, Any] | None = None,
) -> SearchSpace:
    """Read and check the search space of a method and variant, or raise a SearchSpaceError.

    `space` is a shipped name or a file; None takes the model's shipped file, else the default. What
    a search has `begun_with` (`SearchSpace.to_dict`) it goes on with: shipped files may change.
    """
    name, variant = method.name, method.variant
    content: Mapping[str, Any]
    if begun_with is not None:
        path = Path(str(begun_with.get("origin")))
        content = {name: {variant: {key: begun_with.get(key) for key in SECTION_KEYS}}}
    else:
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
    sections = _read_sections(content, n_layers, problems)
    place = f"{name}.{variant}"
    if place not in sections:
        problems.add(f"has no section {place}.{suggestion(place, sections)}")
    parameters, points = sections.get(place, ({}, []))
    allowed = (*method.parameters, *method.optional_parameters)
    for one in parameters:
        if one not in allowed:
            near = suggestion(one, allowed)
            problems.add(f"{place}.parameters.{one}: is unknown to the method.{near}")
    for one in method.parameters if parameters else ():
        if one not in parameters:
            problems.add(f"{place}.parameters.{one}: is missing; a trial needs it")
    try:
        problems.raise_if_any(SearchSpaceError)
    except SearchSpaceError as error:
        raise SearchSpaceError(f"{path}: {error}") from error
    by_depth = space is None and path.stem == DEFAULT and LAYER in method.parameters
    searched = [one for one in allowed if one in parameters]
    return SearchSpace(
        method=name,
        variant=variant,
        parameters={one: kind for one in searched if (kind := parameters[one]) is not None},
        starting_points=tuple({one: point[one] for one in searched} for point in points),
        origin=f"default by depth ({n_layers} blocks)" if by_depth else str(path),
    )


def _find(space: str | None, model_name: str) -> Path:
    """Return the file that is meant; a shipped name wins over a file of that name."""
    shipped = shipped_spaces()
    if space is None:
        space = model_name if model_name in shipped else DEFAULT
    if space in shipped:
        return shipped_folder("search_spaces") / f"{space}.yaml"
    try:
        path = Path(space).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name too long, a home that does not exist
        raise SearchSpaceError(f"--space {space}: cannot be read ({error})") from error
    raise SearchSpaceError(
        f"--space {space}: neither a file nor a shipped name.{suggestion(space, shipped)}"
    )


def _read_sections(
    content: Mapping[str, Any], n_layers: int, problems: Problems
) -> dict[str, tuple[dict[str, Parameter | None], Points]]:
    """Return parameters and starting points by method and variant; note what is wrong with any."""
    sections = {}
    for name, variants in content.items():
        if not isinstance(variants, dict) or not variants:
            problems.add(f"{name}: is {shown(variants)}; a section for each variant is needed")
            continue
        for place, raw in ((f"{name}.{variant}", raw) for variant, raw in variants.items()):
            sections[place] = _read_section(place, raw, n_layers, problems)
    return sections


def _read_section(
    place: str, raw: object, n_layers: int, problems: Problems
) -> tuple[dict[str, Parameter | None], Points]:
    """Return a variant's parameters, None for one that is wrong, and its starting points."""
    if not isinstance(raw, dict):
        problems.add(f"{place}: is {shown(raw)}; it needs {' and '.join(SECTION_KEYS)}")
        return {}, []
    for key in [key for key in raw if key not in SECTION_KEYS]:
        problems.add(f"{place}.{key}: is unknown.{suggestion(key, SECTION_KEYS)}")
    parameters, listed = raw.get("parameters"), raw.get("starting_points", [])
    if not isinstance(parameters, dict) or not parameters:
        found = f"is {shown(parameters)}; write each parameter as name: {{type: …}}"
        problems.add(f"{place}.parameters: {found}")
        return {}, []  # without parameters every value of a point would be unknown
    kinds = {
        name: problems.attempt(
            functools.partial(_read_parameter, f"{place}.parameters.{name}", name, value, n_layers)
        )
        for name, value in parameters.items()
    }
    if not isinstance(listed, list):
        problems.add(f"{place}.starting_points: is {shown(listed)}; a list is needed, [] for none")
        return kinds, []
    points: Points = []
    for index, point in enumerate(listed):
        at = f"{place}.starting_points[{index}]"
        if isinstance(point, dict):
            points.append(admitted_values(f"{at}.", point, kinds, problems))
        else:
            form = ", ".join(f"{name}: …" for name in kinds)
            problems.add(f"{at}: is {shown(point)}; write {{{form}}}")
    if isinstance(depth := kinds.get(LAYER), FloatDistribution):
        ends = block_at(depth.low, n_layers), block_at(depth.high, n_layers)
        kinds[LAYER] = IntDistribution(*ends)
        for point in points:
            if LAYER in point:
                point[LAYER] = block_at(point[LAYER], n_layers)
    return kinds, points


def _read_parameter(place: str, name: str, raw: object, n_layers: int) -> Parameter:
    if not isinstance(raw, dict):
        raise SearchSpaceError(
            f"{place}: is {shown(raw)}; write {{type: …}}; for one value {{type: fixed, value: …}}"
        )
    facts = dict(raw)
    told, known = facts.pop("type", None), [*KINDS][: None if name == LAYER else -1]
    if told not in known:
        raise SearchSpaceError(f"{place}.type: is {shown(told)}.{suggestion(str(told), known)}")
    try:
        kind = KINDS[told](**facts)
    except ValidationError as error:
        keys = inspect.signature(KINDS[told]).parameters
        raise SearchSpaceError(describe_mistakes(error, keys, place=place)) from error
    except ValueError as error:
        raise SearchSpaceError(f"{place}: {error}") from error
    low, high = bounds_of(kind)
    holds = f"{place}: holds {described(kind)}"
    if name in POSITIVE and low <= 0:
        raise SearchSpaceError(f"{holds}; {name} must be more than 0")
    if name == LAYER and told != "depth":
        values = numbers_in(kind) if isinstance(kind, CategoricalDistribution) else (low, high)
        if not all(isinstance(value, int) for value in values):
            raise SearchSpaceError(f"{holds}; layers are whole numbers, use type int")
        if low < 0 or high >= n_layers:
            raise SearchSpaceError(f"{holds}; the model has blocks 0 to {n_layers - 1}")
    return kind


def narrowed(
    space: SearchSpace, method: Method, config: SearchConfig, *, n_layers: int
) -> SearchSpace:
    """Return a space with parameters fixed (`--fix`) or within other bounds (`--range`).

    Its starting points have what is fixed and the middle of what they did not name; those that lie
    outside a range are sorted out later. Settings that are fixed are searched no more. All that
    means nothing here is said in an InputError.
    """
    problems, fixed = Problems(), read_assignments(config.fix)
    named = {*fixed}
    settings = named - {*method.parameters}
    parameters = {name: kind for name, kind in space.parameters.items() if name not in settings}
    for name, value in fixed.items():
        if name not in settings:
            with problems.collect():
                option = f"--fix {name}={value}"
                parameters[name] = _between(option, value, value, whole=name == LAYER)
    for text in config.range:
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
            kind = parameters.get(name)
            if isinstance(kind, CategoricalDistribution):
                values = [value for value in numbers_in(kind) if low <= value <= high]
                if not values:
                    raise InputError(f"--range {text}: holds none of {described(kind)}.")
                parameters[name] = CategoricalDistribution(values)
            else:
                whole = name == LAYER or types_of(method.settings_type).get(name) is int
                log = isinstance(kind, FloatDistribution) and kind.log
                parameters[name] = _between(f"--range {text}", low, high, whole=whole, log=log)
    if named:
        _check_ends(parameters, method, n_layers, problems)
    problems.raise_if_any(InputError)
    points = tuple(
        {
            name: middle_of(kind) if kind.single() or name not in point else point[name]
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
        setting = {name: bounds_of(kind)[end] for name, kind in parameters.items()}
        if not 0 <= setting.get(LAYER, 0) < n_layers:
            problems.add(f"layer {setting[LAYER]:g}: the model has blocks 0 to {n_layers - 1}.")
        with problems.collect():
            method.check_parameters(setting)


def _between(
    option: str, low: object, high: object, *, whole: bool, log: bool = False
) -> Parameter:
    try:
        if whole:
            return IntDistribution(as_whole(low), as_whole(high))
        least, most = as_number(low), as_number(high)
        return FloatDistribution(least, most, log=log and least != most)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error
