"""One row a trial: the shape in which tables, pictures, report and MLflow see a search."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from lunar_tune.display import Concise

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from lunar_tune.metrics.goal import Goal

COMPLETE, FAILED, RUNNING = "complete", "failed", "running"
LAYER = "layer"  # the parameter that says which decoder block is edited

HEADLINE_SCORES = ("forget_rouge1", "retain_rouge1", "factual_rouge1", "deviation_score")
"""The scores that every table shows, in this order."""
VERDICT_SCORES = ("forget_refused", "forget_degenerate")
"""The scores that are shown beside those of what is reported, where they are known."""
ERROR = "± standard error"
"""What a row of standard errors is called that stands below one of scores."""
LEAST_TRIALS = 10  # fewer tell `parameter_importance` next to nothing
LEAST_BELIEVED = 5  # trials of which something is believed


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrialRow(Concise):
    """What is known of one trial; scores, objective and feasibility if it is complete."""

    number: int
    state: str  # complete, failed or running
    parameters: Mapping[str, Any]
    scores: Mapping[str, float] = field(default_factory=dict)
    objective: float | None = None  # what the search makes small
    error: float = 0.0
    """Its standard error; 0 where it is not known."""
    second: float = 0.0  # what it makes small where the objective tells nothing apart
    feasible: bool | None = None
    retain_rows: int | None = None
    """Retain rows that the score was taken on; `retain_exact` where these are all."""
    retain_exact: bool | None = None
    max_new_tokens: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """`fit`, `evaluate`, `trial`, and `suggest`, the sampler's time."""
    failure: str | None = None
    again: bool = False
    """Whether its failure is not the setting's, which is run again under another number."""
    losses: tuple[float, ...] = field(default=(), repr=False)
    checks: tuple[Mapping[str, float], ...] = field(default=(), repr=False)
    """Periodic evaluations: `epochs`, `forget_rouge1`, `retain_rouge1` of samples."""
    answers_digest: str | None = field(default=None, repr=False)
    outlook: Mapping[str, float] = field(default_factory=dict, repr=False)
    """What was believed before it: the `chance` of a gain, and the `least` objective likely."""
    started: datetime | None = None
    ended: datetime | None = None
    """In local time: when it was asked for, and when its result was told."""

    @property
    def counts(self) -> bool:
        """Whether it has ended and is one of the trials that the search was to have."""
        return self.state != RUNNING and not self.again

    @property
    def reached(self) -> float:
        """The objective; infinite where there is none."""
        return math.inf if self.objective is None else self.objective

    @property
    def label(self) -> str:
        """The setting in short, for example `L22 c2.0 lr0.01`."""
        short = {"layer": "L", "coefficient": "c", "learning_rate": "lr"}
        return " ".join(
            f"{short.get(name, name)}{_brief(value)}" for name, value in self.parameters.items()
        )

    def flat(self) -> dict[str, Any]:
        """Return the row with the stable column names of `trials.parquet`."""
        placed = {*HEADLINE_SCORES, "retain_rows"}

        def fields(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names}

        return {
            **fields("number", "state"),
            **{f"params.{name}": value for name, value in self.parameters.items()},
            **{name: self.scores.get(name) for name in HEADLINE_SCORES},
            **fields("objective", "feasible", "retain_rows", "retain_exact", "max_new_tokens"),
            "seconds": self.seconds.get("trial"),
            **{f"seconds.{name}": value for name, value in self.seconds.items() if name != "trial"},
            **{name: value for name, value in self.scores.items() if name not in placed},
            **fields("started", "ended", "failure", "again", "answers_digest"),
        }


def score_cells(scores: Mapping[str, float], names: Iterable[str] = HEADLINE_SCORES) -> list[str]:
    """Return scores as cells of a table on the screen."""
    return [shown_score(scores.get(name)) for name in names]


def shown_score(score: float | None, error: float | None = None) -> str:
    """Return a score as it stands on the screen, perhaps ± an error; a dash where there is none."""
    if score is None:
        return "-"
    text = f"{score:.3f}" if abs(score) < 1000 else f"{score:.2e}"
    return text if error is None else f"{text} ± {shown_score(error)}"


def is_number(value: Any) -> bool:
    """Say whether a parameter's value has a place on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _brief(value: Any) -> str:
    """Return a number in few characters: 14, 2.0, 7.44, 0.01, 0.0031, 3.1e-5."""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if value == 0 or 0.1 <= abs(value) < 1000:
        text = f"{value:.2f}"
        return text[:-1] if text.endswith("0") else text
    digits, _, exponent = f"{value:.2g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def best_first(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Return the feasible trials, the best first: `alike`, then the others, lowest objective first.

    The second line of the goal decides between equals.
    """
    feasible = sorted(_feasible(rows), key=_by_objective)
    first = alike(feasible)
    numbers = {row.number for row in first}
    return first + [row for row in feasible if row.number not in numbers]


