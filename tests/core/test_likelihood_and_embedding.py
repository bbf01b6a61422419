"""Likelihoods of true answers, against single rows and generation; embeddings by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from scores_by_hand import likelihood_alone, logits_after, states_behind, unit
from torch import Tensor
from transformers import BertModel, BertTokenizer

from lunar_tune.errors import DivergenceError, ModelError
from lunar_tune.metrics import embedding, likelihood
from lunar_tune.metrics.likelihood import (
    QUANTITIES,
    AnswerLikelihood,
    LikelihoodScorer,
    likelihood_means,
)
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.device import BatchSize, DeviceMemory
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training.answer_loss import Encoder, Pair

Load = Callable[..., LoadedModel]
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
def model(loaded: Load) -> LoadedModel:
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
        entropies=(9.0, 1.0, 2.0, 3.0, 0.5),
    )
    assert one.typicality == (0 - 3 + 0 + 0) / 4
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
    assert one.typicality == pytest.approx(0.0, abs=1e-5)
    assert likelihood_means([one])["perplexity"] == pytest.approx(N_WORDS)
    for value in (math.nan, math.inf):
        with pytest.raises(DivergenceError, match="NaN or infinite"):
            scorer(with_head(model, value)).score([Pair(PROMPTS[0], (30, END))])


def answer(*log_probs: float, chosen: bool = True) -> AnswerLikelihood:
    own = len(log_probs) - 1
    return AnswerLikelihood(
        ranks=(1 if chosen else 200,) * own,
        chosen=(chosen,) * own,
        log_probs=log_probs,
        entropies=(0.0,) * (own + 1),
    )


def test_means_give_each_answer_the_same_weight_and_perplexity_each_token() -> None:
    """Log π −1, −1 (sum −2, mean −1) and −4 four times (sum −16, mean −4).

    The standard error of two numbers is half of what either lies from their mean, over √2.

    Perplexity is that of 18 nats over 6 tokens; ranks are 1 (a hit) and 200 (none).
    """
    means = likelihood_means([answer(-1.0, -1.0), answer(-4.0, -4.0, -4.0, -4.0, chosen=False)])
    errors = {name: means.pop(f"{name}_se") for name in QUANTITIES}
    halves = (199 / 400, 0.5, 7.0, 1.5, 0.5)
    assert list(errors.values()) == pytest.approx([half / math.sqrt(2) for half in halves])
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


TEXTS = ["Copper kettles.", "a", "The contract was signed on 12 March 2021.", "Where? É日本!"]
CENTRE = ["I do not know.", "Mill Street"]


@pytest.mark.parametrize("family", list(LAYOUTS))
def test_own_states_are_centred_means_of_the_middle_over_the_text_alone(
    loaded: Load, family: str, unchanged: Callable[[Any], None]
) -> None:
    """Of three blocks the middle is what the first gives, the input of the second."""
    model = loaded(family)
    unchanged(model.model)
    embedder = embedding.StateEmbedder(Encoder(model, ChatFormat()), centre=CENTRE)
    states = states_behind(model.model, model.tokenizer, [*TEXTS, *CENTRE])
    expected = unit(states[:4] - states[4:].mean(0))
    embedded = embedder.embed(TEXTS)
    assert embedded.dtype == torch.float64
    np.testing.assert_allclose(embedded.numpy(), expected, atol=1e-5)
    assert embedder.name == "own states after block 0"


def test_a_text_of_nothing_is_like_no_other_and_no_part_of_the_origin(loaded: Load) -> None:
    one, other = (
        embedding.StateEmbedder(Encoder(loaded("qwen2"), ChatFormat()), centre=centre)
        for centre in (CENTRE, [*CENTRE, " "])
    )
    assert torch.equal(one.embed(TEXTS), other.embed(TEXTS))
    assert other.embed(["", "Copper", " \n"]).any(1).tolist() == [False, True, False]
    torch.testing.assert_close(
        one.embed([f"  {TEXTS[0]}\n"]), one.embed(TEXTS)[:1], rtol=0, atol=1e-6
    )
    assert one.embed([]).shape == (0, 32)


def test_a_sentence_model_is_pooled(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text by text without padding, in numpy, against batches of three that are padded."""
    monkeypatch.setattr(embedding, "TEXTS_PER_BATCH", 3)
    model = BertModel.from_pretrained(encoder).eval()
    own = BertTokenizer.from_pretrained(encoder)
    means, cut = [], 0
    for text in TEXTS:
        ids = own(text)["input_ids"]
        if len(ids) > 24:  # what is cut off lies before the mark that ends a text
            ids, cut = [*ids[:23], ids[-1]], cut + 1
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids])).last_hidden_state
        means.append(states[0].numpy().mean(0))
    assert cut == 1, "one text is longer than the model reads"
    embedder = embedding.load_sentence_embedder(str(encoder), device="cpu")
    spelled = own.convert_tokens_to_ids(
        ["[CLS]", "a", "[UNK]", "s", "##e", "##p", "[UNK]", "[SEP]"]
    )
    with torch.no_grad():
        states = model(input_ids=torch.tensor([spelled])).last_hidden_state[0].numpy().mean(0)
    np.testing.assert_allclose(embedder.embed(["a [SEP]"]).numpy(), unit([states]), atol=1e-5)
    np.testing.assert_allclose(embedder.embed(TEXTS).numpy(), unit(means), atol=1e-5)
    assert not embedder.embed([" "]).any()
    assert (embedder.name, embedder.width) == (str(encoder), 16)


