"""Means over the rows of a set, and how sure they are: `retain_rouge1` and `retain_rouge1_se`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_ERROR = "_se"


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN where there is nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def mean_scores(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return a mean over rows and its standard error, under the names of both; NaN of nothing.

    The error is the bootstrap's, of infinitely many resamples of the rows: sqrt(Σ(x - mean)²)/n
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 6).
    """
    middle = mean(values)
    error = math.dist(values, [middle] * len(values)) / len(values) if values else math.nan
    return {name: middle, error_name(name): error}


def error_name(score: str) -> str:
    """Return what the standard error of a score is called."""
    return f"{score}{_ERROR}"


def errors_of(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the standard errors that are among scores, each by its score's name."""
    return {
        name.removesuffix(_ERROR): error for name, error in scores.items() if name.endswith(_ERROR)
    }
