"""A goal: how good scores are, which bounds they miss, and what a stopped trial still tells."""

from __future__ import annotations

import math

import pytest

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal, score_label

DEFAULT = Goal.read("forget_rouge1", ["retain_rouge1>=0.8"])


def test_the_default_goal_minimises_forget_and_keeps_retain() -> None:
    scores = {"forget_rouge1": 0.25, "retain_rouge1": 0.75}
    assert DEFAULT.value(scores) == 0.25
    assert DEFAULT.violations(scores) == {"retain_rouge1>=0.8": pytest.approx(0.05)}
    assert not DEFAULT.is_kept(scores)
    assert DEFAULT.is_kept({"retain_rouge1": 0.8})
    assert str(DEFAULT) == "lowest forget ROUGE-1 subject to retain ROUGE-1 of at least 0.8"
    assert (DEFAULT.floor, DEFAULT.stoppable_floor) == (0.8, 0.8)
    assert Goal.read(*DEFAULT.text) == DEFAULT


def test_what_is_better_when_it_is_higher_is_made_small_by_its_negative() -> None:
    goal = Goal.read("factual_rouge1", ["forget_rouge1 <= 0.2", "retain_rouge1>=0.5"])
    assert goal.value({"factual_rouge1": 0.7}) == -0.7
    assert str(goal) == (
        "highest factual ROUGE-1 subject to forget ROUGE-1 of at most 0.2, "
        "retain ROUGE-1 of at least 0.5"
    )
    assert goal.metrics == ("factual_rouge1", "forget_rouge1", "retain_rouge1")


def test_a_score_that_is_not_there_keeps_no_bound_and_has_no_value() -> None:
    assert math.isnan(DEFAULT.value({}))
    assert DEFAULT.violations({}) == {"retain_rouge1>=0.8": math.inf}


def test_a_trial_may_be_stopped_only_where_all_that_counts_is_known_then() -> None:
    """Factual answers are not asked after a stop, likelihoods not computed."""
    assert Goal.read("deviation_score", ["retain_rouge1>=0.7"]).stoppable_floor == 0.7
    assert Goal.read("forget_mrr", ["retain_rouge1>=0.7"]).stoppable_floor is None
    assert Goal.read("forget_rouge1", ["factual_rouge1>=0.7"]).floor is None
    mixed = Goal.read("forget_rouge1", ["retain_rouge1>=0.7", "factual_rouge1>=0.7"])
    assert (mixed.floor, mixed.stoppable_floor) == (0.7, None)


def test_without_bounds_every_trial_is_feasible() -> None:
    goal = Goal.read("deviation_score", [])
    assert goal.is_kept({})
    assert str(goal) == "lowest deviation score"


def test_labels_are_words() -> None:
    labels = [score_label(name) for name in ("retain_mrr", "forget_rougeL", "refusal_quality")]
    assert labels == ["retain MRR", "forget ROUGE-L", "refusal quality"]


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InputError, match="unknown metric 'forget_rogue1'"):
        Goal.read("forget_rogue1", [])
