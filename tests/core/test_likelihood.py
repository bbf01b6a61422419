"""Ranks and probabilities of true answers, against one row at a time and real generation."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scores_by_hand import likelihood_alone, logits_after

from lunar_tune.errors import DivergenceError
from lunar_tune.metrics import likelihood
from lunar_tune.metrics.likelihood import AnswerLikelihood, LikelihoodScorer, likelihood_means
from lunar_tune.models.device import BatchSize, DeviceMemory
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training.answer_loss import Pair

END, N_WORDS = 2, 320
PROMPTS = ((1, 17, 40, 11), (1, 9, 8), (1, 60, 61, 62, 63, 64, 99), (5, 6), (1, 70, 71, 72))


def scorer(loaded: LoadedModel, *, tokens: int | None = None) -> LikelihoodScorer:
    one = LikelihoodScorer(loaded, DeviceMemory(loaded.device))
    if tokens is not None:
        one.__dict__["_batch_size"] = BatchSize(tokens, "the answers' tokens")
    return one


def greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """Return the next tokens, each from a forward of its own; no token ends them."""
    row = list(ids)
    for _ in range(count):
        row.append(int(logits_after(model, row)[-1].argmax()))
    return row[len(ids) :]


def assert_same(found: Sequence[AnswerLikelihood], expected: Sequence[AnswerLikelihood]) -> None:
    assert [one.ranks for one in found] == [one.ranks for one in expected]
    assert [one.chosen for one in found] == [one.chosen for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=2e-4)


@pytest.fixture(scope="module")
def model(loaded: Callable[..., LoadedModel]) -> LoadedModel:
    return loaded("qwen2")


@pytest.fixture(scope="module")
def pairs(model: LoadedModel) -> list[Pair]:
    """Return answers of several lengths, some of which the model gives itself, in part."""
    answers = []
    for n, prompt in enumerate(PROMPTS):
        said = greedy(model.model, prompt, 4 + n)
        changed = [*said[: n // 2 + 1], 300 - n, *said[n // 2 + 2 :]]
        answers += [(prompt, one) for one in (said, changed, range(30 + n, 33 + 2 * n))]
    return [Pair(prompt, (*answer, END)) for prompt, answer in answers]


def test_scores_of_an_answer_by_hand() -> None:
    """Ranks 1, 4, 101, 100: 1/1 + 1/4 + 1/101 + 1/100 over 4; three of four are hits.

    The last place that greedy decoding misses is the third: the fourth alone comes out, 1/4.
    """
    one = AnswerLikelihood(
        ranks=(1, 4, 101, 100),
        chosen=(True, False, False, True),
        log_probs=(-0.5, -1.0, -5.0, -3.0, -0.5),
    )
    assert one.scores["mrr"] == pytest.approx((1 + 0.25 + 1 / 101 + 0.01) / 4)
    assert one.scores["hit_ratio"] == 0.75
    assert (one.scores["log_prob"], one.scores["answer_log_prob"]) == (-10.0, -2.0)
    assert one.scores["extraction_strength"] == 0.25


def test_extraction_strength_is_that_of_generations(model: LoadedModel, pairs: list[Pair]) -> None:
    found = [one.scores["extraction_strength"] for one in scorer(model).score(pairs[:9])]
    for pair, strength in zip(pairs, found, strict=False):
        truth = list(pair.answer[:-1])
        given = next(
            k
            for k in range(len(truth) + 1)
            if greedy(model.model, [*pair.prompt, *truth[:k]], len(truth) - k) == truth[k:]
        )
        assert strength == pytest.approx(1 - given / len(truth))
    assert {0.0, 1.0} < set(found), "answers that come out in whole, in part and not at all"


def with_head(loaded: LoadedModel, value: float) -> LoadedModel:
    model: Any = copy.deepcopy(loaded.model)
    torch.nn.init.constant_(model.get_output_embeddings().weight, value)
    return dataclasses.replace(loaded, model=model)


def test_equal_logits_share_a_rank_and_divergence_is_not_judged(model: LoadedModel) -> None:
    """A head of zeros finds all 320 tokens equally likely: each has rank 1, the first is chosen."""
    (one,) = scorer(with_head(model, 0.0)).score([Pair(PROMPTS[0], (30, 0, 31, END))])
    assert (one.ranks, one.chosen) == ((1, 1, 1), (False, True, False))
    assert one.scores["log_prob"] == pytest.approx(-4 * math.log(N_WORDS))
    assert likelihood_means([one])["perplexity"] == pytest.approx(N_WORDS)
    for value in (math.nan, math.inf):
        with pytest.raises(DivergenceError, match="NaN or infinite"):
            scorer(with_head(model, value)).score([Pair(PROMPTS[0], (30, END))])


def answer(*log_probs: float, chosen: bool = True) -> AnswerLikelihood:
    own = len(log_probs) - 1
    return AnswerLikelihood(
        ranks=(1 if chosen else 200,) * own, chosen=(chosen,) * own, log_probs=log_probs
    )


def test_means_give_each_answer_the_same_weight_and_perplexity_each_token() -> None:
    """Log π −1, −1 (sum −2, mean −1) and −4 four times (sum −16, mean −4).

    Perplexity is that of 18 nats over 6 tokens; ranks are 1 (a hit) and 200 (none).
    """
    means = likelihood_means([answer(-1.0, -1.0), answer(-4.0, -4.0, -4.0, -4.0, chosen=False)])
    assert means == pytest.approx(
        {
            "mrr": (1 + 1 / 200) / 2,
            "hit_ratio": 0.5,
            "log_prob": -9.0,
            "answer_log_prob": -2.5,
            "perplexity": math.exp(3),
            "extraction_strength": 0.5,
        }
    )
    assert likelihood_means([answer(-1000.0, -1000.0)])["perplexity"] == sys.float_info.max
    assert all(math.isnan(value) for value in likelihood_means([]).values())


def test_numbers_are_those_of_rows_alone_and_the_head_sees_few_tokens_at_once(
    model: LoadedModel, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [likelihood_alone(model.model, pair) for pair in pairs]
    for tokens in (1, 25, 10_000):
        assert_same(scorer(model, tokens=tokens).score(pairs), alone)
        assert_same(scorer(model, tokens=tokens).score(pairs[::-1]), alone[::-1])
    assert scorer(model).score([]) == ()
    seen: list[int] = []
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 7 * N_WORDS)
    with model.model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0]))
    ):
        assert_same(scorer(model).score(pairs), alone)
    assert max(seen) == 7
    assert sum(seen) == sum(len(pair.answer) for pair in pairs), "answers' places and no others"
