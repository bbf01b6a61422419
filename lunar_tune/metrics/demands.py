"""What a user demands of scores, read from text: bounds to keep, and aims."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lunar_tune.errors import InputError, Problems
from lunar_tune.metrics.names import find_metric, is_metric

__all__ = [
    "Constraint",
    "Objective",
    "parse_constraint",
    "parse_constraints",
    "parse_objective",
]

_OPERATOR = re.compile(r"[<>=!~≤≥]+")
_SENSES = {">=": ">=", "<=": "<=", "≥": ">=", "≤": "<="}
_MEANT = {">": ">=", "=>": ">=", "<": "<=", "=<": "<="}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A bound that a score has to keep.

    Example:
        >>> round(Constraint("retain_rouge1", ">=", 0.8).violation({"retain_rouge1": 0.7}), 9)
        0.1
        >>> Constraint("retain_rouge1", ">=", 0.8).violation({})
        inf
    """

    metric: str
    sense: str
    """`>=` or `<=`."""
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.sense}{self.bound!r}".removesuffix(".0")

    def violation(self, scores: Mapping[str, float]) -> float:
        """Return by how much the bound is missed: 0 or less where it is kept.

        A score that is absent or NaN keeps no bound: infinity.
        """
        value = scores.get(self.metric, math.nan)
        if math.isnan(value):
            return math.inf
        return self.bound - value if self.sense == ">=" else value - self.bound


@dataclass(frozen=True, slots=True)
class Objective:
    """A score that is to become as good as possible."""

    metric: str
    direction: str
    """minimize or maximize."""


def parse_objective(
    text: str, *, direction: str | None = None, flag: str = "--minimise"
) -> Objective:
    """Read an aim: a metric's name.

    Args:
        text: The name.
        direction: minimize or maximize; None takes the metric's better one.
        flag: The option that says so, for the message.

    Raises:
        InputError: There is no such metric, or the direction would make the model worse.
    """
    name = text.strip()
    if _OPERATOR.search(name):
        raise InputError(f"{flag} {name}: a metric's name alone; a bound belongs to --constrain.")
    try:
        metric = find_metric(name)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None
    if direction not in (None, metric.direction):
        better = "lower" if metric.lower_is_better else "higher"
        raise InputError(
            f"{flag} {metric.name}: {better} is better. To keep it within a bound, use "
            f"--constrain '{metric.name}>=VALUE' or '<=VALUE'."
        )
    return Objective(metric.name, metric.direction)


def parse_constraint(text: str, *, flag: str = "--constrain") -> Constraint:
    """Read a demand, `METRIC>=VALUE` or `METRIC<=VALUE`, with or without spaces.

    Args:
        text: The demand.
        flag: The option that it was given with, for the message.

    Raises:
        InputError: It is none, names no metric, or a value that the metric cannot take; all that
            is wrong with it is said.

    Example:
        >>> parse_constraint("retain_rouge1 >= 0.8")
        Constraint(metric='retain_rouge1', sense='>=', bound=0.8)
    """
    said = f"{flag} {text.strip()!r}"
    name, sense, value = _parts(text, said, flag)
    problems = Problems()
    metric = bound = None
    try:
        metric = find_metric(name)
    except InputError as error:
        problems.add(f"{said}: {error}")
    try:
        bound = float(value)
    except ValueError:
        problems.add(f"{said}: {value!r} is not a number. Write for example {name}{sense}0.8.")
    if metric is not None and bound is not None:
        try:
            metric.check(bound)
        except InputError as error:
            problems.add(f"{said}: {error}")
    problems.raise_if_any()
    if metric is None or bound is None:
        raise AssertionError("every None above comes with a noted problem")
    return Constraint(metric.name, sense, bound)


def parse_constraints(texts: Iterable[str], *, flag: str = "--constrain") -> tuple[Constraint, ...]:
    """Read several demands, which must not contradict each other.

    Raises:
        InputError: One cannot be read, a metric is bounded twice on one side, or no value keeps
            both of its bounds; all mistakes at once.
    """
    problems = Problems()
    read: dict[tuple[str, str], Constraint] = {}
    for text in texts:
        with problems.collect():
            one = parse_constraint(text, flag=flag)
            same = read.setdefault((one.metric, one.sense), one)
            if same is not one:
                problems.add(f"{flag}: {same} and {one}: one of them is enough, leave one out.")
    for (metric, sense), one in read.items():
        other = read.get((metric, "<="))
        if sense == ">=" and other is not None and one.bound > other.bound:
            problems.add(f"{flag}: no value keeps both {one} and {other}.")
    problems.raise_if_any()
    return tuple(read.values())


def _parts(text: str, said: str, flag: str) -> tuple[str, str, str]:
    """Return name, sense and value of a demand as they were written."""
    found = _OPERATOR.search(text)
    if found is None:
        raise InputError(
            f"{said}: METRIC>=VALUE or METRIC<=VALUE, in quotation marks, because a shell takes "
            "> and < for itself."
        )
    name, value = text[: found.start()].strip(), text[found.end() :].strip()
    sense = _SENSES.get(found.group())
    if sense is None:
        meant = _MEANT.get(found.group())
        ask = f"write {meant}" if meant else "write >= or <=; a score is never exactly a value"
        raise InputError(f"{said}: {found.group()} is not a bound; {ask}.")
    if _OPERATOR.search(value):
        raise InputError(f"{said}: one bound at a time; give {flag} twice.")
    if not name or not value:
        raise InputError(f"{said}: {'the metric' if not name else 'the value'} is missing.")
    if is_metric(value):
        turned = "<=" if sense == ">=" else ">="
        raise InputError(f"{said}: the metric comes first: {value}{turned}{name}.")
    return name, sense, value
