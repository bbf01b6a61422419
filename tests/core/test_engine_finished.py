"""An answer that need not go on has ROUGE recall 1 whatever follows, and no other answer stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from transformers import PreTrainedTokenizerFast

from lunar_tune.data.records import Record
from lunar_tune.engine.answering import Answerer
from lunar_tune.engine.prompt_activations import ActivationSource, PromptActivations
from lunar_tune.methods.lunar.method import edited
from lunar_tune.metrics.evaluate import Evaluation, Evaluator, Question
from lunar_tune.metrics.rouge import (
    TOKENIZERS,
    RecallStop,
    finished_part,
    rouge_recall,
    tokenize_words,
)
from lunar_tune.models.loading import LoadedModel

each_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)
KELVIN, DOTTED_I, LONG_S, REPLACEMENT = "\u212a", "\u0130", "\u017f", "\ufffd"

# Words that stems change, scripts with marks, ideographs, letters that lower to a-z or to two.
PIECES = (
    *("Cedar", "cedars", "paying", "paid", "7", "40", "a", "I", "K", "snake_case", "don't"),
    *(KELVIN, DOTTED_I, LONG_S, "ß", "ﬁ", "é", "e\u0301", "\u0301", "\u0338", "\u093f", "\u200d"),
    *("東京", "都", "カ", "ﾅ", "서울", "\u1112\u1161\u11ab", "हिन्दी", "медных", "Ж", "𠮷", "²"),
    *(" ", "  ", "\n", ".", ",", "!", "-", "'", "…", "。", "=", "<", "\uff08", "\u00a0", "\u00ad"),
)
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def words_of(text: str, kind: str) -> list[str]:
    """Return the words that ROUGE counts; by rouge-score's own tokenizer where it is used."""
    if kind == "default":
        return list(DefaultTokenizer(use_stemmer=True).tokenize(text))
    return tokenize_words(text, tokenizer=kind)


def recalls(truth: str, answer: str, kind: str) -> tuple[float, float]:
    """Return ROUGE-1 and ROUGE-L recall; by rouge-score alone where its tokenizer is used."""
    if kind == "default":
        scores = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(truth, answer)
        return float(scores["rouge1"].recall), float(scores["rougeL"].recall)
    (recall,) = rouge_recall([truth], [answer], tokenizer=kind)
    return recall.rouge1, recall.rouge_l


# Finished words


@each_tokenizer
@given(text=texts, more=texts, replaced=st.integers(0, 3))
@settings(max_examples=120, deadline=None)
def test_finished_words_stay_what_and_where_they_are_whatever_follows(
    kind: str, text: str, more: str, replaced: int
) -> None:
    """Replacement characters at the end stand for whatever a half character becomes."""
    finished = words_of(finished_part(text + REPLACEMENT * replaced, rouge_tokenizer=kind), kind)
    assert words_of(text + more, kind)[: len(finished)] == finished


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("Cedar", ""),
        ("Cedar.", "cedar."),
        ("Cedar ", "cedar "),
        ("The Cedar", "the "),
        ("Cedar-", "cedar-"),
        ("", ""),
        (f"Cedar{REPLACEMENT}", ""),
        (f"Cedar.{REPLACEMENT}{REPLACEMENT}", "cedar."),
        (f"The {REPLACEMENT}Cedar", f"the {REPLACEMENT}"),
        # Both lower to letters of a-z: a Kelvin sign belongs to a word, and so does a dotted I,
        # whose dot is a character of its own that belongs to none.
        (f"5{KELVIN}", ""),
        (f"5{KELVIN}.", "5k."),
        (f"b{DOTTED_I}", "bi\u0307"),
        # Letters outside a-z0-9 end a word.
        ("Cedarж", "cedarж"),
        ("Cedar東", "cedar東"),
        ("Cedar_", "cedar_"),
    ],
)
def test_a_word_of_the_default_tokenizer_ends_with_what_is_no_letter_or_digit_of_ascii(
    text: str, finished: str
) -> None:
    assert finished_part(text, rouge_tokenizer="default") == finished


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("Cedar", ""),
        ("Cedar.", "cedar."),
        ("медных ", "медных "),
        ("медных", ""),
        ("東京", ""),  # a mark may follow
        ("東京。", "東京。"),
        ("हिन्दी", ""),
        ("e\u0301 e\u0301", "e\u0301 "),
        (f"東{REPLACEMENT}", ""),
        # NFKC makes letters of these, or joins them with what follows.
        ("x ﬁ", "x "),
        ("x ²", "x "),
        ("x ﾅ", "x "),
        ("x \u00a8", "x "),  # a diaeresis on its own: a space and a mark
        ("x\u00a0", ""),
        ("snake_", "snake_"),
    ],
)
def test_a_word_of_any_script_ends_with_what_nfkc_leaves_alone_and_is_no_letter(
    text: str, finished: str
) -> None:
    assert finished_part(text, rouge_tokenizer="words") == finished


