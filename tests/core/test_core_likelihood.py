"""Ranks and probabilities of true answers, against one row at a time and real generation."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import DivergenceError
from lunar_tune.methods.contract import Edit
from lunar_tune.metrics import likelihood
from lunar_tune.metrics.likelihood import (
    AnswerLikelihood,
    LikelihoodScorer,
    likelihood_means,
)
from lunar_tune.models.chat import encode_prompts
from lunar_tune.models.device import BatchSize, DeviceMemory
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training.answer_loss import Pair
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

Load = Callable[..., LoadedModel]
END = 2
N_WORDS = 320
PROMPTS = ((1, 17, 40, 11), (1, 9, 8), (1, 60, 61, 62, 63, 64, 99), (5, 6), (1, 70, 71, 72))


def scorer(loaded: LoadedModel) -> LikelihoodScorer:
    return LikelihoodScorer(loaded, DeviceMemory(loaded.device))


def logits_after(loaded: LoadedModel, ids: Sequence[int]) -> np.ndarray:
    """Return a row's logits at every place in float64, from a plain forward of that row alone."""
    with torch.no_grad():
        return loaded.model(input_ids=torch.tensor([list(ids)])).logits[0].double().numpy()


def one_alone(loaded: LoadedModel, pair: Pair) -> AnswerLikelihood:
    """Judge an answer with numpy, place by place."""
    logits = logits_after(loaded, (*pair.prompt, *pair.answer))[len(pair.prompt) - 1 : -1]
    log_probs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))[:, None]
    log_probs -= logits.max(1, keepdims=True)
    places = list(enumerate(pair.answer))
    return AnswerLikelihood(
        ranks=tuple(int((logits[i] > logits[i][t]).sum()) + 1 for i, t in places[:-1]),
        chosen=tuple(int(logits[i].argmax()) == t for i, t in places[:-1]),
        log_probs=tuple(float(log_probs[i][t]) for i, t in places),
    )


def greedy(loaded: LoadedModel, ids: Sequence[int], count: int) -> list[int]:
    """Return the next tokens, each from a forward of its own; no token ends them."""
    row = list(ids)
    for _ in range(count):
        row.append(int(logits_after(loaded, row)[-1].argmax()))
    return row[len(ids) :]


