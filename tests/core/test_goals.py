"""Names and ranges of scores, what may be demanded of them, and how good scores are then."""

from __future__ import annotations

import math

import pytest

from lunar_tune.config.options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.metrics.evaluate import deviation_score
from lunar_tune.metrics.goal import (
    ANSWERS,
    EMBEDDINGS,
    LIKELIHOODS,
    METRICS,
    WHOLE_ANSWERS,
    Constraint,
    Goal,
    check_metrics,
    need_of,
    parse_constraint,
)
from lunar_tune.metrics.likelihood import AnswerLikelihood, likelihood_means
from lunar_tune.metrics.means import error_name, errors_of
from lunar_tune.trial.assemble import assemble


def test_metrics_are_named_once_and_need_what_each_of_them_needs() -> None:
    for one in ("forget", "retain", "factual"):
        mine = {m.quantity for m in METRICS.values() if LIKELIHOODS in m.needs and m.sets == (one,)}
        means = likelihood_means([])
        assert mine == means.keys() - set(map(error_name, means))
    assert need_of(["forget_rouge1", "retain_mrr"]) == {ANSWERS, LIKELIHOODS}
    assert need_of(["refusal_quality"]) == {ANSWERS, WHOLE_ANSWERS, EMBEDDINGS}
    names = check_metrics(("forget_mrr", " FORGET_MRR", "retain_mrr"))
    assert names == ("forget_mrr", "retain_mrr")


def test_metrics_that_cannot_be_had_are_all_named_with_what_there_is() -> None:
    with pytest.raises(InputError) as raised:
        check_metrics(("forget_mmr", "retain_mrr", "bleu"))
    message = str(raised.value)
    assert "--metrics: unknown metric 'forget_mmr'. Did you mean 'forget_mrr'?" in message
    assert "--metrics: unknown metric 'bleu'." in message
    assert "There are: forget_rouge1, forget_rougeL, forget_mrr" in message
    with pytest.raises(InputError, match="--metrics factual_mrr: there are no questions with"):
        assemble(RunOptions(metrics=("factual_mrr",), factual_data="none"))


def test_the_best_and_the_worst_lie_in_the_range_and_better_is_lower_or_higher() -> None:
    sure = {"entropies": (0.0, 0.0)}
    known = AnswerLikelihood(ranks=(1,), chosen=(True,), log_probs=(0.0, 0.0), **sure)
    unknown = AnswerLikelihood(ranks=(10**6,), chosen=(False,), log_probs=(-1e5, -1e5), **sure)
    best, worst = likelihood_means([known]), likelihood_means([unknown])
    for quantity in errors_of(best).keys() | {"perplexity"}:
        retain, forget = METRICS[f"retain_{quantity}"], METRICS[f"forget_{quantity}"]
        assert retain.may_be(best[quantity])
        assert forget.may_be(worst[quantity])
        assert (best[quantity] < worst[quantity]) == retain.lower_is_better
        assert forget.lower_is_better != retain.lower_is_better
    deviation = METRICS["deviation_score"]
    assert deviation.low == deviation_score(0.0, 1.0)
    assert deviation.high == pytest.approx(deviation_score(1.0, 0.0))


def test_a_bound_that_means_nothing_is_refused_with_what_to_write() -> None:
    for text, words in (
        ("", "METRIC>=VALUE or METRIC<=VALUE"),
        # What is left where the shell took `>=0.8` as the name of a file.
        ("retain_rouge1", "in quotation marks, because a shell takes > and <"),
        *(
            (text, "write one constraint, METRIC>=VALUE or METRIC<=VALUE")
            for text in ("a=1", "a>1", "a=>1", "a>=", ">=1", "a>=0.5<=0.8", "0.8<=a", "a b>=0.8")
        ),
        ("retain_rouge>=0.8", "unknown metric 'retain_rouge'. Did you mean 'retain_rougeL'?"),
        ("retain_rouge1>=80%", "'80%' is not a number. Write for example retain_rouge1>=0.8."),
        ("retain_rouge1>=80", "retain_rouge1 must be a finite number from 0 to 1."),
        ("retain_perplexity<=inf", "retain_perplexity must be a finite number from 1 to inf."),
        ("forget_rouge1<=nan", "forget_rouge1 must be a finite number from 0 to 1."),
    ):
        with pytest.raises(InputError) as raised:
            parse_constraint(text)
        assert f"--constrain {text!r}: " in str(raised.value)
        assert words in str(raised.value)


