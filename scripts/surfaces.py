"""Surfaces: what each setting of a grid scored on a model, in a file that needs no model.

Covers: reading and writing a file, its feasible settings, scores between settings, and what it
says of a search space and of each parameter. A file is JSON: `surface` says what was recorded,
`axes` the values of each parameter, `points` the scores of each setting: `forget` and `retain`
(ROUGE-1), `seconds`, further ones by the names of their metrics, `forget_whole` (ROUGE-1 of whole
answers); or its `failure`.
Does not cover: recording (`bench_real`).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator

from lunar_tune.config import options
from lunar_tune.errors import InputError
from lunar_tune.files import decoded, write_atomically
from lunar_tune.metrics.goal import parse_constraint

NEAR = 0.02  # of the optimum; forget ROUGE-1
STEPS = 20  # between neighbours on an axis, where the optimum between settings is looked for
FAILURE = "failure"
LOGARITHMIC = ("learning_rate", "ridge")
ROUGE = "ROUGE"
DECLINING = "ROUGE where 70 % of the forget answers decline"
REFUSING = "ROUGE where 90 % of the forget answers decline"
_DEFAULT = parse_constraint(options.DECLINING)  # a search's own, of what a model answers by itself
GOALS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    ROUGE: ("forget", {}),
    DECLINING: ("forget_whole", {_DEFAULT.metric: _DEFAULT.bound}),
    REFUSING: ("forget_whole", {"forget_refused": 0.9}),
}
"""The score to make small, and what a setting has to keep beside the retain floor."""
Setting = tuple[int | float, ...]
Scores = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A grid of settings and their scores."""

    name: str
    about: Mapping[str, Any]
    """Model, data and method, in whatever words."""
    axes: Mapping[str, Setting]
    """Values of each parameter."""
    points: Mapping[Setting, Scores] = field(default_factory=dict)
    """Scores of each setting, whose values are in the order of the axes."""

    def settings(self) -> list[Setting]:
        """Return the settings of the grid."""
        return list(product(*self.axes.values()))

    def parameters(self, setting: Setting) -> dict[str, int | float]:
        """Return a setting by the names of its parameters."""
        return dict(zip(self.axes, setting, strict=True))

    def at(self, parameters: Mapping[str, float]) -> Scores:
        """Return the scores at any setting, of a whole grid, linear between its neighbours.

        Of logarithms where a space is logarithmic; outside of the grid they are those of its edge.
        What has a neighbour that failed, fails.
        """
        place = np.array([[parameters[name] for name in self.axes]], dtype=float)
        scores = {name: float(values[0]) for name, values in self.between(place).items()}
        if scores.pop(FAILURE) > 0:
            return {FAILURE: "a neighbour failed"}
        return scores

    def between(self, settings: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Return scores at settings `[settings, axes]`, and the weight of what failed."""
        names, scores = self._interpolated
        inside = [
            _scaled(axis, np.clip(settings[:, i], min(values), max(values)))
            for i, (axis, values) in enumerate(self.axes.items())
            if len(values) > 1
        ]
        return dict(zip(names, scores(np.stack(inside, axis=1)).T, strict=True))

    @cached_property
    def _interpolated(self) -> tuple[list[str], RegularGridInterpolator]:
        """Names of the scores that all settings have, and what gives them between settings."""
        axes = {name: sorted(values) for name, values in self.axes.items()}
        names = [*sorted(set.intersection(*({*scores} for scores in self.done.values()))), FAILURE]
        known = [
            [self.done[one][name] for name in names[:-1]] + [0.0]
            if one in self.done
            else [0.0] * (len(names) - 1) + [1.0]
            for one in product(*axes.values())
        ]
        searched = {name: values for name, values in axes.items() if len(values) > 1}
        lines = [_scaled(name, np.array(values, dtype=float)) for name, values in searched.items()]
        return names, RegularGridInterpolator(lines, np.reshape(known, (*map(len, lines), -1)))

    def least(self, floor: float, goal: str = ROUGE) -> float:
        """Return the least objective that is feasible, between settings too; infinite without one.

        Looked for at all layers and at `STEPS` places between neighbours of other axes.
        """
        lines = [
            range(int(min(values)), int(max(values)) + 1)
            if name == "layer"
            else _refined(name, values)
            for name, values in self.axes.items()
        ]
        scores = self.between(np.array([*product(*lines)], dtype=float))
        objective, missed = judged(scores, floor, goal)
        kept = (reduce(np.maximum, missed.values()) <= 0) & (scores[FAILURE] == 0)
        return float(np.where(kept, objective, math.inf).min())

    @property
    def blocks(self) -> int:
        """Decoder blocks of the model; where a file does not say it, up to the deepest recorded."""
        return int(self.about.get("blocks", 1 + max(self.axes["layer"])))

    @property
    def done(self) -> dict[Setting, Scores]:
        """The settings that did not fail."""
        return {one: scores for one, scores in self.points.items() if FAILURE not in scores}

    def feasible(self, floor: float, goal: str = ROUGE) -> dict[Setting, float]:
        """Return the objective of each setting that keeps what one of `GOALS` wants."""
        found = {one: judged(scores, floor, goal) for one, scores in self.done.items()}
        return {
            one: objective
            for one, (objective, missed) in found.items()
            if max(missed.values()) <= 0
        }

    def save(self, file: Path) -> None:
        """Write the file, a line a setting."""
        lines = [{"parameters": self.parameters(one), **self.points[one]} for one in self.points]
        head = json.dumps({"surface": dict(self.about), "axes": dict(self.axes)}, indent=1)
        points = ",\n".join(f" {json.dumps(line)}" for line in lines)
        text = f'{head.removesuffix("}").rstrip()},\n "points": [\n{points}\n]}}\n'
        write_atomically(file, text.encode())


def judged(scores: Scores, floor: float, goal: str) -> tuple[Any, dict[str, Any]]:
    """Return what one of `GOALS` makes small, and by how much scores miss what it bounds."""
    objective, least = GOALS[goal]
    bounds = {"retain": floor, **least}
    missed = {name: bound - scores.get(name, -math.inf) for name, bound in bounds.items()}
    return scores.get(objective, math.inf), missed


def _scaled(axis: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(values) if axis in LOGARITHMIC else values


def _refined(axis: str, values: Setting) -> list[float]:
    """Return an axis' values and `STEPS` places between neighbours."""
    scaled = _scaled(axis, np.array(sorted(values), dtype=float))
    between = [np.linspace(*pair, STEPS, endpoint=False) for pair in pairwise(scaled)]
    fine = np.concatenate([*between, scaled[-1:]])
    return list(np.clip(np.exp(fine), min(values), max(values)) if axis in LOGARITHMIC else fine)


def read_surface(file: Path) -> Surface:
    """Read a file.

    Raises:
        InputError: It cannot be read, or is no surface. One that is not finished can be read.
    """
    try:
        document = json.loads(decoded(file.read_bytes(), file)[0])
        axes = {name: tuple(values) for name, values in document["axes"].items()}
        points: dict[Setting, Scores] = {}
        for line in document["points"]:
            parameters = line.pop("parameters")
            if FAILURE not in line:
                _ = float(line["forget"]), float(line["retain"])
            points[tuple(parameters[axis] for axis in axes)] = line
        surface = Surface(name=file.stem, about=document["surface"], axes=axes, points=points)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: is no recorded surface ({type(error).__name__}: {error})."
        ) from error
    if strange := points.keys() - set(surface.settings()):
        raise InputError(
            f"{file}: {len(strange)} settings are not on its axes, as {strange.pop()}."
        )
    return surface


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best of some settings, and those that are as good."""

    setting: Setting
    near: tuple[Setting, ...]
    """Within `NEAR` of it, best first; itself included."""
    held: tuple[Setting, ...]
    """Of all that are feasible, those that a space holds, best first."""


def optimum_of(
    surface: Surface, goal: str, floor: float, space: Mapping[str, tuple[float, float]]
) -> Optimum | None:
    """Return the best setting by one of `GOALS`; None where nothing is feasible.

    `space` has the least and the largest value of parameters; others may be any.
    """
    found = surface.feasible(floor, goal)
    ranked = sorted(found, key=lambda one: (found[one], -surface.points[one]["retain"]))
    if not ranked:
        return None
    return Optimum(
        setting=ranked[0],
        near=tuple(one for one in ranked if found[one] <= found[ranked[0]] + NEAR),
        held=tuple(one for one in ranked if is_inside(surface.parameters(one), space)),
    )


def is_inside(parameters: Mapping[str, float], space: Mapping[str, tuple[float, float]]) -> bool:
    """Say whether a space holds a setting."""
    both = parameters.keys() & space.keys()
    return all(space[name][0] <= parameters[name] <= space[name][1] for name in both)


def spread(surface: Surface, axis: str, score: str) -> float:
    """Return how far a score goes along an axis, the others held: median of largest less least."""
    place = list(surface.axes).index(axis)
    lines: defaultdict[Setting, list[float]] = defaultdict(list)
    for one, scores in surface.done.items():
        lines[one[:place] + one[place + 1 :]].append(scores[score])
    return median(max(line) - min(line) for line in lines.values() if len(line) > 1)


def best_along(surface: Surface, axis: str, floor: float) -> dict[int | float, float | None]:
    """Return the best feasible forget score with each value of an axis; None without one."""
    place, found = list(surface.axes).index(axis), surface.feasible(floor)
    return {
        value: min((score for one, score in found.items() if one[place] == value), default=None)
        for value in surface.axes[axis]
    }


def findings_of(
    surface: Surface, space: Mapping[str, tuple[float, float]], floor: float
) -> dict[str, Any]:
    """Return what a surface says of a space and of each parameter that has several values."""

    def point(one: Setting) -> dict[str, Any]:
        depth = one[list(surface.axes).index("layer")] / (surface.blocks - 1)
        return {"parameters": surface.parameters(one), "depth": depth, **surface.points[one]}

    goals: dict[str, Any] = {}
    for goal in GOALS:
        best = optimum_of(surface, goal, floor, space)
        goals[goal] = best and {
            "optimum": point(best.setting),
            "near": [point(one) for one in best.near],
            "near_in_space": len({*best.near} & {*best.held}),
            "best_in_space": point(best.held[0]) if best.held else None,
        }
    return {
        "surface": surface.name,
        "grid": len(surface.settings()),
        "settings": len(surface.points),
        "failed": len(surface.points) - len(surface.done),
        "floor": floor,
        "feasible": len(surface.feasible(floor)) / len(surface.done),
        "goals": goals,
        "axes": {
            axis: {
                "forget": spread(surface, axis, "forget"),
                "retain": spread(surface, axis, "retain"),
                "best": best_along(surface, axis, floor),
            }
            for axis, values in surface.axes.items()
            if len(values) > 1
        },
    }