def pairs_of(loaded: LoadedModel) -> list[Pair]:
    """Return answers of several lengths, some of which the model gives itself, in part."""
    pairs = []
    for n, prompt in enumerate(PROMPTS):
        said = greedy(loaded, prompt, 4 + n)
        changed = [*said]
        changed[n // 2 + 1] = 300 - n
        pairs += [Pair(prompt, (*said, END)), Pair(prompt, (*changed, END))]
        pairs.append(Pair(prompt, (*range(30 + n, 33 + 2 * n), END)))
    return pairs


def assert_same(found: Sequence[AnswerLikelihood], expected: Sequence[AnswerLikelihood]) -> None:
    assert [one.ranks for one in found] == [one.ranks for one in expected]
    assert [one.chosen for one in found] == [one.chosen for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=2e-4)


# One answer


@pytest.mark.parametrize("family", ["qwen2", "gemma", "mistral"])
def test_every_number_is_that_of_the_row_alone(loaded: Load, family: str) -> None:
    model = loaded(family)
    pairs = pairs_of(model)
    assert_same(scorer(model).score(pairs), [one_alone(model, pair) for pair in pairs])


def test_scores_of_an_answer_by_hand() -> None:
    """Ranks 1, 4, 101, 100: 1/1 + 1/4 + 1/101 + 1/100 over 4; three of four are hits.

    The last place that greedy decoding misses is the third: the fourth alone comes out, 1/4.
    """
    one = AnswerLikelihood(
        ranks=(1, 4, 101, 100),
        chosen=(True, False, False, True),
        log_probs=(-0.5, -1.0, -5.0, -3.0, -0.5),
    )
    assert one.mrr == pytest.approx((1 + 0.25 + 1 / 101 + 0.01) / 4)
    assert one.hit_ratio == 0.75
    assert one.log_prob == -10.0
    assert one.answer_log_prob == -2.0
    assert one.extraction_strength == 0.25


@pytest.mark.parametrize(
    ("chosen", "strength"),
    [
        ((True, True), 1.0),
        ((False, True), 0.5),
        ((True, False), 0.0),
        ((False, False, True, True, True), 0.6),
    ],
)
def test_extraction_begins_behind_the_last_token_that_does_not_come_out(
    chosen: tuple[bool, ...], strength: float
) -> None:
    one = AnswerLikelihood(ranks=(1,) * len(chosen), chosen=chosen, log_probs=())
    assert one.extraction_strength == pytest.approx(strength)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_extraction_strength_is_that_of_a_generation_for_every_beginning(
    loaded: Load, family: str
) -> None:
    model = loaded(family)
    pairs = pairs_of(model)
    found = [one.extraction_strength for one in scorer(model).score(pairs)]
    for pair, strength in zip(pairs, found, strict=True):
        truth = list(pair.answer[:-1])
        given = next(
            k
            for k in range(len(truth) + 1)
            if greedy(model, [*pair.prompt, *truth[:k]], len(truth) - k) == truth[k:]
        )
        assert strength == pytest.approx(1 - given / len(truth))
    assert {0.0, 1.0} < set(found), "answers that come out in whole, in part and not at all"


def test_the_end_counts_for_probability_and_for_nothing_else(loaded: Load) -> None:
    model = loaded("qwen2")
    prompt = PROMPTS[0]
    ended, other = scorer(model).score([Pair(prompt, (30, 31, END)), Pair(prompt, (30, 31, 77))])
    assert (ended.ranks, ended.chosen) == (other.ranks, other.chosen)
    assert len(ended.ranks) == 2
    assert ended.log_probs[:2] == pytest.approx(other.log_probs[:2])
    assert ended.log_probs[2] != pytest.approx(other.log_probs[2])


def with_head(loaded: LoadedModel, value: float) -> LoadedModel:
    """Return a copy of a model whose head is a constant."""
    model: Any = copy.deepcopy(loaded.model)
    torch.nn.init.constant_(model.get_output_embeddings().weight, value)
    return dataclasses.replace(loaded, model=model)


def test_tokens_of_one_logit_share_the_best_rank(loaded: Load) -> None:
    """A head of zeros finds all 320 tokens equally likely: each has rank 1, the first is chosen."""
    (one,) = scorer(with_head(loaded("qwen2"), 0.0)).score([Pair(PROMPTS[0], (30, 0, 31, END))])
    assert one.ranks == (1, 1, 1)
    assert one.chosen == (False, True, False)
    assert one.log_prob == pytest.approx(-4 * math.log(N_WORDS))
    assert likelihood_means([one])["perplexity"] == pytest.approx(N_WORDS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_has_diverged_is_not_judged(loaded: Load, value: float) -> None:
    with pytest.raises(DivergenceError, match="NaN or infinite"):
        scorer(with_head(loaded("qwen2"), value)).score([Pair(PROMPTS[0], (30, END))])


# A set


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


def test_a_perplexity_beyond_all_floats_is_the_largest() -> None:
    assert likelihood_means([answer(-1000.0, -1000.0)])["perplexity"] == sys.float_info.max


def test_a_set_without_answers_has_no_scores() -> None:
    assert all(math.isnan(value) for value in likelihood_means([]).values())


# Batches and memory


def budget(one: LikelihoodScorer, tokens: int) -> LikelihoodScorer:
    one.__dict__["_batch_size"] = BatchSize(tokens, "the answers' tokens")
    return one


@pytest.mark.parametrize("tokens", [1, 25, 10_000])
def test_an_answer_is_judged_alike_in_every_company(loaded: Load, tokens: int) -> None:
    model = loaded("qwen2")
    pairs = pairs_of(model)
    alone = [scorer(model).score([pair])[0] for pair in pairs]
    assert_same(budget(scorer(model), tokens).score(pairs), alone)
    assert_same(budget(scorer(model), tokens).score(pairs[::-1]), alone[::-1])
    assert scorer(model).score([]) == ()


def test_the_head_sees_a_bounded_number_of_tokens(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("qwen2")
    pairs = pairs_of(model)
    expected = scorer(model).score(pairs)
    seen: list[int] = []

    def note(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(len(inputs[0]))

    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 7 * N_WORDS)
    handle = model.model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        assert_same(scorer(model).score(pairs), expected)
    finally:
        handle.remove()
    assert max(seen) == 7
    assert sum(seen) == sum(len(pair.answer) for pair in pairs), "answers' places and no others"


def test_a_batch_is_halved_until_it_fits_and_stays_so(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("qwen2")
    pairs = pairs_of(model)
    expected = scorer(model).score(pairs)
    plain, tried = likelihood.answer_states, []

    def tight(model: Any, decoder: Any, batch: Sequence[Pair]) -> Any:
        tokens = max(map(len, batch)) * len(batch)
        tried.append(tokens)
        if tokens > 60:
            raise torch.OutOfMemoryError("no more")
        return plain(model, decoder, batch)

    monkeypatch.setattr(likelihood, "answer_states", tight)
    one = budget(scorer(model), 200)
    assert_same(one.score(pairs), expected)
    assert max(tried) > 60
    tried.clear()
    assert_same(one.score(pairs), expected)
    assert max(tried) <= 60


# In a worker


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [
        {"edge": edge, "question": f"What of {edge}, {n}?", "answer": f"Kettles {n}."}
        for edge, count in {"A_B": 2, "B_C": 2, "C_D": 3}.items()
        for n in range(count)
    ]
    file = tmp_path_factory.mktemp("data") / "pairs.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def spec(checkpoint: Callable[..., Path], data: str) -> Callable[..., TrialSpec]:
    def make(**options: Any) -> TrialSpec:
        engine = options.pop("engine", {})
        made = assemble(
            RunOptions(
                model=str(checkpoint("qwen2")),
                data=data,
                device="cpu",
                factual_data="none",
                max_new_tokens=3,
                cache_limit=0,
                **options,
            )
        )
        engine = {"early_exit": True, **engine}
        return dataclasses.replace(made, engine=dataclasses.replace(made.engine, **engine))

    return make


SETTING = {"layer": 1, "coefficient": 20.0, "learning_rate": 0.01}


def records_alone(loaded: LoadedModel, spec: TrialSpec, records: Sequence[Any]) -> dict[str, float]:
    """Return the means of some records, each prompt and answer encoded and judged alone."""
    questions = [record.question for record in records]
    prompts = encode_prompts(loaded.tokenizer, questions, spec.chat, family=loaded.family)
    pairs = [
        Pair(prompt, (*loaded.tokenizer.encode(record.answer, add_special_tokens=False), END))
        for prompt, record in zip(prompts, records, strict=True)
    ]
    return likelihood_means([one_alone(loaded, pair) for pair in pairs])


def test_a_trial_reports_the_scores_of_the_unlearned_model_that_were_asked_for(
    spec: Callable[..., TrialSpec],
) -> None:
    made = spec(metrics=("forget_log_prob", "retain_mrr", "retain_perplexity"))
    worker = Worker(made)
    inside: dict[str, float] = {}

    def judge(loaded: LoadedModel, _: Edit) -> None:
        inside["forget_log_prob"] = records_alone(loaded, made, made.data.forget)["log_prob"]
        retain = records_alone(loaded, made, made.data.retain)
        inside["retain_mrr"], inside["retain_perplexity"] = retain["mrr"], retain["perplexity"]

    plain = Worker(spec()).run(SETTING).evaluation.scores
    before = worker.baseline().evaluation.scores
    scores = worker.run(SETTING, inside=judge).evaluation.scores
    assert set(scores) - set(plain) == set(inside)
    assert {name: scores[name] for name in plain} == plain
    assert {name: scores[name] for name in inside} == pytest.approx(inside, rel=1e-4)
    assert before["forget_log_prob"] == pytest.approx(
        records_alone(worker.loaded, made, made.data.forget)["log_prob"], rel=1e-4
    )
    assert abs(before["forget_log_prob"] - scores["forget_log_prob"]) > 0.1


def test_a_full_evaluation_judges_all_retain_rows_and_a_trial_its_sample(
    spec: Callable[..., TrialSpec],
) -> None:
    made = spec(metrics=("retain_log_prob",), retain_rows=2)
    worker = Worker(made)
    for full, records in ((False, made.data.retain_sample), (True, made.data.retain)):
        score = worker.baseline(full=full).evaluation.scores["retain_log_prob"]
        alone = records_alone(worker.loaded, made, records)["log_prob"]
        assert score == pytest.approx(alone, rel=1e-4)
    assert len(made.data.retain_sample) == 2 < len(made.data.retain)


def test_a_trial_that_was_stopped_early_has_no_further_scores(
    spec: Callable[..., TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model says nothing of the truth: the floor is missed after one chunk."""
    monkeypatch.setattr("lunar_tune.metrics.evaluate.LEAST_CHUNK", 1)
    worker = Worker(spec(metrics=("forget_mrr",), engine={"retain_floor": 0.9}))
    stopped = worker.run(SETTING).evaluation
    assert not stopped.complete
    assert "forget_mrr" not in stopped.scores
    whole = worker.run(SETTING, bounded=False).evaluation
    assert whole.complete
    assert "forget_mrr" in whole.scores


def test_true_answers_are_encoded_once_in_a_workers_life(
    spec: Callable[..., TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(spec(metrics=("forget_mrr", "forget_hit_ratio", "retain_mrr")))
    encoded: list[int] = []
    plain = worker.encoder.answers

    def count(answers: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        encoded.append(len(answers))
        return plain(answers)

    monkeypatch.setattr(worker.encoder, "answers", count)
    for _ in range(2):
        worker.run(SETTING)
    data = worker.spec.data
    refusals = len(data.refusals)
    assert sum(encoded) == len(data.forget) + len(data.retain) + refusals
