"""Names and ranges of scores, and every way to demand something of them wrongly."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.metrics.evaluate import deviation_score
from lunar_tune.metrics.goal import (
    Constraint,
    Goal,
    parse_constraint,
)
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

# The registry


def test_every_likelihood_has_a_name_in_every_set() -> None:
    computed = set(likelihood_means([]))
    for name in ("forget", "retain", "factual"):
        mine = {
            metric.quantity
            for metric in METRICS.values()
            if LIKELIHOODS in metric.needs and metric.sets == (name,)
        }
        assert mine == computed
    assert all(metric.name == name for name, metric in METRICS.items())


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("forget_rouge1", "minimize"),
        ("retain_rouge1", "maximize"),
        ("factual_rougeL", "maximize"),
        ("forget_mrr", "minimize"),
        ("retain_hit_ratio", "maximize"),
        ("forget_log_prob", "minimize"),
        ("forget_perplexity", "maximize"),
        ("retain_perplexity", "minimize"),
        ("forget_extraction_strength", "minimize"),
        ("deviation_score", "minimize"),
        ("refusal_quality", "maximize"),
    ],
)
def test_forgetting_and_keeping_want_the_opposite(name: str, direction: str) -> None:
    assert METRICS[name].direction == direction


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


def test_unknown_metrics_are_all_named_with_what_is_close_and_what_there_is() -> None:
    with pytest.raises(InputError) as raised:
        check_metrics(("forget_mmr", "retain_mrr", "bleu"))
    message = str(raised.value)
    assert "--metrics: unknown metric 'forget_mmr'. Did you mean 'forget_mrr'?" in message
    assert "--metrics: unknown metric 'bleu'." in message
    assert "There are: forget_rouge1, forget_rougeL, forget_mrr" in message


def test_names_are_read_without_torch() -> None:
    code = (
        "import sys, lunar_tune.metrics.goal, lunar_tune.metrics.names\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Bounds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("retain_rouge1>=0.8", Constraint("retain_rouge1", ">=", 0.8)),
        ("  retain_rouge1  >=  .8 ", Constraint("retain_rouge1", ">=", 0.8)),
        ("forget_mrr <=1e-1", Constraint("forget_mrr", "<=", 0.1)),
        ("forget_log_prob<=-20", Constraint("forget_log_prob", "<=", -20.0)),
        ("FACTUAL_rougel≥1", Constraint("factual_rougeL", ">=", 1.0)),
        ("retain_perplexity≤1000000", Constraint("retain_perplexity", "<=", 1e6)),
        ("deviation_score<=141", Constraint("deviation_score", "<=", 141.0)),
        ("refusal_quality>=-1", Constraint("refusal_quality", ">=", -1.0)),
    ],
)
def test_a_bound_is_read_with_and_without_spaces(text: str, expected: Constraint) -> None:
    assert parse_constraint(text) == expected
    assert parse_constraint(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "METRIC>=VALUE or METRIC<=VALUE"),
        # What is left where the shell took `>=0.8` as the name of a file.
        ("retain_rouge1", "in quotation marks, because a shell takes > and <"),
        *(
            (text, "write one bound, METRIC>=VALUE or METRIC<=VALUE, such as retain_rouge1>=0.8")
            for text in (
                *(f"retain_rouge1{sign}0.8" for sign in ("=", "==", "!=", ">", "<", "=>", "=<")),
                *("retain_rouge1>=", ">=0.8", "retain_rouge1>=0.5<=0.8", "retain_rouge1>=>=1"),
                *("0.8<=retain_rouge1", "0.8>=forget_mrr", "retain_rouge1 forget_mrr>=0.8"),
            )
        ),
        ("retain_rouge>=0.8", "unknown metric 'retain_rouge'. Did you mean 'retain_rougeL'?"),
        ("retain_rouge1>=much", "'much' is not a number. Write for example retain_rouge1>=0.8."),
        ("retain_rouge1>=80%", "'80%' is not a number"),
        ("retain_rouge1>=0,8", "'0,8' is not a number"),
        ("retain_rouge1>=80", "retain_rouge1 is a finite number from 0 to 1."),
        ("forget_mrr<=-0.1", "forget_mrr is a finite number from 0 to 1."),
        ("forget_log_prob<=20", "forget_log_prob is a finite number from -inf to 0."),
        ("retain_perplexity<=0.5", "retain_perplexity is a finite number from 1 to inf."),
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


def test_all_that_is_wrong_with_bounds_is_said_at_once() -> None:
    texts = ["retain>=a_lot", "forget_mrr=0", "retain_mrr>=0.5", "retain_mrr >= 0.6"]
    with pytest.raises(InputError) as raised:
        Goal.read("forget_mmr", [*texts, "factual_mrr>=0.9", "factual_mrr<=0.8"])
    messages = raised.value.messages
    assert len(messages) == 6
    for words in (
        "--minimise: unknown metric 'forget_mmr'",
        "unknown metric 'retain'",
        "'a_lot' is not a number",
        "'forget_mrr=0': write one bound",
        "retain_mrr>=0.5 and retain_mrr>=0.6: leave one of them out",
        "no value keeps both factual_mrr>=0.9 and factual_mrr<=0.8",
    ):
        assert sum(words in message for message in messages) == 1


def test_both_sides_of_a_score_may_be_bounded() -> None:
    texts = ["forget_mrr>=0.1", "forget_mrr<=0.2", "retain_mrr>=0.9"]
    assert Goal.read("forget_mrr", texts).text == ("forget_mrr", tuple(texts))


@pytest.mark.parametrize(
    ("bound", "scores", "violation"),
    [
        ("retain_rouge1>=0.75", {"retain_rouge1": 0.5}, 0.25),
        ("retain_rouge1>=0.75", {"retain_rouge1": 0.75}, 0.0),
        ("retain_rouge1>=0.75", {"retain_rouge1": 1.0}, -0.25),
        ("forget_mrr<=0.25", {"forget_mrr": 0.5, "retain_mrr": 0.0}, 0.25),
        ("forget_mrr<=0.25", {"forget_mrr": 0.25}, 0.0),
        ("forget_log_prob<=-20", {"forget_log_prob": -30.0}, -10.0),
        ("forget_mrr<=0.25", {"retain_mrr": 0.0}, math.inf),
        ("forget_mrr<=0.25", {}, math.inf),
        ("forget_mrr<=0.25", {"forget_mrr": math.nan}, math.inf),
        ("retain_mrr>=0.25", {"retain_mrr": math.nan}, math.inf),
    ],
)
def test_a_violation_is_0_or_less_where_the_bound_is_kept(
    bound: str, scores: dict[str, float], violation: float
) -> None:
    assert parse_constraint(bound).violation(scores) == violation


# Aims


def test_an_aim_takes_the_better_direction() -> None:
    assert Goal.read(" forget_mrr ", ()).objective == METRICS["forget_mrr"]
    assert Goal.read("retain_mrr", ()).objective == METRICS["retain_mrr"]
    assert Goal.read("forget_perplexity", ()).objective.direction == "maximize"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("forget_mr", "--minimise: unknown metric 'forget_mr'. Did you mean 'forget_mrr'?"),
        (
            "forget_mrr<=0.5",
            "--minimise: unknown metric 'forget_mrr<=0.5'. Did you mean 'forget_mrr'?",
        ),
    ],
)
def test_an_aim_that_means_nothing_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError) as raised:
        Goal.read(text, ())
    assert words in str(raised.value)


# In a run's options


def test_a_run_takes_metrics_by_name() -> None:
    assert assemble(RunOptions(metrics=("FORGET_mrr", "forget_mrr"))).metrics == ("forget_mrr",)
    assert assemble(RunOptions()).metrics == ()


def test_metrics_that_cannot_be_had_are_refused_before_anything_is_loaded() -> None:
    options = RunOptions(metrics=("factual_mrr",), factual_data="none", evaluation_rows=0)
    with pytest.raises(InputError) as raised:
        assemble(options)
    assert "--metrics factual_mrr: there are no questions with" in str(raised.value)
    assert "--evaluation-rows 0" in str(raised.value)
    with pytest.raises(InputError, match="--metrics: unknown metric 'forget'"):
        assemble(RunOptions(metrics=("forget",)))
