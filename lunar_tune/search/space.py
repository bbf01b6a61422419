"""Search spaces: which values of each parameter a search may try."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lunar_tune.errors import Problems, SearchSpaceError, suggestion
from lunar_tune.yaml_files import shown

__all__ = [
    "LAYER",
    "Choice",
    "Depth",
    "Fixed",
    "FloatRange",
    "IntRange",
    "Parameter",
    "SearchSpace",
    "admitted_values",
    "as_real",
    "as_whole",
    "block_at",
    "middle_of",
    "nearest_of",
]

LAYER: Final = "layer"


def _number(value: object) -> int | float:
    """Return a finite number as it is, or raise ValueError with what is wrong."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"is {shown(value)}; a number is needed, without quotes")
    if not abs(value) <= 1e300:  # NaN compares false
        raise ValueError(f"is {shown(value)}; a finite number is needed")
    return value


def as_whole(value: object) -> int:
    """Return a whole number as it is, or raise ValueError with what is wrong."""
    number = _number(value)
    if not isinstance(number, int):
        raise ValueError(f"is {shown(value)}; a whole number is needed, without a point")
    return number


def as_real(value: object) -> float:
    """Return a finite number, or raise ValueError with what is wrong."""
    return float(_number(value))


def _numbers(value: object) -> tuple[int | float, ...]:
    """Return a list of distinct numbers, or raise ValueError with what is wrong."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"is {shown(value)}; a list of numbers is needed, such as [0.001, 0.01]")
    numbers = []
    for index, item in enumerate(value):
        try:
            number = _number(item)
        except ValueError as error:
            raise ValueError(f"number {index + 1} of the list {error}") from error
        if number in numbers:
            raise ValueError(f"holds {shown(number)} twice; write each value once")
        numbers.append(number)
    return tuple(numbers)


def _text(number: float) -> str:
    return repr(number).removesuffix(".0")


Whole = Annotated[int, BeforeValidator(as_whole)]
Real = Annotated[float, BeforeValidator(as_real)]
Number = Annotated[int | float, BeforeValidator(_number)]


class _Kind(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    type: str


class _Range(_Kind):
    low: Number
    high: Number
    _read = staticmethod(_number)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(
                f"low {_text(self.low)} lies above high {_text(self.high)}; exchange them"
            )
        return self

    @property
    def bounds(self) -> tuple[int | float, int | float]:
        """Smallest and largest value."""
        return self.low, self.high

    def admit(self, value: object) -> int | float:
        """Return the value as a trial has it, or raise ValueError with what is wrong."""
        number = self._read(value)
        if not self.low <= number <= self.high:
            raise ValueError(f"is {_text(number)}, outside {self.describe()}")
        return number

    def describe(self) -> str:
        """Return the range for a table."""
        return f"{_text(self.low)} … {_text(self.high)}"


class IntRange(_Range):
    """Whole numbers from `low` to `high`, both included."""

    type: Literal["int"] = "int"
    low: Whole
    high: Whole
    _read = staticmethod(as_whole)


class FloatRange(_Range):
    """Numbers from `low` to `high`; `log` samples their logarithm evenly."""

    type: Literal["float"] = "float"
    low: Real
    high: Real
    log: bool = False
    _read = staticmethod(as_real)

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.low == self.high:
            raise ValueError(
                f"low and high are equal; write {{type: fixed, value: {_text(self.low)}}}"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"low {_text(self.low)} has no logarithm; raise it or leave out log")
        return self

    def describe(self) -> str:
        """Return the range for a table."""
        return f"{super().describe()}{' (log)' if self.log else ''}"


class Depth(_Range):
    """Blocks between two fractions of the depth; 0 is the first block, 1 the last."""

    type: Literal["depth"] = "depth"
    low: Annotated[Real, Field(ge=0, le=1)]
    high: Annotated[Real, Field(ge=0, le=1)]
    _read = staticmethod(as_real)

    def describe(self) -> str:
        """Return the range for a message."""
        return (
            f"{super().describe()}; under type depth it is a fraction of the model's depth, not a "
            "block's number"
        )

    def in_blocks(self, n_layers: int) -> IntRange:
        """Return the same as numbers of blocks."""
        return IntRange(low=block_at(self.low, n_layers), high=block_at(self.high, n_layers))


class Choice(_Kind):
    """One of several numbers."""

    type: Literal["choice"] = "choice"
    values: Annotated[tuple[int | float, ...], BeforeValidator(_numbers)]

    @property
    def bounds(self) -> tuple[int | float, int | float]:
        """Smallest and largest value."""
        return min(self.values), max(self.values)

    def admit(self, value: object) -> int | float:
        """Return the value as a trial has it, or raise ValueError with what is wrong."""
        number = _number(value)
        if number not in self.values:
            raise ValueError(f"is {_text(number)}, none of {self.describe()}")
        return self.values[self.values.index(number)]

    def describe(self) -> str:
        """Return the values for a table."""
        return ", ".join(map(_text, self.values))


class Fixed(_Kind):
    """One value, which the search leaves alone."""

    type: Literal["fixed"] = "fixed"
    value: Number

    @property
    def bounds(self) -> tuple[int | float, int | float]:
        """The value, twice."""
        return self.value, self.value

    def admit(self, value: object) -> int | float:
        """Return the value as a trial has it, or raise ValueError with what is wrong."""
        number = _number(value)
        if number != self.value:
            raise ValueError(f"is {_text(number)}, but is fixed at {_text(self.value)}")
        return self.value

    def describe(self) -> str:
        """Return the value for a table."""
        return f"{_text(self.value)} (fixed)"


Parameter = IntRange | FloatRange | Choice | Fixed
"""What a resolved search space consists of."""


def block_at(fraction: float, n_layers: int) -> int:
    """Return the number of the block at a fraction of the depth: 0 is the first, 1 the last."""
    return round(fraction * (n_layers - 1))


def middle_of(kind: Parameter) -> int | float:
    """Return a value in the middle that a trial may have; of logarithms where they are sampled."""
    match kind:
        case Fixed():
            return kind.value
        case Choice():
            return sorted(kind.values)[(len(kind.values) - 1) // 2]
        case IntRange():
            return (kind.low + kind.high) // 2
        case FloatRange():
            if kind.log:
                return math.sqrt(kind.low) * math.sqrt(kind.high)
            return (kind.low + kind.high) / 2


def nearest_of(kind: Parameter, value: float) -> int | float:
    """Return the nearest value that a trial may have."""
    if isinstance(kind, Choice):
        return min(kind.values, key=lambda one: abs(one - value))
    low, high = kind.bounds
    inside = min(max(value, low), high)
    return kind.admit(round(inside) if isinstance(kind, IntRange) else inside)


def _distribution(kind: Parameter) -> BaseDistribution:
    match kind:
        case Choice():
            return CategoricalDistribution(kind.values)
        case FloatRange():
            return FloatDistribution(kind.low, kind.high, log=kind.log)
        case IntRange():
            return IntDistribution(kind.low, kind.high)
        case Fixed(value=int(value)):
            return IntDistribution(value, value)
        case Fixed(value=value):
            return FloatDistribution(value, value)


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """The values that one study may try."""

    method: str
    variant: str
    """Variant of the method; LUNAR's is the solver."""
    parameters: Mapping[str, Parameter]
    """Every parameter of the method, in its order."""
    starting_points: tuple[Mapping[str, int | float], ...]
    """Settings to try first."""
    origin: str
    """Where it was read: a file, or the default by depth."""

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return Optuna's distributions; a fixed value is one that holds a single value."""
        return {name: _distribution(kind) for name, kind in self.parameters.items()}

    def describe(self) -> list[tuple[str, str]]:
        """Return name and range of each parameter, for a table."""
        return [(name, kind.describe()) for name, kind in self.parameters.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `config.yaml`; `parameters` reads back as a file's would."""
        kinds = {name: kind.model_dump(mode="json") for name, kind in self.parameters.items()}
        points = [dict(point) for point in self.starting_points]
        return {**dataclasses.asdict(self), "parameters": kinds, "starting_points": points}

    def values_of(self, name: str) -> tuple[int, ...]:
        """Return the whole numbers that a parameter may take; none for one that is not searched."""
        match self.parameters.get(name):
            case IntRange(low=low, high=high):
                return tuple(range(low, high + 1))
            case Choice(values=values):
                return tuple(map(int, values))
            case Fixed(value=value):
                return (int(value),)
        return ()

    def check(self, parameters: Mapping[str, object]) -> None:
        """Check a value for each parameter.

        Raises:
            SearchSpaceError: One is missing, unknown or out of bounds; all of it is said.
        """
        problems = Problems()
        admitted_values("", parameters, self.parameters, problems)
        problems.raise_if_any(SearchSpaceError)


def admitted_values(
    place: str,
    point: Mapping[str, object],
    kinds: Mapping[str, Parameter | Depth | None],
    problems: Problems,
) -> dict[str, int | float]:
    """Return a point's values as their kinds hold them; note what is wrong.

    Messages begin with `place`, which is empty or ends with a point; a kind that is wrong itself is
    None.
    """
    for name in point:
        if name not in kinds:
            problems.add(f"{place}{name}: is unknown.{suggestion(str(name), kinds)}")
    admitted: dict[str, int | float] = {}
    for name, kind in kinds.items():
        if name not in point:
            problems.add(f"{place}{name}: is missing")
        elif kind is not None:
            try:
                admitted[name] = kind.admit(point[name])
            except ValueError as error:
                problems.add(f"{place}{name}: {error}")
    return admitted