def test_a_bound_is_read_with_and_without_spaces_and_violated_by_more_than_0() -> None:
    for text, expected in (
        ("  retain_rouge1  >=  .8 ", ("retain_rouge1", ">=", 0.8)),
        ("forget_log_prob<=-2e1", ("forget_log_prob", "<=", -20.0)),
        ("FACTUAL_rougel≥1", ("factual_rougeL", ">=", 1.0)),
    ):
        read = parse_constraint(text)
        assert read == Constraint(*expected) == parse_constraint(str(read))
    for bound, scores, violation in (
        ("retain_rouge1>=0.75", {"retain_rouge1": 0.5}, 0.25),
        ("retain_rouge1>=0.75", {"retain_rouge1": 1.0}, -0.25),
        ("forget_mrr<=0.25", {"forget_mrr": 0.5, "retain_mrr": 0.0}, 0.25),
        ("forget_mrr<=0.25", {"retain_mrr": 0.0}, math.inf),
        ("forget_mrr<=0.25", {"forget_mrr": math.nan}, math.inf),
    ):
        assert parse_constraint(bound).violation(scores) == violation


def test_all_that_is_wrong_with_a_goal_is_said_at_once() -> None:
    texts = ["retain>=a_lot", "forget_mrr=0", "retain_mrr>=0.5", "retain_mrr >= 0.6"]
    with pytest.raises(InputError) as raised:
        Goal.read("forget_mmr", [*texts, "factual_mrr>=0.9", "factual_mrr<=0.8"])
    messages = raised.value.messages
    assert len(messages) == 6
    with pytest.raises(InputError, match="--then: unknown metric 'retain'"):
        Goal.read("forget_rouge1", [], "retain")
    for words in (
        "--minimise: unknown metric 'forget_mmr'. Did you mean 'forget_mrr'?",
        "retain_mrr>=0.5 and retain_mrr>=0.6 constrain the same; leave one out",
        "no value keeps both factual_mrr>=0.9 and factual_mrr<=0.8",
    ):
        assert sum(words in message for message in messages) == 1


def test_a_goal_minimises_what_is_named_and_what_is_better_higher_by_its_negative() -> None:
    goal = Goal.read("forget_rouge1", ["retain_rouge1>=0.8"])
    scores = {"forget_rouge1": 0.25, "retain_rouge1": 0.75}
    assert goal.value(scores) == 0.25
    assert goal.violations(scores) == {"retain_rouge1>=0.8": pytest.approx(0.05)}
    assert not goal.is_kept(scores)
    assert goal.is_kept({"retain_rouge1": 0.8})
    told = "lowest forget ROUGE-1 subject to retain ROUGE-1 of at least 0.8"
    assert str(goal) == f"{told}, of equals the highest retain ROUGE-1"
    assert (goal.second(scores), goal.second({}), goal.error(scores)) == (-0.75, None, 0.0)
    assert Goal.read(*goal.text) == goal
    assert math.isnan(goal.value({}))
    assert goal.violations({}) == {"retain_rouge1>=0.8": math.inf}
    goal = Goal.read(" factual_rouge1 ", ["forget_mrr <= 0.2", "forget_mrr>=0.1"])
    assert goal.value({"factual_rouge1": 0.7}) == -0.7
    both = "forget MRR of at most 0.2, forget MRR of at least 0.1"
    equals = ", of equals the highest retain ROUGE-1"
    assert str(goal) == f"highest factual ROUGE-1 subject to {both}{equals}"
    assert goal.metrics == ("factual_rouge1", "forget_mrr"), "the second line is always known"
    assert Goal.read("forget_mrr", [], "retain_mrr").metrics == ("forget_mrr", "retain_mrr")
    goal = Goal.read("retain_rouge1", ["forget_rouge1<=0.1"])
    assert str(goal) == "highest retain ROUGE-1 subject to forget ROUGE-1 of at most 0.1"
    goal = Goal.read("forget_rouge1", [], "forget_degenerate")
    assert str(goal).endswith("of equals the lowest forget degenerate")
    assert goal.second({"forget_degenerate": 0.25}) == 0.25
    assert Goal.read("deviation_score", []).is_kept({})


def test_a_trial_may_be_stopped_only_where_all_that_counts_is_known_then() -> None:
    """Factual answers are not asked after a stop, likelihoods not computed."""
    for minimised, demanded, floors in (
        ("forget_rouge1", ["retain_rouge1>=0.8"], (0.8, 0.8)),
        ("deviation_score", ["retain_rouge1>=0.7"], (0.7, 0.7)),
        ("forget_mrr", ["retain_rouge1>=0.7"], (0.7, None)),
        ("forget_rouge1", ["factual_rouge1>=0.7"], (None, None)),
        ("forget_rouge1", ["retain_rouge1>=0.7", "factual_rouge1>=0.7"], (0.7, None)),
    ):
        goal = Goal.read(minimised, demanded)
        assert (goal.floor, goal.stoppable_floor) == floors