def alike(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Return the feasible trials whose objective cannot be told apart from the lowest.

    It is equal within their standard errors, as of independent samples. The best by the second line
    of the goal comes first.
    """
    return sorted(_equals(_feasible(rows)), key=_by_second)


def least_apart(error: float, other: float) -> float:
    """Return the least difference of scores with standard errors that tells them apart."""
    return math.hypot(error, other)


def _feasible(rows: Iterable[TrialRow]) -> list[TrialRow]:
    return [row for row in rows if row.state == COMPLETE and row.feasible]


def _equals(feasible: Sequence[TrialRow]) -> list[TrialRow]:
    """Return those whose objective is not told apart from the lowest, in their order."""
    lowest = min(feasible, key=_by_objective, default=None)
    return [
        row
        for row in feasible
        if lowest is not None
        and row.reached - lowest.reached <= least_apart(row.error, lowest.error)
    ]


def _by_objective(row: TrialRow) -> tuple[float, float, int]:
    return row.reached, row.second, row.number


def _by_second(row: TrialRow) -> tuple[float, float, int]:
    return row.second, row.reached, row.number


def nearest_first(rows: Iterable[TrialRow], goal: Goal) -> list[TrialRow]:
    """Return the completed trials, least missed bounds first; of several the best."""

    def missed(row: TrialRow) -> tuple[float, float, int]:
        by_how_much = sum(max(0.0, one) for one in goal.violations(row.scores).values())
        value = goal.value(row.scores)
        return by_how_much, math.inf if math.isnan(value) else value, row.number

    return sorted((row for row in rows if row.state == COMPLETE), key=missed)


def best_so_far(rows: Iterable[TrialRow]) -> list[tuple[TrialRow, TrialRow]]:
    """Return each trial with the best feasible one up to it, from the first feasible one on."""
    pairs: list[tuple[TrialRow, TrialRow]] = []
    feasible: list[TrialRow] = []
    for row in rows:
        feasible += _feasible([row])
        if feasible:
            pairs.append((row, min(_equals(feasible), key=_by_second)))
    return pairs


def parameter_importance(
    rows: Sequence[TrialRow], distributions: Mapping[str, BaseDistribution], metric: str
) -> dict[str, float] | None:
    """Return the share of a score's variance that each parameter explains alone, largest first.

    By fANOVA: a forest is fitted to all trials, and the variance of its prediction, taken evenly
    over the whole space, is split; what is missing to 1 is interaction. With few trials the shares
    are rough. A trial that was stopped early counts with the mean of the questions that it was
    asked. On one core it takes 0.4 s for 30 trials, 0.9 s for 100 and 5 s for 300. Parameters with
    one value are left out. None where too few trials have the score, or all have the same.

    Optuna's default, PED-ANOVA, asks which parameters lift a trial into the best tenth: three of 30
    trials, or all of them where many forget everything. Mean decrease in impurity weighs each
    region by its trials, and a sampler puts most where it is good.
    """
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    # Optuna 5.0 spreads a logarithmic parameter evenly over its plain values there, so that nine
    # tenths of a learning rate's weight would lie in its last decade: it is given the logarithm.
    searched = {name: kind for name, kind in distributions.items() if not kind.single()}
    logarithmic = {
        name: FloatDistribution(math.log(kind.low), math.log(kind.high))
        for name, kind in searched.items()
        if isinstance(kind, FloatDistribution) and kind.log
    }

    def place(name: str, value: Any) -> Any:
        kind = logarithmic.get(name)
        return value if kind is None else min(max(math.log(value), kind.low), kind.high)

    trials = [
        optuna.trial.create_trial(
            params={name: place(name, row.parameters[name]) for name in searched},
            distributions=searched | logarithmic,
            value=row.scores[metric],
        )
        for row in rows
        if row.state == COMPLETE
        and math.isfinite(row.scores.get(metric, math.nan))
        and searched.keys() <= row.parameters.keys()
    ]
    if len(trials) < LEAST_TRIALS or len({trial.value for trial in trials}) < 2 or not searched:
        return None
    study = optuna.create_study()
    study.add_trials(trials)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `normalize`
        shares = get_param_importances(
            study, evaluator=FanovaImportanceEvaluator(seed=0), normalize=False
        )
    return {name: float(share) for name, share in shares.items()}
