"""Settings that a search tries first: of a layer prior, of other searches, of its own space."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

from optuna.distributions import CategoricalDistribution, IntDistribution
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError

from lunar_tune.driver.space import (
    Parameter,
    SearchSpace,
    block_at,
    described,
    middle_of,
    nearest_of,
    numbers_in,
)
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import is_file
from lunar_tune.methods.contract import METHODS
from lunar_tune.metrics.goal import Goal
from lunar_tune.study.rows import COMPLETE, LAYER, TrialRow, best_first
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import Told
from lunar_tune.trial.layer_scores import LayerPrior
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.yaml_files import describe_mistakes, read_yaml

MOST_TOLD: Final = 100  # trials of another search, evenly over it: what is fitted takes their cube


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """A setting to try early."""

    values: Mapping[str, int | float]
    origin: str  # where it comes from, to show
    movable: bool = False  # whether values outside the space are moved inside; else it is left out
    completed: bool = False  # whether parameters that it lacks are as usual; others are left out


def fitting(points: Iterable[StartingPoint], space: SearchSpace) -> tuple[SearchSpace, str]:
    """Return a space that begins with the settings that it holds, and their origins in a line."""
    first: list[Mapping[str, int | float]] = []
    origins, left_out = Counter[str](), []
    for one in points:
        before, origin = dict(one.values), one.origin
        if one.completed:
            usual = usual_point(space)
            added = {name: usual[name] for name in space.parameters if name not in before}
            before = {name: before.get(name, usual[name]) for name in space.parameters}
            origin += "".join(f" with the usual {name} {value:g}" for name, value in added.items())
        values = dict(before)
        if one.movable:
            known = {name: kind for name, kind in space.parameters.items() if name in before}
            values |= {name: nearest_of(kind, before[name]) for name, kind in known.items()}
            moved = [f"{n} {before[n]:g} → {values[n]:g}" for n in known if values[n] != before[n]]
            origin += f" with {' and '.join(moved)}" if moved else ""
        try:
            space.check(values)
        except InputError as error:
            reasons = ", ".join(error.messages or (str(error),))
            left_out.append(f"{one.origin} ({reasons})")
        else:
            if values not in first:
                first.append(values)
                origins[origin] += 1
    named = (origin if n == 1 else f"{origin} ({n})" for origin, n in origins.items())
    text = f"{len(first)} ({', '.join(named)})" if first else "none"
    text += f"; left out: {'; '.join(left_out)}" if left_out else ""
    return dataclasses.replace(space, starting_points=tuple(first)), text


@dataclass(frozen=True, slots=True)
class Found:
    """What other searches give to one."""

    points: tuple[StartingPoint, ...] = ()
    """Settings to try first."""
    told: Mapping[str, tuple[Told, ...]] = field(default_factory=dict)
    """What trials told, by search: of this model, in the parameters and for the goal of the one."""

    @property
    def text(self) -> str:
        """Whose trials there are, to show."""
        return ", ".join(f"{len(told)} of {search}" for search, told in self.told.items())

    @property
    def numbered(self) -> list[Told]:
        """What all of them told, each with its search."""
        return [
            dataclasses.replace(one, search=number)
            for number, told in enumerate(self.told.values(), 1)
            for one in told
        ]


def found_in(
    searches: Sequence[str],
    *,
    output: Path,
    spec: TrialSpec,
    n_layers: int,
    space: SearchSpace,
    goal: Goal | None,
) -> Found:
    """Return what other searches have found: folders, names in `output`, or `best.yaml` files.

    It is the best setting of each, its layer carried over by relative depth, and of a search of the
    same model what trials told, `MOST_TOLD` at most. `spec`, `n_layers` (blocks of the model),
    `space` and `goal` are the new search's. An InputError lists those that cannot be read or are of
    another method.
    """
    problems, method = Problems(), spec.method
    usual, points, by_search = usual_point(space), list[StartingPoint](), dict[str, Any]()
    for search in dict.fromkeys(searches):
        with problems.collect():
            found = _read(search, output)
            if found.method != method.name:
                raise InputError(
                    f"--start-from {search}: has a setting of {found.method}, and this search is "
                    f"of {method.name}. Name a search of the same method."
                )
            told = list[Told]()
            if goal is not None and (found.model, found.n_layers) == (spec.model.name, n_layers):
                told = [
                    Told.by(goal, usual | _taken(row.parameters, usual), row.scores)
                    for row in found.rows
                    if goal.is_known(row.scores)
                ]
            points.append(
                dataclasses.replace(
                    _carried(found.parameters, search, depth=found.n_layers, n_layers=n_layers),
                    completed=found.solver != method.variant,
                )
            )
            if told:
                by_search[search] = tuple(told[:: math.ceil(len(told) / MOST_TOLD)])
    problems.raise_if_any(InputError)
    return Found(tuple(points), by_search)


def _taken(parameters: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name in names}


def _carried(
    setting: Mapping[str, int | float], search: str, *, depth: int, n_layers: int
) -> StartingPoint:
    values, origin = dict(setting), f"found in {search}"
    if LAYER in values and depth != n_layers:
        before, fraction = values[LAYER], values[LAYER] / max(1, depth - 1)
        values[LAYER] = block_at(fraction, n_layers)
        origin += f" (layer {before} of {depth} → {values[LAYER]} of {n_layers} by depth)"
    return StartingPoint(values, origin, movable=True)


class _Found(BaseModel):
    """The best setting of a search, as in `best.yaml`, and perhaps its trials."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    model: str = ""
    method: str
    solver: str
    parameters: Annotated[dict[str, int | FiniteFloat], Field(min_length=1)]
    n_layers: PositiveInt  # number of the model's decoder blocks
    rows: tuple[TrialRow, ...] = ()