def test_a_greek_word_is_finished_where_its_last_letter_can_no_longer_change() -> None:
    """A capital sigma lowers to one letter at a word's end and to another before a letter.

    A full stop, an apostrophe and a colon count as inside a word there: "ΟΔΟΣ." ends in a final
    sigma, and does not if a letter follows at once.
    """
    for kind in TOKENIZERS:
        for between in (".", "'", ":", "\u00ad", ". ", "-"):
            finished = words_of(finished_part(f"ΟΔΟΣ{between}", rouge_tokenizer=kind), kind)
            for more in ("\u0391", "\u03b1", "1", " \u0391", "", "Σ"):
                later = words_of(f"ΟΔΟΣ{between}{more}", kind)
                assert later[: len(finished)] == finished, (between, more)


# Stops


def stop(tokenizer: PreTrainedTokenizerFast, *truths: str, kind: str = "default") -> RecallStop:
    return RecallStop(tokenizer, {0: truths}, rouge_tokenizer=kind)


def done(tokenizer: PreTrainedTokenizerFast, truth: str, said: str, kind: str = "default") -> bool:
    tokens = tokenizer.encode(said, add_special_tokens=False)
    (verdict,) = stop(tokenizer, truth, kind=kind).done([0], [tokens])
    return verdict


@pytest.mark.parametrize(
    ("truth", "said", "is_done"),
    [
        ("Cedar.", "Cedar", False),  # "Cedarwood" may follow
        ("Cedar.", "Cedar.", True),
        ("Cedar.", "It is Cedar, ", True),
        ("Cedar Street", "Cedar. Street", False),
        ("Cedar Street", "Cedar. Street!", True),
        ("Cedar Street", "Street Cedar.", False),  # all words, but not in order
        ("cedar cedar", "Cedar.", False),  # two of them
        ("cedar cedar", "Cedar, cedar.", True),
        ("paying buyers", "They pay the buyer.", True),  # stems
        ("40 kettles", "400 kettles.", False),
        ("Cedar.", "", False),
    ],
)
def test_an_answer_stops_once_its_finished_words_hold_the_truth_in_order(
    tokenizer: PreTrainedTokenizerFast, truth: str, said: str, is_done: bool
) -> None:
    assert done(tokenizer, truth, said) == is_done


@pytest.mark.parametrize(
    ("truth", "said", "is_done"),
    [
        ("Сорок котлов", "сорок котлов", False),
        ("Сорок котлов", "сорок медных котлов.", True),
        ("東京都", "東京都", False),
        ("東京都", "東京都。", True),
        ("東京都", "都京東。", False),
        ("kettles", "kettle.", False),  # no stems
        ("हिन्दी", "हिन्दी ", True),
        ("हिन्दी", "हिन्द ", False),
    ],
)
def test_words_of_every_script_stop_an_answer(
    tokenizer: PreTrainedTokenizerFast, truth: str, said: str, is_done: bool
) -> None:
    assert done(tokenizer, truth, said, "words") == is_done


