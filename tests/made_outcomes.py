"""Outcomes of tasks by hand, without a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lunar_tune.metrics.evaluate import Evaluation
from lunar_tune.study.study import Study
from lunar_tune.trial.evaluator import Check
from lunar_tune.trial.tasks import Failure, Outcome
from lunar_tune.trial.worker import TrialResult

N_RETAIN = 84
DIGEST = "ab"


class KilledError(BaseException):
    """The end of a process."""


def losses_of(answers: Path) -> tuple[float, ...]:
    """Return the loss curve that a file of answers has, read without the code under test."""
    return tuple(json.loads(pq.read_schema(answers).metadata[b"lunar_tune.losses"]))


def trial_result(
    forget: float,
    retain: float,
    *,
    retain_rows: int = N_RETAIN,
    budget: int = 32,
    losses: tuple[float, ...] = (2.0, 1.0),
    **scores: float,
) -> TrialResult:
    """Return what a trial gives that reaches two scores."""
    return TrialResult(
        parameters={},
        evaluation=Evaluation(
            rows=(),
            scores={
                "forget_rouge1": forget,
                "retain_rouge1": retain,
                "deviation_score": 100 * math.hypot(forget, 1 - retain),
                "retain_rows": retain_rows,
                **scores,
            },
        ),
        losses=losses,
        seconds={"fit": 0.5, "evaluate": 0.25, "trial": 0.75},
        max_new_tokens=budget,
        checks=(Check(epochs=1, forget_rouge1=0.9, retain_rouge1=0.8),),
    )


def base_model(forget: float = 1.0, retain: float = 0.95, **more: Any) -> Outcome:
    """Return the outcome of the base model's evaluation."""
    return Outcome(result=trial_result(forget, retain), **more)


def ended(forget: float = 0.2, retain: float = 0.9) -> Outcome:
    """Return the outcome of a trial, or of a confirmation."""
    return Outcome(result=trial_result(forget, retain, budget=512))


def failed(reason: str, **facts: bool) -> Outcome:
    """Return the outcome of a task that failed."""
    return Outcome(failure=Failure(reason=reason, **facts))


def complete(study: Study, number: int, result: TrialResult, *, digest: str = DIGEST) -> None:
    """Tell a study a trial's result, as a loop does when the answers are written."""
    study.complete(number, result, answers_digest=digest, n_retain=N_RETAIN)
