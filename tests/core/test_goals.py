"""Names and ranges of scores, what may be demanded of them, and how good scores are then."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.metrics.evaluate import deviation_score
from lunar_tune.metrics.goal import Constraint, Goal, parse_constraint, score_label
from lunar_tune.metrics.likelihood import AnswerLikelihood, likelihood_means
from lunar_tune.metrics.names import (
    ANSWERS,
    EMBEDDINGS,
    LIKELIHOODS,
    METRICS,
    WHOLE_ANSWERS,
    check_metrics,
    find_metric,
    need_of,
)
from lunar_tune.trial.assemble import assemble

DEFAULT = Goal.read("forget_rouge1", ["retain_rouge1>=0.8"])

# The registry


def test_every_likelihood_has_a_name_in_every_set() -> None:
    for one in ("forget", "retain", "factual"):
        mine = {m.quantity for m in METRICS.values() if LIKELIHOODS in m.needs and m.sets == (one,)}
        assert mine == set(likelihood_means([]))
    assert all(metric.name == name for name, metric in METRICS.items())


def test_forgetting_and_keeping_want_the_opposite() -> None:
    lower = ["forget_rouge1", "forget_mrr", "forget_log_prob", "retain_perplexity"]
    higher = ["retain_rouge1", "factual_rougeL", "retain_hit_ratio", "forget_perplexity"]
    for name in (*lower, "forget_extraction_strength", "deviation_score"):
        assert METRICS[name].direction == "minimize"
    for name in (*higher, "refusal_quality"):
        assert METRICS[name].direction == "maximize"


def test_the_best_and_the_worst_lie_at_the_ends_of_a_range() -> None:
    """A model that knows an answer for certain, and one that does not know it at all."""
    known = AnswerLikelihood(ranks=(1, 1), chosen=(True, True), log_probs=(0.0, 0.0, 0.0))
    unknown = AnswerLikelihood(
        ranks=(10**6,) * 2, chosen=(False, False), log_probs=(-1e5, -1e5, -1e5)
    )
    for one in (known, unknown):
        for quantity, value in likelihood_means([one]).items():
            assert METRICS[f"forget_{quantity}"].may_be(value)
    for quantity, value in likelihood_means([known]).items():
        metric = METRICS[f"forget_{quantity}"]
        assert value == (metric.high if metric.lower_is_better else metric.low)
    deviation = METRICS["deviation_score"]
    assert deviation_score(0.0, 1.0) == deviation.low
    assert deviation_score(1.0, 0.0) == pytest.approx(deviation.high)


def test_what_metrics_need_is_what_each_of_them_needs() -> None:
    assert need_of(()) == frozenset()
    assert need_of(["forget_rouge1", "retain_mrr"]) == {ANSWERS, LIKELIHOODS}
    assert need_of(["refusal_quality"]) == {ANSWERS, WHOLE_ANSWERS, EMBEDDINGS}


def test_a_name_is_found_in_whatever_case_and_once() -> None:
    assert find_metric(" Forget_ROUGEl ", said="--minimise").name == "forget_rougeL"
    names = ("forget_mrr", "FORGET_MRR", "retain_mrr")
    assert check_metrics(names) == ("forget_mrr", "retain_mrr")
    assert assemble(RunOptions(metrics=names)).metrics == ("forget_mrr", "retain_mrr")


def test_unknown_metrics_are_all_named_with_what_is_close_and_what_there_is() -> None:
    with pytest.raises(InputError) as raised:
        check_metrics(("forget_mmr", "retain_mrr", "bleu"))
    message = str(raised.value)
    assert "--metrics: unknown metric 'forget_mmr'. Did you mean 'forget_mrr'?" in message
    assert "--metrics: unknown metric 'bleu'." in message
    assert "There are: forget_rouge1, forget_rougeL, forget_mrr" in message


def test_metrics_that_cannot_be_had_are_refused_before_anything_is_loaded() -> None:
    options = RunOptions(metrics=("factual_mrr",), factual_data="none", evaluation_rows=0)
    with pytest.raises(InputError) as raised:
        assemble(options)
    assert "--metrics factual_mrr: there are no questions with" in str(raised.value)
    assert "--evaluation-rows 0" in str(raised.value)


def test_names_are_read_without_torch() -> None:
    code = (
        "import sys, lunar_tune.metrics.goal, lunar_tune.metrics.names\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_labels_are_words() -> None:
    labels = [score_label(name) for name in ("retain_mrr", "forget_rougeL", "refusal_quality")]
    assert labels == ["retain MRR", "forget ROUGE-L", "refusal quality"]


# Bounds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  retain_rouge1  >=  .8 ", ("retain_rouge1", ">=", 0.8)),
        ("forget_mrr <=1e-1", ("forget_mrr", "<=", 0.1)),
        ("forget_log_prob<=-20", ("forget_log_prob", "<=", -20.0)),
        ("FACTUAL_rougel≥1", ("factual_rougeL", ">=", 1.0)),
        ("retain_perplexity≤1000000", ("retain_perplexity", "<=", 1e6)),
    ],
)
def test_a_bound_is_read_with_and_without_spaces(text: str, expected: Any) -> None:
    read = parse_constraint(text)
    assert read == Constraint(*expected) == parse_constraint(str(read))


NOT_ONE_BOUND = (
    *(f"retain_rouge1{sign}0.8" for sign in ("=", "==", "!=", ">", "<", "=>", "=<")),
    *("retain_rouge1>=", ">=0.8", "retain_rouge1>=0.5<=0.8", "retain_rouge1>=>=1"),
    *("0.8<=retain_rouge1", "0.8>=forget_mrr", "retain_rouge1 forget_mrr>=0.8"),
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "METRIC>=VALUE or METRIC<=VALUE"),
        # What is left where the shell took `>=0.8` as the name of a file.
        ("retain_rouge1", "in quotation marks, because a shell takes > and <"),
        *((text, "write one bound, METRIC>=VALUE or METRIC<=VALUE") for text in NOT_ONE_BOUND),
        ("retain_rouge>=0.8", "unknown metric 'retain_rouge'. Did you mean 'retain_rougeL'?"),
        ("forget-mrr<=0.1", "unknown metric 'forget-mrr'. Did you mean 'forget_mrr'?"),
        ("retain_rouge1>=much", "'much' is not a number. Write for example retain_rouge1>=0.8."),
        ("retain_rouge1>=80%", "'80%' is not a number"),
        ("retain_rouge1>=0,8", "'0,8' is not a number"),
        ("retain_rouge1>=80", "retain_rouge1 is a finite number from 0 to 1."),
        ("forget_log_prob<=20", "forget_log_prob is a finite number from -inf to 0."),
        ("retain_perplexity<=inf", "retain_perplexity is a finite number from 1 to inf."),
        ("forget_rouge1<=nan", "forget_rouge1 is a finite number from 0 to 1."),
        ("deviation_score<=150", "deviation_score is a finite number from 0 to 141.421."),
    ],
)
def test_a_bound_that_means_nothing_is_refused_with_what_to_write(text: str, words: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_constraint(text)
    assert f"--constrain {text!r}: " in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("bound", "scores", "violation"),
    [
        ("retain_rouge1>=0.75", {"retain_rouge1": 0.5}, 0.25),
        ("retain_rouge1>=0.75", {"retain_rouge1": 0.75}, 0.0),
        ("retain_rouge1>=0.75", {"retain_rouge1": 1.0}, -0.25),
        ("forget_mrr<=0.25", {"forget_mrr": 0.5, "retain_mrr": 0.0}, 0.25),
        ("forget_log_prob<=-20", {"forget_log_prob": -30.0}, -10.0),
        ("forget_mrr<=0.25", {"retain_mrr": 0.0}, math.inf),
        ("forget_mrr<=0.25", {"forget_mrr": math.nan}, math.inf),
        ("retain_mrr>=0.25", {"retain_mrr": math.nan}, math.inf),
    ],
)
def test_a_violation_is_0_or_less_where_the_bound_is_kept(
    bound: str, scores: dict[str, float], violation: float
) -> None:
    assert parse_constraint(bound).violation(scores) == violation


# Goals


def test_all_that_is_wrong_with_a_goal_is_said_at_once() -> None:
    texts = ["retain>=a_lot", "forget_mrr=0", "retain_mrr>=0.5", "retain_mrr >= 0.6"]
    with pytest.raises(InputError) as raised:
        Goal.read("forget_mmr", [*texts, "factual_mrr>=0.9", "factual_mrr<=0.8"])
    messages = raised.value.messages
    assert len(messages) == 6
    for words in (
        "--minimise: unknown metric 'forget_mmr'. Did you mean 'forget_mrr'?",
        "unknown metric 'retain'",
        "'a_lot' is not a number",
        "'forget_mrr=0': write one bound",
        "retain_mrr>=0.5 and retain_mrr>=0.6: leave one of them out",
        "no value keeps both factual_mrr>=0.9 and factual_mrr<=0.8",
    ):
        assert sum(words in message for message in messages) == 1
    with pytest.raises(InputError, match=r"unknown metric 'forget_mrr<=0.5'. Did you mean 'forg"):
        Goal.read("forget_mrr<=0.5", ())


def test_both_sides_of_a_score_may_be_bounded() -> None:
    texts = ["forget_mrr>=0.1", "forget_mrr<=0.2", "retain_mrr>=0.9"]
    assert Goal.read(" forget_mrr ", texts).text == ("forget_mrr", tuple(texts))


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


def test_a_score_that_is_not_there_keeps_no_bound_and_without_bounds_all_is_feasible() -> None:
    assert math.isnan(DEFAULT.value({}))
    assert DEFAULT.violations({}) == {"retain_rouge1>=0.8": math.inf}
    free = Goal.read("deviation_score", [])
    assert free.is_kept({})
    assert str(free) == "lowest deviation score"


def test_a_trial_may_be_stopped_only_where_all_that_counts_is_known_then() -> None:
    """Factual answers are not asked after a stop, likelihoods not computed."""
    assert Goal.read("deviation_score", ["retain_rouge1>=0.7"]).stoppable_floor == 0.7
    assert Goal.read("forget_mrr", ["retain_rouge1>=0.7"]).stoppable_floor is None
    assert Goal.read("forget_rouge1", ["factual_rouge1>=0.7"]).floor is None
    mixed = Goal.read("forget_rouge1", ["retain_rouge1>=0.7", "factual_rouge1>=0.7"])
    assert (mixed.floor, mixed.stoppable_floor) == (0.7, None)