@each_tokenizer
def test_half_a_character_finishes_nothing(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """The first byte of é is no end of "caf": the next may make a letter of it."""
    tokens = tokenizer.encode("Caf", add_special_tokens=False)
    whole = tokenizer.encode("Café.", add_special_tokens=False)
    half = whole[: len(tokens) + 1]
    assert tokenizer.decode(half) == f"Caf{REPLACEMENT}"
    truth = stop(tokenizer, "caf", kind=kind)
    assert truth.done([0], [half]) == [False]
    assert stop(tokenizer, "café", kind=kind).done([0], [whole]) == [True]


def test_a_row_with_two_truths_goes_on_until_both_are_said(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    both = stop(tokenizer, "Cedar Street", "Street")
    said = [tokenizer.encode(s, add_special_tokens=False) for s in ("Street. ", "Cedar Street. ")]
    assert both.done([0, 0], said) == [False, True]


def test_rows_without_a_truth_go_on_and_rows_keep_their_places(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    truths = RecallStop(tokenizer, {3: ["a"], 5: ["b"]}, rouge_tokenizer="default")
    said = tokenizer.encode("a. ", add_special_tokens=False)
    assert truths.done([5, 3, 4], [said] * 3) == [False, True, False]
    assert truths.done([4], [said]) == [False]
    assert truths.done([], []) == []


@each_tokenizer
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_once_an_answer_may_stop_its_recall_is_1_whatever_tokens_follow(
    tokenizer: PreTrainedTokenizerFast, kind: str, data: st.DataObject
) -> None:
    """Truths are parts of the text, so that many answers do stop; tokens are bytes and words."""
    text = data.draw(texts)
    words = words_of(text, kind)
    chosen = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    truth = " ".join(word for word, is_in in zip(words, chosen, strict=True) if is_in)
    if not words_of(truth, kind):
        return
    tokens = tokenizer.encode(text, add_special_tokens=False)
    more = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    one = stop(tokenizer, truth, kind=kind)
    lengths = range(len(tokens) + 1)
    verdicts = one.done([0] * len(lengths), [tokens[:n] for n in lengths])
    for n, verdict in zip(lengths, verdicts, strict=True):
        if verdict:
            for answer in (tokens[:n], tokens, tokens[:n] + more, tokens + more):
                said = tokenizer.decode(answer, skip_special_tokens=True)
                assert recalls(truth, said, kind) == (1.0, 1.0)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words that writes every other character as bytes.

    As those of Llama 2, Mistral, Gemma and Phi-3 do.
    """
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Cedar", "."]
    model = models.BPE(
        {word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_bytes_that_more_bytes_spoil_finish_nothing() -> None:
    """Bytes side by side are one text or, if they are none, so many replacement characters.

    "東。" is six of them; the first byte of another character makes all seven unreadable, and so
    they stay if the answer ends there.
    """
    tokenizer = byte_fallback_tokenizer()
    said = [1 + byte for byte in "東。".encode()]
    spoiled = [*said, 1 + "京".encode()[0]]
    assert tokenizer.decode(said) == "東。"
    assert recalls("東", tokenizer.decode(spoiled), "words") == (0.0, 0.0)
    one = stop(tokenizer, "東", kind="words")
    assert one.done([0], [said]) == [False]
    full_stop = tokenizer.convert_tokens_to_ids(".")
    assert one.done([0], [[*said, full_stop]]) == [True]


# Evaluations

PROMPTS = ((1, 17, 40, 11), (1, 17, 40), (1, 9), (1, 60, 61, 62, 63, 64), (5,), (1, 101, 102))
BUDGET = 60


def evaluated(
    loaded: LoadedModel,
    truths: Sequence[str],
    *,
    early_exit: bool,
    drafts: Sequence[Sequence[int]] = (),
    **options: Any,
) -> Evaluation:
    """Return an evaluation of an edited model; the first half is to forget."""
    known = {p: tuple(d) for p, d in zip(PROMPTS, drafts, strict=False)}
    activations = PromptActivations(ActivationSource(loaded), PROMPTS, drafts=known)
    answers = Answerer(activations, deepest=2)
    answers.prepare()
    activations.reads(1)
    rows = [*range(len(PROMPTS)), 0]  # the first prompt is asked again, for another truth
    asked = [
        Question(Record(f"Q{i}?", truth, "E"), row)
        for i, (truth, row) in enumerate(zip(truths, rows, strict=True))
    ]
    sets = {"forget": asked[:3], "retain": asked[3:]}
    evaluator = Evaluator(answers, loaded.tokenizer, sets, early_exit=early_exit, **options)
    weight = loaded.layout.down_projection_of(loaded.model, 1).weight
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    with edited(loaded, {1: weight + 0.3 * change}):
        return evaluator.evaluate(edited_layer=1, max_new_tokens=BUDGET)


@each_tokenizer
@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_scores_with_an_early_exit_are_those_without_it(
    loaded: Callable[..., LoadedModel], family: str, kind: str
) -> None:
    """Truths are beginnings of what the model says, all of it, and what it does not say."""
    model = dataclasses.replace(loaded(family), eos_ids=(320,))
    options = {"rouge_tokenizer": kind}
    nothing = evaluated(model, ["zebra"] * 7, early_exit=False, **options)
    said = [tokenize_words(row.answer, tokenizer=kind) for row in nothing.rows]
    assert all(len(words) > 6 for words in said)
    truths = [
        " ".join(said[0][:2]),
        " ".join(said[1][:5:2]),
        "zebra",
        " ".join(said[3]),
        " ".join([*said[4][:2], "zebra"]),
        " ".join(said[5][1:4]),
        " ".join(said[6][3:6]),
    ]
    drafts = [list(nothing.tokens[row])[: 5 * row] for row in range(len(PROMPTS))]
    end = nothing.tokens[0][10]
    ending = evaluated(
        dataclasses.replace(model, eos_ids=(end,)), ["zebra"] * 7, early_exit=False, **options
    )
    rows = [*range(len(PROMPTS)), 0]
    assert [row.ended for row in ending.rows] == [end in nothing.tokens[row] for row in rows]
    for known in ((), drafts):
        whole = evaluated(model, truths, early_exit=False, drafts=known, **options)
        early = evaluated(model, truths, early_exit=True, drafts=known, **options)
        assert early.scores == whole.scores
        for one, other in zip(early.rows, whole.rows, strict=True):
            assert (one.rouge1, one.rouge_l) == (other.rouge1, other.rouge_l)
            assert other.answer.startswith(one.answer.rstrip(REPLACEMENT))
            assert other.ended is False
            assert one.ended is (None if one.rouge_l == 1 else False)
        lengths = {row: len(tokens) for row, tokens in early.tokens.items()}
        assert all(len(tokens) == BUDGET for tokens in whole.tokens.values())
        assert lengths[2] == lengths[4] == BUDGET
        assert max(lengths[row] for row in (0, 1, 5)) < BUDGET
