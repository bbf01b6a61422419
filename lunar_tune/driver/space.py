"""Search spaces: which values of each parameter a search may try.

Parameters are Optuna's distributions; one with a single value stands for what is fixed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BeforeValidator, ConfigDict, Field, validate_call

from lunar_tune.errors import Problems, SearchSpaceError, suggestion
from lunar_tune.yaml_files import shown

Parameter = IntDistribution | FloatDistribution | CategoricalDistribution
"""Values that a parameter may take; those of a categorical one are numbers."""


def block_at(fraction: float, n_layers: int) -> int:
    """Return the number of the block at a fraction of the depth: 0 is the first, 1 the last."""
    return round(fraction * (n_layers - 1))


def as_number(value: object) -> int | float:
    """Return a finite number as it is, or raise ValueError with what is wrong."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"is {shown(value)}; a number is needed, without quotes")
    if not abs(value) <= 1e300:  # NaN compares false
        raise ValueError(f"is {shown(value)}; a finite number is needed")
    return value


def as_whole(value: object) -> int:
    """Return a whole number, or raise ValueError with what is wrong."""
    number = as_number(value)
    if number != int(number):
        raise ValueError(f"is {shown(value)}; a whole number is needed")
    return int(number)


def numbers_in(kind: CategoricalDistribution) -> tuple[int | float, ...]:
    """Return the numbers among which a parameter is chosen."""
    return tuple(one for one in kind.choices if isinstance(one, int | float))


def bounds_of(kind: Parameter) -> tuple[int | float, int | float]:
    """Return the smallest and the largest value."""
    if isinstance(kind, CategoricalDistribution):
        return min(numbers_in(kind)), max(numbers_in(kind))
    return kind.low, kind.high


def described(kind: Parameter) -> str:
    """Return the values for a table or a message."""
    if isinstance(kind, CategoricalDistribution):
        return ", ".join(map(_text, numbers_in(kind)))
    if kind.single():
        return f"{_text(kind.low)} (fixed)"
    return f"{_text(kind.low)} … {_text(kind.high)}{' (log)' if kind.log else ''}"


def _text(number: float) -> str:
    return repr(number).removesuffix(".0")


def admitted(kind: Parameter, value: object) -> int | float:
    """Return a value as a trial has it, or raise ValueError with what is wrong."""
    number = as_whole(value) if isinstance(kind, IntDistribution) else as_number(value)
    nearest = nearest_of(kind, number)
    if nearest != number:
        where = "none of" if isinstance(kind, CategoricalDistribution) else "outside"
        raise ValueError(f"is {_text(number)}, {where} {described(kind)}")
    return nearest


def middle_of(kind: Parameter) -> int | float:
    """Return a value in the middle that a trial may have; of logarithms where they are sampled."""
    if isinstance(kind, CategoricalDistribution):
        return sorted(numbers_in(kind))[(len(kind.choices) - 1) // 2]
    if isinstance(kind, IntDistribution):
        return (kind.low + kind.high) // 2
    if kind.log:
        return math.sqrt(kind.low) * math.sqrt(kind.high)
    return (kind.low + kind.high) / 2


def nearest_of(kind: Parameter, value: float) -> int | float:
    """Return the nearest value that a trial may have."""
    if isinstance(kind, CategoricalDistribution):
        return min(numbers_in(kind), key=lambda one: abs(one - value))
    inside = min(max(value, kind.low), kind.high)
    return round(inside) if isinstance(kind, IntDistribution) else float(inside)


Number = Annotated[int | float, BeforeValidator(as_number)]
Whole = Annotated[int, BeforeValidator(as_number)]
Real = Annotated[float, BeforeValidator(as_number)]
Fraction = Annotated[Real, Field(ge=0, le=1)]


def _int(*, low: Whole, high: Whole) -> Parameter:
    return IntDistribution(low, high)


def _float(*, low: Real, high: Real, log: bool = False) -> Parameter:
    return FloatDistribution(low, high, log=log and low != high)


def _choice(*, values: Annotated[list[Number], Field(min_length=1)]) -> Parameter:
    if len({*values}) < len(values):
        raise ValueError(f"values {shown(values)} repeat one; write each once")
    return CategoricalDistribution(values)


def _fixed(*, value: Number) -> Parameter:
    if isinstance(value, int):
        return IntDistribution(value, value)
    return FloatDistribution(value, value)


def _depth(*, low: Fraction, high: Fraction) -> Parameter:
    return FloatDistribution(low, high)


_strict = validate_call(config=ConfigDict(strict=True))
KINDS: Final[Mapping[str, Callable[..., Parameter]]] = {
    "int": _strict(_int),
    "float": _strict(_float),
    "choice": _strict(_choice),
    "fixed": _strict(_fixed),
    "depth": _strict(_depth),
}
"""What a file says of a parameter, read by its `type`; depth, which is of `layer` alone, is last:
blocks between two fractions of a model's depth, which a space has as numbers of blocks.

Each raises pydantic's error for a key or a value that is wrong, ValueError for what contradicts.
"""


def _plain(kind: Parameter) -> dict[str, Any]:
    """Return a parameter as a file has it."""
    if isinstance(kind, CategoricalDistribution):
        return {"type": "choice", "values": list(kind.choices)}
    if kind.single():
        return {"type": "fixed", "value": kind.low}
    if isinstance(kind, IntDistribution):
        return {"type": "int", "low": kind.low, "high": kind.high}
    return {"type": "float", "low": kind.low, "high": kind.high, "log": kind.log}


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """The values that one study may try."""

    method: str
    variant: str  # variant of the method; LUNAR's is the solver
    parameters: Mapping[str, Parameter]  # every parameter of the method, in its order
    starting_points: tuple[Mapping[str, int | float], ...]  # settings to try first
    origin: str  # where it was read: a file, or the default by depth

    def describe(self) -> list[tuple[str, str]]:
        """Return name and values of each parameter, for a table."""
        return [(name, described(kind)) for name, kind in self.parameters.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `config.yaml`; `parameters` reads back as a file's would."""
        kinds = {name: _plain(kind) for name, kind in self.parameters.items()}
        points = [dict(point) for point in self.starting_points]
        return {**dataclasses.asdict(self), "parameters": kinds, "starting_points": points}

    def values_of(self, name: str) -> tuple[int, ...]:
        """Return the whole numbers that a parameter may take; none for one that is not searched."""
        match self.parameters.get(name):
            case IntDistribution(low=low, high=high):
                return tuple(range(low, high + 1))
            case CategoricalDistribution() as kind:
                return tuple(map(int, numbers_in(kind)))
        return ()

    def check(self, parameters: Mapping[str, object]) -> None:
        """Check a value for each parameter, or raise a SearchSpaceError."""
        problems = Problems()
        admitted_values("", parameters, self.parameters, problems)
        problems.raise_if_any(SearchSpaceError)


def admitted_values(
    place: str,
    point: Mapping[str, object],
    kinds: Mapping[str, Parameter | None],
    problems: Problems,
) -> dict[str, int | float]:
    """Return a point's values as a trial has them; note what is wrong, behind the text `place`."""
    for name in point:
        if name not in kinds:
            problems.add(f"{place}{name}: is unknown.{suggestion(str(name), kinds)}")
    values: dict[str, int | float] = {}
    for name, kind in kinds.items():
        if name not in point:
            problems.add(f"{place}{name}: is missing")
        elif kind is not None:  # else it is wrong itself
            try:
                values[name] = admitted(kind, point[name])
            except ValueError as error:
                problems.add(f"{place}{name}: {error}")
    return values
