"""Every score that can be asked for by name: where it lies, which end is better, what it takes.

A name is a set and a quantity, as `forget_rouge1`; what each says is in the README. An entry point
of the group `lunar_tune.metrics` adds a `Metric`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lunar_tune.display import Concise
from lunar_tune.errors import InputError, Problems
from lunar_tune.registry import Registry

if TYPE_CHECKING:  # it imports numpy
    from lunar_tune.metrics.evaluate import AnswerRow

ANSWERS = "generated answers"
WHOLE_ANSWERS = "whole answers"
"""Answers that may not end as soon as they have said the truth (`TrialSpec.early_exit`)."""
LIKELIHOODS = "likelihoods of the true answers"
EMBEDDINGS = "sentence embeddings"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Metric(Concise):
    """A score: what it judges, where it lies, and what it takes."""

    name: str  # as on the command line and in `Evaluation.scores`
    sets: tuple[str, ...]  # sets of questions that it judges: forget, retain, factual
    low: float
    high: float  # it lies between the two, both included where finite
    lower_is_better: bool
    needs: frozenset[str]  # some of ANSWERS, WHOLE_ANSWERS, LIKELIHOODS, EMBEDDINGS
    # Gives the score from all answers of its sets; None where it is computed with others.
    compute: Callable[[Sequence[AnswerRow]], float] | None = None

    @property
    def quantity(self) -> str:
        """The name without the set."""
        return self.name.removeprefix(f"{self.sets[0]}_")

    def may_be(self, value: float) -> bool:
        """Say whether the score can have a value."""
        return math.isfinite(value) and self.low <= value <= self.high


METRICS: Registry[Metric] = Registry("metric", group="lunar_tune.metrics")

# Least and greatest value, whether a low one means that little is known, and what it needs.
_QUANTITIES = {
    "rouge1": (0.0, 1.0, True, ANSWERS),
    "rougeL": (0.0, 1.0, True, ANSWERS),
    "mrr": (0.0, 1.0, True, LIKELIHOODS),
    "hit_ratio": (0.0, 1.0, True, LIKELIHOODS),
    "log_prob": (-math.inf, 0.0, True, LIKELIHOODS),
    "answer_log_prob": (-math.inf, 0.0, True, LIKELIHOODS),
    "perplexity": (1.0, math.inf, False, LIKELIHOODS),
    "extraction_strength": (0.0, 1.0, True, LIKELIHOODS),
}
for _metric in (
    *(
        Metric(
            name=f"{_set}_{_quantity}",
            sets=(_set,),
            low=_low,
            high=_high,
            lower_is_better=_low_is_ignorance == (_set == "forget"),
            needs=frozenset({_need}),
        )
        for _set in ("forget", "retain", "factual")
        for _quantity, (_low, _high, _low_is_ignorance, _need) in _QUANTITIES.items()
    ),
    Metric(  # the distance of ROUGE-1 from 0 on forget and 1 on retain, in percent
        name="deviation_score",
        sets=("forget", "retain"),
        low=0.0,
        high=100 * math.sqrt(2),
        lower_is_better=True,
        needs=frozenset({ANSWERS}),
    ),
    Metric(  # how like the answers on forget are to answers that decline: a cosine
        name="refusal_quality",
        sets=("forget",),
        low=-1.0,
        high=1.0,
        lower_is_better=False,
        needs=frozenset({ANSWERS, WHOLE_ANSWERS, EMBEDDINGS}),
    ),
):
    METRICS.register(_metric.name, _metric)


def find_metric(text: str, *, said: str) -> Metric:
    """Return a metric by its name in whatever case, or raise an InputError that `said` begins."""
    asked = text.strip()
    try:
        return METRICS[next((name for name in METRICS if name.lower() == asked.lower()), asked)]
    except InputError as error:
        raise InputError(f"{said}: {error}") from error


def check_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """Return the own names of the metrics of `--metrics`, each once, or raise an InputError."""
    problems, found = Problems(), []
    for name in names:
        with problems.collect():
            found.append(find_metric(name, said="--metrics").name)
    problems.raise_if_any()
    return tuple(dict.fromkeys(found))


def need_of(names: Iterable[str]) -> frozenset[str]:
    """Return what some metrics need, together."""
    return frozenset[str]().union(*(METRICS[name].needs for name in names))
