"""Every score that can be asked for by name: what it says, where it lies, what it takes.

A name is a set and a quantity: `forget_rouge1` is ROUGE-1 on the questions to forget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lunar_tune.errors import InputError, Problems
from lunar_tune.registry import Registry

if TYPE_CHECKING:
    from lunar_tune.metrics.evaluate import AnswerRow

__all__ = [
    "ANSWERS",
    "EMBEDDINGS",
    "LIKELIHOODS",
    "METRICS",
    "WHOLE_ANSWERS",
    "Metric",
    "check_metrics",
    "find_metric",
    "is_metric",
    "need_of",
]

ANSWERS = "generated answers"
WHOLE_ANSWERS = "whole answers"
"""Answers that may not end as soon as they have said the truth (`EngineSettings.early_exit`)."""
LIKELIHOODS = "likelihoods of the true answers"
EMBEDDINGS = "sentence embeddings"

MINIMIZE, MAXIMIZE = "minimize", "maximize"  # as Optuna writes them


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A score: what it says, where it lies, and what it takes."""

    name: str
    """As on the command line and in `Evaluation.scores`."""
    sets: tuple[str, ...]
    """Sets of questions that it judges: forget, retain, factual."""
    quantity: str
    """The name without the set."""
    low: float
    high: float
    """It lies between the two, both included where finite."""
    lower_is_better: bool
    needs: frozenset[str]
    """Some of ANSWERS, WHOLE_ANSWERS, LIKELIHOODS, EMBEDDINGS."""
    compute: Callable[[Sequence[AnswerRow]], float] | None = None
    """Gives the score from all answers of its sets; None where it is computed with others."""

    @property
    def direction(self) -> str:
        """The better direction: minimize or maximize."""
        return MINIMIZE if self.lower_is_better else MAXIMIZE

    @property
    def range(self) -> str:
        """Where it lies, in words."""
        if math.isinf(self.high):
            return f"is at least {self.low:g}"
        if math.isinf(self.low):
            return f"is at most {self.high:g}"
        return f"lies between {self.low:g} and {self.high:g}"

    def check(self, value: float) -> None:
        """Check that the score can take a value.

        Raises:
            InputError: It cannot.
        """
        if not math.isfinite(value):
            raise InputError(f"{value:g}: not a number that {self.name} can be compared with.")
        if not self.low <= value <= self.high:
            raise InputError(f"{value:g}: {self.name} {self.range}.")


METRICS: Registry[Metric] = Registry("metric", group="lunar_tune.metrics")
"""A package adds one with an entry point of its name in the group `lunar_tune.metrics`."""

# Of each quantity: least and greatest value, whether a low one means that little is known, and what
# it needs. What each of them says is in the README.
_QUANTITIES: Mapping[str, tuple[float, float, bool, str]] = {
    "rouge1": (0.0, 1.0, True, ANSWERS),
    "rougeL": (0.0, 1.0, True, ANSWERS),
    "mrr": (0.0, 1.0, True, LIKELIHOODS),
    "hit_ratio": (0.0, 1.0, True, LIKELIHOODS),
    "log_prob": (-math.inf, 0.0, True, LIKELIHOODS),
    "answer_log_prob": (-math.inf, 0.0, True, LIKELIHOODS),
    "perplexity": (1.0, math.inf, False, LIKELIHOODS),
    "extraction_strength": (0.0, 1.0, True, LIKELIHOODS),
}


def _register(metric: Metric) -> None:
    METRICS.register(metric.name, metric)


for _set in ("forget", "retain", "factual"):
    for _quantity, (_low, _high, _low_is_ignorance, _need) in _QUANTITIES.items():
        _register(
            Metric(
                name=f"{_set}_{_quantity}",
                sets=(_set,),
                quantity=_quantity,
                low=_low,
                high=_high,
                lower_is_better=_low_is_ignorance == (_set == "forget"),
                needs=frozenset({_need}),
            )
        )
# The distance of ROUGE-1 from 0 on forget and 1 on retain, in percent.
_register(
    Metric(
        name="deviation_score",
        sets=("forget", "retain"),
        quantity="deviation_score",
        low=0.0,
        high=100 * math.sqrt(2),
        lower_is_better=True,
        needs=frozenset({ANSWERS}),
    )
)
# How like the answers on forget are to answers that decline: a cosine.
_register(
    Metric(
        name="refusal_quality",
        sets=("forget",),
        quantity="refusal_quality",
        low=-1.0,
        high=1.0,
        lower_is_better=False,
        needs=frozenset({ANSWERS, WHOLE_ANSWERS, EMBEDDINGS}),
    )
)


def find_metric(name: str) -> Metric:
    """Return a metric by its name, in whatever case.

    Raises:
        InputError: There is none; the message lists those that exist.
    """
    return METRICS[_own_case(name)]


def is_metric(text: str) -> bool:
    """Say whether a text is a metric's name, in whatever case."""
    return _own_case(text) in METRICS


def _own_case(text: str) -> str:
    """Return a metric's name as it is written, from any case; another text as it is."""
    stripped = text.strip()
    return next((name for name in METRICS if name.lower() == stripped.lower()), stripped)


def need_of(names: Iterable[str]) -> frozenset[str]:
    """Return what some metrics need, together."""
    return frozenset[str]().union(*(find_metric(name).needs for name in names))


def check_metrics(names: Iterable[str], *, flag: str = "--metrics") -> tuple[str, ...]:
    """Return the metrics' own names, each once.

    Raises:
        InputError: There is no such metric; all of them are named.
    """
    problems = Problems()
    found: dict[str, None] = {}
    for name in names:
        try:
            found[find_metric(name).name] = None
        except InputError as error:
            problems.add(f"{flag}: {error}")
    problems.raise_if_any()
    return tuple(found)
