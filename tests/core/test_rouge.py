"""ROUGE recall, its tokenizers and the deviation score, each derived by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.data.records import Record
from lunar_tune.errors import DataError, InputError
from lunar_tune.metrics.evaluate import deviation_score
from lunar_tune.metrics.rouge import TOKENIZERS, check_scorable, rouge_recall, tokenize_words


@pytest.mark.parametrize(
    ("kind", "truth", "answer", "rouge1", "rouge_l"),
    [
        # Recall: what is added costs nothing.
        ("default", "forty copper kettles", "well, it is forty fine copper kettles", 1, 1),
        # Two of three words; in order.
        ("default", "forty copper kettles", "forty kettles", 2 / 3, 2 / 3),
        # All three words, but the longest common subsequence has one or two.
        ("default", "forty copper kettles", "kettles copper forty", 1, 1 / 3),
        # Words are counted: the truth has two `the`, the answer one.
        ("default", "the buyer the seller", "the buyer", 2 / 4, 2 / 4),
        # Stemmed (words longer than three letters), case and punctuation ignored.
        ("default", "Paying buyers!", "pays; the buyer", 1, 1),
        ("default", "forty copper kettles", "", 0, 0),
        ("words", "Сорок медных котлов", "сорок КОТЛОВ", 2 / 3, 2 / 3),
        # No stemming.
        ("words", "kettles", "kettle", 0, 0),
        # Each ideograph, kana or Hangul syllable is a word: four, of which the answer has three.
        ("words", "東京都庁", "庁都京東", 1, 1 / 4),
        # Also where they touch letters or digits: 2021, 年, 3, 月.
        ("words", "2021年3月", "3月", 2 / 4, 2 / 4),
        # Beyond the basic plane, and half-width.
        ("words", "𠮷野", "𠮷", 1 / 2, 1 / 2),
        ("words", "ｶﾅ", "カナ", 1, 1),
        # A vowel sign belongs to its word: two words, not consonants.
        ("words", "हिन्दी भाषा", "हन्द भाषा", 1 / 2, 1 / 2),
        # An accent is the same letter composed and decomposed, and not the plain letter.
        ("words", "café", "cafe\u0301", 1, 1),
        ("words", "café", "cafe", 0, 0),
        ("words", "snake_case", "case", 1 / 2, 1 / 2),
    ],
)
def test_recall_counts_the_true_answers_words(
    kind: str, truth: str, answer: str, rouge1: float, rouge_l: float
) -> None:
    (recall,) = rouge_recall([truth], [answer], tokenizer=kind)
    assert (recall.rouge1, recall.rouge_l) == pytest.approx((rouge1, rouge_l))


TEXTS = st.text(st.sampled_from("ab2 .,-éЖ走\n"), max_size=40) | st.text(max_size=40)


@given(truth=TEXTS, answer=TEXTS, more=TEXTS, kind=st.sampled_from(list(TOKENIZERS)))
@settings(max_examples=40, deadline=None)
def test_more_text_never_lowers_recall(truth: str, answer: str, more: str, kind: str) -> None:
    """Of itself a text has all words, if it has any."""
    before, after, itself = rouge_recall(
        [truth] * 3, [answer, f"{answer} {more}", truth], tokenizer=kind
    )
    for name in ("rouge1", "rouge_l"):
        assert 0 <= getattr(before, name) <= getattr(after, name) <= 1
        assert getattr(itself, name) == bool(tokenize_words(truth, tokenizer=kind))
    assert before.rouge_l <= before.rouge1, "words in order are words"


def test_true_answers_without_a_word_for_the_tokenizer_are_refused() -> None:
    many = [Record(f"Q{n}?", "да", f"E{n}") for n in range(8)]
    told = r"8 true .*E4: 'Q4\?' -> 'да' and 3 more.*--rouge-tokenizer words"
    with pytest.raises(DataError, match=told):
        check_scorable([Record("Q?", "Forty.", "A_B"), *many])
    check_scorable([Record("Q?", a, "A_B") for a in ("Сорок", "四十", "7")], tokenizer="words")
    with pytest.raises(DataError, match=r"1 true .*Correct or remove them"):
        check_scorable([Record("Q?", "…", "A_B")], tokenizer="words")
    with pytest.raises(InputError, match=r"--rouge-tokenizer bytes: there are default, words"):
        rouge_recall(["a"], ["a"], tokenizer="bytes")


def test_the_deviation_score_is_the_distance_from_perfect_in_percent() -> None:
    """100·sqrt(.09 + .16); LUNAR on TOFU with Llama-2-7B, as a public reproduction quotes it."""
    for forget, retain, expected in ((0.0, 1.0, 0.0), (1.0, 1.0, 100.0), (0.3, 0.6, 50.0)):
        assert deviation_score(forget, retain) == pytest.approx(expected)
    assert round(deviation_score(0.109, 0.898), 1) == 14.9
