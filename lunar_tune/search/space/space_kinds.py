"""The kinds of searched parameters: ranges, choices, fixed values, depths."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lunar_tune.yaml_files import shown

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = [
    "KINDS",
    "Choice",
    "Depth",
    "Fixed",
    "FloatRange",
    "IntRange",
    "Parameter",
    "block_at",
    "middle_of",
    "nearest_of",
]


def _number(value: object) -> int | float:
    """Return a finite number as it is, or raise ValueError with what is wrong."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"is {shown(value)}; a number is needed, without quotes")
    if not abs(value) <= 1e300:  # NaN compares false
        raise ValueError(f"is {shown(value)}; a finite number is needed")
    return value


def _whole(value: object) -> int:
    number = _number(value)
    if not isinstance(number, int):
        raise ValueError(f"is {shown(value)}; a whole number is needed, without a point")
    return number


def _values(value: object) -> tuple[int | float, ...]:
    """Return a list of distinct numbers."""
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


Whole = Annotated[int, BeforeValidator(_whole)]
Real = Annotated[float, BeforeValidator(lambda value: float(_number(value)))]
Number = Annotated[int | float, BeforeValidator(_number)]


class _Kind(BaseModel):
    """What all kinds of parameters share."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class IntRange(_Kind):
    """Whole numbers from `low` to `high`, both included."""

    type: Literal["int"] = "int"
    low: Whole
    high: Whole

    @model_validator(mode="after")
    def _check(self) -> IntRange:
        if self.low > self.high:
            raise ValueError(f"low {self.low} lies above high {self.high}; exchange them")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest value."""
        return self.low, self.high

    def admit(self, value: object) -> int:
        """Return the value as a trial has it, or raise ValueError with what is wrong."""
        number = _whole(value)
        if not self.low <= number <= self.high:
            raise ValueError(f"is {number}, outside {self.describe()}")
        return number

    def describe(self) -> str:
        """Return the range for a table."""
        return f"{self.low} … {self.high}"

    def distribution(self) -> BaseDistribution:
        """Return Optuna's counterpart."""
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high)


class FloatRange(_Kind):
    """Numbers from `low` to `high`; `log` samples their logarithm evenly."""

    type: Literal["float"] = "float"
    low: Real
    high: Real
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> FloatRange:
        if self.low >= self.high:
            raise ValueError(
                f"low {_text(self.low)} must lie below high {_text(self.high)}; for one value "
                f"write {{type: fixed, value: {_text(self.low)}}}"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"low {_text(self.low)} has no logarithm; raise it or leave out log")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return self.low, self.high

    def admit(self, value: object) -> float:
        """Return the value as a trial has it, or raise ValueError with what is wrong."""
        number = float(_number(value))
        if not self.low <= number <= self.high:
            raise ValueError(f"is {_text(number)}, outside {self.describe()}")
        return number

    def describe(self) -> str:
        """Return the range for a table."""
        return f"{_text(self.low)} … {_text(self.high)}{' (log)' if self.log else ''}"

    def distribution(self) -> BaseDistribution:
        """Return Optuna's counterpart."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)


class Choice(_Kind):
    """One of several numbers."""

    type: Literal["choice"] = "choice"
    values: Annotated[tuple[int | float, ...], BeforeValidator(_values)]

    @property
    def bounds(self) -> tuple[float, float]:
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

    def distribution(self) -> BaseDistribution:
        """Return Optuna's counterpart."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


class Fixed(_Kind):
    """One value, which the search leaves alone."""

    type: Literal["fixed"] = "fixed"
    value: Number

    @property
    def bounds(self) -> tuple[float, float]:
        """The value, twice."""
        return self.value, self.value

    def admit(self, value: object) -> int | float:
        """Return the value as a trial has it, or raise ValueError with what is wrong."""
        number = _number(value)
        if number != self.value:
            raise ValueError(
                f"is {_text(number)}, but the parameter is fixed at {_text(self.value)}"
            )
        return self.value

    def describe(self) -> str:
        """Return the value for a table."""
        return f"{_text(self.value)} (fixed)"

    def distribution(self) -> BaseDistribution:
        """Return Optuna's counterpart: a range that holds one value."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if isinstance(self.value, int):
            return IntDistribution(self.value, self.value)
        return FloatDistribution(self.value, self.value)


def block_at(fraction: float, n_layers: int) -> int:
    """Return the number of the block at a fraction of the depth: 0 is the first, 1 the last."""
    return round(fraction * (n_layers - 1))


class Depth(_Kind):
    """Blocks between two fractions of the depth; 0 is the first block, 1 the last."""

    type: Literal["depth"] = "depth"
    low: Annotated[Real, Field(ge=0, le=1)]
    high: Annotated[Real, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _check(self) -> Depth:
        if self.low > self.high:
            raise ValueError(
                f"low {_text(self.low)} lies above high {_text(self.high)}; exchange them"
            )
        return self

    def admit(self, value: object) -> float:
        """Return the fraction, or raise ValueError with what is wrong."""
        number = _number(value)
        if not self.low <= number <= self.high:
            raise ValueError(
                f"is {_text(number)}, outside {_text(self.low)} … {_text(self.high)}; under type "
                "depth it is a fraction of the model's depth, not a block's number"
            )
        return float(number)

    def resolved(self, n_layers: int) -> IntRange:
        """Return the same as numbers of blocks."""
        return IntRange(low=block_at(self.low, n_layers), high=block_at(self.high, n_layers))


Parameter = IntRange | FloatRange | Choice | Fixed
"""What a resolved search space consists of."""

KINDS: dict[str, type[IntRange | FloatRange | Choice | Fixed | Depth]] = {
    "int": IntRange,
    "float": FloatRange,
    "choice": Choice,
    "fixed": Fixed,
    "depth": Depth,
}
"""What `type:` may say."""


def middle_of(kind: Parameter) -> int | float:
    """Return a value in the middle that a trial may have; of logarithms where they are sampled."""
    low, high = kind.bounds
    if isinstance(kind, Fixed):
        return kind.value
    if isinstance(kind, Choice):
        return sorted(kind.values)[(len(kind.values) - 1) // 2]
    if isinstance(kind, FloatRange):
        return math.sqrt(low) * math.sqrt(high) if kind.log else (low + high) / 2
    return (int(low) + int(high)) // 2


def nearest_of(kind: Parameter, value: float) -> int | float:
    """Return the nearest value that a trial may have."""
    if isinstance(kind, Choice):
        return min(kind.values, key=lambda one: abs(one - value))
    low, high = kind.bounds
    inside = min(max(value, low), high)
    return kind.admit(round(inside) if isinstance(kind, IntRange) else inside)