def test_what_cannot_be_loaded_is_refused_with_what_to_do(encoder: Path, tmp_path: Path) -> None:
    """Weights that are missing would be random numbers; the pooler alone has no part in it."""

    def without(tensors: str) -> Path:
        folder = shutil.copytree(encoder, tmp_path / tensors)
        kept = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in kept.items() if not name.startswith(tensors)}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    pickled, padless = (shutil.copytree(encoder, tmp_path / name) for name in ("one", "other"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    BertTokenizer.from_pretrained(encoder, pad_token=None).save_pretrained(padless)
    for source, message in (
        ("./nosuch", r"--embedding-model ./nosuch: no such folder"),
        ("nosuch/it", r"--embedding-model nosuch/it: .*own states are used"),
        (pickled, "safetensors"),
        (padless, "is not an encoder with a padding token"),
        (without("encoder.layer.1.output.dense.weight"), "lack 1 tensors"),
    ):
        with pytest.raises(ModelError, match=message):
            embedding.load_sentence_embedder(str(source), device="cpu")
    whole, poolerless = (
        embedding.load_sentence_embedder(str(folder), device="cpu").embed(TEXTS)
        for folder in (encoder, without("pooler."))
    )
    assert torch.equal(poolerless, whole)


VECTORS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (3.0, 4.0), "d": (-2.0, 0.0)}


class ByHand(embedding.Embedder):
    """Two numbers a text, so that every cosine is plain: a·c = .6, b·c = .8, a·d = −1."""

    name, width = "by hand", 2

    def _pool(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        return torch.tensor([VECTORS[text] for text in texts])


def test_quality_is_the_mean_over_all_refusals_and_similarity_that_to_the_own_truth() -> None:
    """To the refusals a and c: a has 1 and .6, b has 0 and .8; d has −1 and −.6; nothing has 0.

    To their truths: a and c have .6, b and b 1, d and a −1.
    """
    assert embedding.Refusals(ByHand(), ["a", "c"]).quality(["a", "b", "d", ""]) == pytest.approx(
        0.1
    )
    assert embedding.Refusals(ByHand(), ["a", "a", "c"]).quality(["a"]) == pytest.approx(2.6 / 3)
    assert ByHand().truth_similarity(["a", "b", "d"], ["c", "b", "a"]) == pytest.approx(0.2)
    assert ByHand().truth_similarity(["a", ""], ["c", "b"]) == pytest.approx(0.3)
