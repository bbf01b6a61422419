"""Scores by name, bounds on them, and what a search is after; without torch.

The name of a score is a set and a quantity, as `forget_rouge1`; what each says is in the README. An
entry point of the group `lunar_tune.metrics` adds a `Metric`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

from lunar_tune.config.options import RETAINING, SearchConfig
from lunar_tune.display import Concise
from lunar_tune.errors import InputError, Problems
from lunar_tune.metrics.means import error_name
from lunar_tune.registry import Registry

if TYPE_CHECKING:  # it imports numpy
    from lunar_tune.metrics.evaluate import AnswerRow

ANSWERS = "generated answers"
WHOLE_ANSWERS = "whole answers"
"""Answers of the metric's sets may not end once they have said the truth."""
LIKELIHOODS = "likelihoods of the true answers"
VERDICTS = "verdicts on the generated answers"
"""Whether each declines or is none, for which the base model judges it (`metrics.declining`)."""
EMBEDDINGS = "sentence embeddings"

_BOUND = re.compile(r"\s*([^\W\d][^<>=!~≤≥\s]*)\s*(>=|<=|≥|≤)\s*([^<>=!~≤≥]*[^<>=!~≤≥\s])\s*")
_WORDS = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "mrr": "MRR"}
FLOORED = "retain_rouge1"
# What is known of a trial that was stopped because it had missed the retain floor for certain.
KNOWN_AT_A_STOP = {
    *(FLOORED, "retain_rougeL", "forget_rouge1", "forget_rougeL", "deviation_score"),
    *("forget_refused", "forget_degenerate"),
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Metric(Concise):
    """A score: what it judges, where it lies, and what it takes."""

    name: str  # as on the command line and in `Evaluation.scores`
    sets: tuple[str, ...]  # sets of questions that it judges: forget, retain, factual
    low: float
    high: float  # it lies between the two, both included where finite
    lower_is_better: bool
    needs: frozenset[str]  # some of ANSWERS, WHOLE_ANSWERS, LIKELIHOODS, VERDICTS, EMBEDDINGS
    # Gives the score from all answers of its sets; None where it is computed with others.
    compute: Callable[[Sequence[AnswerRow]], float] | None = None

    @property
    def quantity(self) -> str:
        """The name without the set."""
        return self.name.removeprefix(f"{self.sets[0]}_")

    def smaller(self, scores: Mapping[str, float]) -> float:
        """Return what is the smaller the better; NaN where it is not known."""
        value = scores.get(self.name, math.nan)
        return value if self.lower_is_better else -value

    @property
    def least(self) -> float:
        """The least that `smaller` can be."""
        return self.low if self.lower_is_better else -self.high

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
    *(
        Metric(  # the share of the answers that decline, and of those that are none
            name=f"{_set}_{_quantity}",
            sets=(_set,),
            low=0.0,
            high=1.0,
            lower_is_better=(_set, _quantity) != ("forget", "refused"),
            needs=frozenset({ANSWERS, WHOLE_ANSWERS, VERDICTS}),
        )
        for _set in ("forget", "retain", "factual")
        for _quantity in ("refused", "degenerate")
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


@dataclass(frozen=True, slots=True)
class Constraint:
    """A bound that a score has to keep."""

    metric: str
    sense: str  # `>=` or `<=`
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.sense}{self.bound!r}".removesuffix(".0")

    def margin(self, scores: Mapping[str, float]) -> float:
        """Return by how many standard errors of the score it is kept, less than 0 if missed.

        Infinity where the error is not known, or 0.
        """
        error = scores.get(error_name(self.metric), 0.0)
        return -self.violation(scores) / error if error > 0 else math.inf

    def violation(self, scores: Mapping[str, float]) -> float:
        """Return by how much the bound is missed, 0 or less if kept; infinity without a score."""
        value = scores.get(self.metric, math.nan)
        if math.isnan(value):
            return math.inf
        return self.bound - value if self.sense == ">=" else value - self.bound


@dataclass(frozen=True, slots=True, repr=False)
class Goal(Concise):
    """A score to make as good as possible subject to bounds on others.

    Of settings that it does not tell apart the best by a second one is the best.
    """

    objective: Metric
    constraints: tuple[Constraint, ...]
    then: Metric

    @classmethod
    def read(cls, objective: str, constraints: Iterable[str], then: str = FLOORED) -> Goal:
        """Return a goal from metrics' names and bounds, as they are on the command line.

        An InputError says all mistakes at once: what means nothing, a metric that is bounded twice
        on one side, or bounds that no value keeps.
        """
        problems = Problems()
        with problems.collect():
            metric = find_metric(objective, said="--minimise")
        with problems.collect():
            second = find_metric(then, said="--then")
        read: dict[tuple[str, str], Constraint] = {}
        for text in constraints:
            with problems.collect():
                one = parse_constraint(text)
                same = read.setdefault((one.metric, one.sense), one)
                if same is not one:
                    problems.add(
                        f"--constrain: {same} and {one} constrain the same; leave one out."
                    )
        for (name, sense), one in read.items():
            other = read.get((name, "<="))
            if sense == ">=" and other is not None and one.bound > other.bound:
                problems.add(f"--constrain: no value keeps both {one} and {other}.")
        problems.raise_if_any()
        return cls(metric, tuple(read.values()), second)

    def value(self, scores: Mapping[str, float]) -> float:
        """Return what is to be made small; NaN where it is not known."""
        return self.objective.smaller(scores)

    def second(self, scores: Mapping[str, float]) -> float | None:
        """Return what is to be made small where the objective tells nothing apart, if known."""
        value = self.then.smaller(scores)
        return value if math.isfinite(value) else None

    def error(self, scores: Mapping[str, float]) -> float:
        """Return the objective's standard error; 0 where it is not known."""
        return scores.get(error_name(self.objective.name), 0.0)

    def violations(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return by how much each bound is missed; 0 or less where it is kept."""
        return {str(one): one.violation(scores) for one in self.constraints}

    def bound_errors(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return the standard error of each bounded score; 0 where it is not known."""
        return {str(one): scores.get(error_name(one.metric), 0.0) for one in self.constraints}

    def is_known(self, scores: Mapping[str, float]) -> bool:
        """Say whether the objective and all that is bounded is known."""
        return all(math.isfinite(scores.get(name, math.nan)) for name in self.decisive)

    def is_kept(self, scores: Mapping[str, float]) -> bool:
        """Say whether every bound is kept."""
        return not self.missed(scores)

    def missed(self, scores: Mapping[str, float]) -> tuple[Constraint, ...]:
        """Return the bounds that are not kept."""
        return tuple(one for one in self.constraints if one.violation(scores) > 0)

    def barely_kept(self, scores: Mapping[str, float]) -> dict[Constraint, float]:
        """Return the bounds that are kept by less than one standard error, and by how many of it.

        What is kept least comes first.
        """
        margins = {one: one.margin(scores) for one in self.constraints}
        return {
            one: margin
            for one, margin in sorted(margins.items(), key=itemgetter(1))
            if 0 <= margin < 1
        }

    def penalised(self, scores: Mapping[str, float]) -> float:
        """Return what is to be made small, so that every feasible setting comes first.

        Of an infeasible one it is the objective's worst value and by how much bounds are missed;
        infinity where there is no worst value.
        """
        missed = sum(max(0.0, one) for one in self.violations(scores).values())
        end = self.objective.high if self.objective.lower_is_better else -self.objective.low
        return end + missed if missed else self.value(scores)

    def worst(self, seen: Iterable[Mapping[str, float]]) -> tuple[float, dict[str, float]] | None:
        """Return the value and violations of a setting that is as bad as one can be.

        Where a metric has no end, the worst score that was seen counts; None if there is none.
        """
        seen = list(seen)
        ends = [(self.objective.name, self.objective.lower_is_better)]
        ends += [(one.metric, one.sense == "<=") for one in self.constraints]
        worst = []
        for name, high_is_bad in ends:
            end = METRICS[name].high if high_is_bad else METRICS[name].low
            if not math.isfinite(end):
                known = [one[name] for one in seen if math.isfinite(one.get(name, math.nan))]
                if not known:
                    return None
                end = max(known) if high_is_bad else min(known)
            worst.append(end)
        violations = {
            str(one): one.violation({one.metric: end})
            for one, end in zip(self.constraints, worst[1:], strict=True)
        }
        return self.value({self.objective.name: worst[0]}), violations

    @property
    def text(self) -> tuple[str, tuple[str, ...], str]:
        """Objective, bounds and second line as `read` takes them."""
        return self.objective.name, tuple(map(str, self.constraints)), self.then.name

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores that it takes, each once, but for the one that is always known."""
        then = () if self.then.name == FLOORED else (self.then.name,)
        return tuple(dict.fromkeys((*self.decisive, *then)))

    @property
    def decisive(self) -> tuple[str, ...]:
        """Names of the objective and of what is bounded."""
        return self.objective.name, *(one.metric for one in self.constraints)

    @property
    def shown(self) -> tuple[str, str]:
        """The two scores that pictures show: what is made good, and what else is kept."""
        first = self.objective.name
        others = [name for name in (*self.metrics, FLOORED, "forget_rouge1") if name != first]
        return first, others[0]

    @property
    def retaining(self) -> Constraint | None:
        """The constraint that is a floor of retain ROUGE-1, if there is one."""
        floors = (c for c in self.constraints if (c.metric, c.sense) == (FLOORED, ">="))
        return next(floors, None)

    @property
    def floor(self) -> float | None:
        """Least retain ROUGE-1, if that is bounded."""
        return self.retaining.bound if self.retaining is not None else None

    @property
    def stoppable_floor(self) -> float | None:
        """The floor at which a trial may be stopped: where all that counts is known then."""
        return self.floor if set(self.decisive) <= KNOWN_AT_A_STOP else None

    def __str__(self) -> str:
        best = "lowest" if self.objective.lower_is_better else "highest"
        text = f"{best} {score_label(self.objective.name)}"
        if self.constraints:
            text += f" subject to {in_words(self.constraints)}"
        if self.then is not self.objective:
            best = "lowest" if self.then.lower_is_better else "highest"
            text += f", of equals the {best} {score_label(self.then.name)}"
        return text


def parse_constraint(text: str) -> Constraint:
    """Read a bound, `METRIC>=VALUE` or `<=`, with or without spaces, or raise an InputError."""
    said = f"--constrain {text.strip()!r}"
    found = _BOUND.fullmatch(text)
    if found is None:
        raise InputError(
            f"{said}: write one constraint, METRIC>=VALUE or METRIC<=VALUE, such as "
            "retain_rouge1>=0.8, in quotation marks, because a shell takes > and < for itself."
        )
    name, written, value = found.groups()
    sense = {"≥": ">=", "≤": "<="}.get(written, written)
    problems, bound = Problems(), math.nan
    metric = problems.attempt(lambda: find_metric(name, said=said))
    try:
        bound = float(value)
        if metric is not None and not metric.may_be(bound):
            problems.add(
                f"{said}: {metric.name} must be a finite number from {metric.low:g} to "
                f"{metric.high:g}."
            )
    except ValueError:
        problems.add(f"{said}: {value!r} is not a number. Write for example {name}{sense}0.8.")
    problems.raise_if_any()
    return Constraint(metric.name if metric is not None else name, sense, bound)


def goal_of(config: SearchConfig) -> Goal:
    """Return what a search is after; where no bounds are named, with the usual one."""
    return Goal.read(config.minimise, config.constrain or (RETAINING,), config.then)


def in_words(bounds: Iterable[Constraint]) -> str:
    """Return bounds as they are written in a sentence: retain ROUGE-1 of at least 0.8."""
    return ", ".join(
        f"{score_label(one.metric)} of at {'least' if one.sense == '>=' else 'most'} {one.bound:g}"
        for one in bounds
    )


def is_score(name: str) -> bool:
    """Say whether a name is that of a metric, or of its standard error."""
    return name.removesuffix(error_name("")) in METRICS


def score_label(name: str) -> str:
    """Return a metric's name as it is written in a sentence: forget ROUGE-1."""
    return " ".join(_WORDS.get(word, word) for word in name.split("_"))