def _read(search: str, output: Path) -> _Found:
    """Read a `best.yaml`, or a search's confirmed best setting, else its best as searched."""
    if is_file(path := Path(search)):
        content = read_yaml(path)
    else:
        stored = StoredSearch.read(search, runs=output)
        best = stored.best or next(iter(best_first(stored.rows)), None)
        if best is None:
            raise InputError(
                f"--start-from {search}: none of its trials is feasible. Name a search that found "
                "a feasible setting, or write one into a file like best.yaml, with n_layers."
            )
        content = {
            **stored.study.notes["tags"],
            "parameters": dict(best.parameters),
            "n_layers": stored.config.resolved.get("n_layers"),
            "rows": tuple(row for row in stored.rows if row.state == COMPLETE),
        }
    try:
        return _Found.model_validate(content)
    except ValidationError as error:
        raise InputError(
            f"--start-from {search}: {describe_mistakes(error)}. Name a search, or the best.yaml "
            "of one."
        ) from error


def usual_point(space: SearchSpace) -> dict[str, int | float]:
    """Return the first setting that a space names, else the middle of its ranges."""
    if space.starting_points:
        return dict(space.starting_points[0])
    return {name: middle_of(kind) for name, kind in space.parameters.items()}


LAYER_PRIOR: Final = "--layer-prior"
EQUAL = 1e-9  # similarities are means of float32 products; what differs by less is a tie


def check_has_choice(space: SearchSpace, *, option: str) -> None:
    """Check that scores of layers mean something for a space, or raise an InputError."""
    if not METHODS[space.method].along_vectors:
        raise InputError(
            f"{option}: layers are scored along LUNAR's unlearning vectors, and --method "
            f"{space.method} has none. Leave the option out, or take --method lunar."
        )
    values = space.values_of(LAYER)
    if len(values) == 1:
        raise InputError(
            f"{option}: the space ({space.origin}) has layer {values[0]} alone, so there is none "
            "to choose. Leave the option out, or give a space with several layers."
        )


def choose_layers(
    space: SearchSpace, prior: LayerPrior, *, origin: str
) -> tuple[SearchSpace, int | None, str]:
    """Narrow a space to the recommended layers, if the scores give advice, or raise an InputError.

    Also return the layer to begin with, None without advice, and what was made of the scores, to
    show behind the word layer.
    """
    kind, scores = space.parameters[LAYER], {one.layer: one.score for one in prior.layers}
    unfinished = next(one.unfinished for one in prior.layers if one.layer == prior.best)
    warning, no_advice = "", None
    if unfinished * 2 > prior.rows:
        warning = "; most answers there do not end, a smaller coefficient would tell more"
    if len(scores) == 1:
        no_advice = f"layer {prior.best} alone was scored, and compared with none"
    elif max(scores.values()) - min(scores.values()) <= EQUAL:
        no_advice = "all layers score the same"
    elif max(scores.values()) - prior.base_model.score <= EQUAL:
        no_advice = "no layer gains on the base model"
    if no_advice is not None:
        return space, None, f"{described(kind)}, as in the space: {no_advice} ({origin}){warning}"
    wanted = [value for value in space.values_of(LAYER) if value in prior.recommended]
    if not wanted:
        recommended = ", ".join(map(str, prior.recommended))
        raise InputError(
            f"{LAYER_PRIOR} {origin}: recommends layer {recommended}, and the space "
            f"({space.origin}) has {described(kind)}. Give a space that holds the layer, or leave "
            "the option out."
        )
    narrowed: Parameter = IntDistribution(min(wanted), max(wanted))
    if isinstance(kind, CategoricalDistribution):
        narrowed = CategoricalDistribution([one for one in numbers_in(kind) if one in wanted])
    shown = str(wanted[0]) if len(wanted) == 1 else described(narrowed)
    parameters = {**space.parameters, LAYER: narrowed}
    best = max(wanted, key=lambda layer: (scores[layer], -layer))
    text = f"{shown} by s1 - s2 ({origin}){warning}"
    return dataclasses.replace(space, parameters=parameters), best, text
