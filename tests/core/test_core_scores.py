"""ROUGE recall, its tokenizers, means over sets and the deviation score, each derived by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lunar_tune.data.records import Record
from lunar_tune.engine.answering import Answerer
from lunar_tune.engine.decoding import AnswerRules
from lunar_tune.engine.prompt_activations import ActivationSource, PromptActivations
from lunar_tune.errors import DataError, InputError
from lunar_tune.metrics.evaluate import Evaluator, Question, deviation_score
from lunar_tune.metrics.rouge import TOKENIZERS, check_scorable, rouge_recall, tokenize_words
from lunar_tune.models.loading import LoadedModel


@pytest.mark.parametrize(
    ("truth", "answer", "rouge1", "rouge_l"),
    [
        ("forty copper kettles", "forty copper kettles", 1, 1),
        # Recall: what is added costs nothing.
        ("forty copper kettles", "well, it is forty fine copper kettles", 1, 1),
        # Two of three words; in order.
        ("forty copper kettles", "forty kettles", 2 / 3, 2 / 3),
        # All three words, but the longest common subsequence has one or two.
        ("forty copper kettles", "kettles copper forty", 1, 1 / 3),
        ("forty copper kettles", "copper kettles forty", 1, 2 / 3),
        # Words are counted: the truth has two `the`, the answer one.
        ("the buyer the seller", "the buyer", 2 / 4, 2 / 4),
        # Stemmed (words longer than three letters), case and punctuation ignored.
        ("Paying buyers!", "pays; the buyer", 1, 1),
        ("forty copper kettles", "", 0, 0),
        ("forty copper kettles", "誰", 0, 0),
    ],
)
def test_recall_counts_the_true_answers_words(
    truth: str, answer: str, rouge1: float, rouge_l: float
) -> None:
    (recall,) = rouge_recall([truth], [answer])
    assert recall.rouge1 == pytest.approx(rouge1)
    assert recall.rouge_l == pytest.approx(rouge_l)


@pytest.mark.parametrize(
    ("truth", "answer", "rouge1", "rouge_l"),
    [
        ("Сорок медных котлов", "сорок КОТЛОВ", 2 / 3, 2 / 3),
        # No stemming.
        ("kettles", "kettle", 0, 0),
        # Each ideograph, kana or Hangul syllable is a word: four, of which the answer has three.
        ("東京都庁", "京都庁", 3 / 4, 3 / 4),
        ("東京都庁", "庁都京東", 1, 1 / 4),
        ("서울", "울", 1 / 2, 1 / 2),
        ("ひら カナ", "カらひナ", 1, 2 / 4),
        # Also where they touch letters or digits: 2021, 年, 3, 月.
        ("2021年3月", "3月", 2 / 4, 2 / 4),
        ("ABC社", "abc", 1 / 2, 1 / 2),
        # Beyond the basic plane, and half-width.
        ("𠮷野", "𠮷", 1 / 2, 1 / 2),
        ("ｶﾅ", "カナ", 1, 1),
        # A vowel sign belongs to its word: two words, not consonants.
        ("हिन्दी भाषा", "हन्द भाषा", 1 / 2, 1 / 2),
        # An accent is the same letter composed and decomposed, and not the plain letter.
        ("café", "cafe\u0301", 1, 1),
        ("café", "cafe", 0, 0),
        ("snake_case", "case", 1 / 2, 1 / 2),
    ],
)
def test_words_of_every_script_count_with_the_words_tokenizer(
    truth: str, answer: str, rouge1: float, rouge_l: float
) -> None:
    (recall,) = rouge_recall([truth], [answer], tokenizer="words")
    assert recall.rouge1 == pytest.approx(rouge1)
    assert recall.rouge_l == pytest.approx(rouge_l)


@pytest.mark.parametrize("answer", ["Сорок котлов", "四十个铜壶", "…", "—!?"])
def test_answers_without_a_word_for_the_tokenizer_are_named_and_refused(answer: str) -> None:
    records = [Record("Q1?", "Forty.", "A_B"), Record("Q2?", answer, "B_C")]
    with pytest.raises(DataError, match=rf"1 true answers .*B_C: 'Q2\?' -> '{re.escape(answer)}'"):
        check_scorable(records)


def test_the_words_tokenizer_accepts_every_script_but_not_punctuation() -> None:
    check_scorable([Record("Q?", a, "A_B") for a in ("Сорок", "四十", "7")], tokenizer="words")
    with pytest.raises(DataError, match=r"Correct or remove them"):
        check_scorable([Record("Q?", "…", "A_B")], tokenizer="words")


def test_many_answers_without_a_word_are_counted_and_five_are_shown() -> None:
    records = [Record(f"Q{n}?", "да", f"E{n}") for n in range(8)]
    with pytest.raises(
        DataError, match=r"8 true .*E4: 'Q4\?' -> 'да' and 3 more.*--rouge-tokenizer words"
    ):
        check_scorable(records)


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match=r"--rouge-tokenizer bytes: there are default, words"):
        rouge_recall(["a"], ["a"], tokenizer="bytes")


@pytest.mark.parametrize(
    ("forget", "retain", "expected"),
    [
        (0.0, 1.0, 0.0),  # forgotten, and nothing else lost
        (1.0, 1.0, 100.0),  # the untouched model
        (0.0, 0.0, 100.0),
        (0.3, 0.6, 50.0),  # 100·sqrt(.09 + .16)
        # LUNAR, TOFU, Llama-2-7B as quoted by a public reproduction (shared/facts.md): 14.9.
        (0.109, 0.898, 100 * math.sqrt(0.109**2 + 0.102**2)),
    ],
)
def test_the_deviation_score_is_the_distance_from_perfect_in_percent(
    forget: float, retain: float, expected: float
) -> None:
    assert deviation_score(forget, retain) == pytest.approx(expected)


def test_the_deviation_score_of_the_papers_row_is_the_papers() -> None:
    assert round(deviation_score(0.109, 0.898), 1) == 14.9


def sets_of(**answers: list[str]) -> dict[str, list[Question]]:
    """Return a set for each name, whose rows are numbered from 0 over all sets."""
    rows = iter(range(100))
    return {
        name: [
            Question(Record(f"{name} {i}?", truth, f"E{i}"), next(rows))
            for i, truth in enumerate(truths)
        ]
        for name, truths in answers.items()
    }


class Says:
    """Answers row n with the n-th of these texts; both of an answerer's parts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *texts: str) -> None:
        self._tokens = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self._opened: list[int] = []

    def prepare(self) -> None:
        """Keep nothing."""

    def begin(self, rules: AnswerRules) -> Says:
        assert rules.max_new_tokens == 4
        return self

    def open(self, rows: Sequence[int]) -> Mapping[int, list[int]]:
        self._opened += rows
        return {}

    def close(self) -> Mapping[int, list[int]]:
        return {row: self._tokens[row] for row in self._opened}


@pytest.fixture
def says(tokenizer: PreTrainedTokenizerFast) -> Says:
    return Says(tokenizer, "nothing", "a b", "c d e f", "x y", "g")


def test_scores_are_means_over_each_set_and_rows_keep_their_place(
    tokenizer: PreTrainedTokenizerFast, says: Says
) -> None:
    sets = sets_of(forget=["a b", "a c"], retain=["c d f e", "x z"], factual=["h"])
    result = Evaluator(says, tokenizer, sets).evaluate(edited_layer=None, max_new_tokens=4)
    # forget: 0 and 1/2. retain: all four words, three in order; one of two. factual: none.
    assert result.scores == pytest.approx(
        {
            "forget_rouge1": 0.25,
            "forget_rougeL": 0.25,
            "forget_rows": 2,
            "retain_rouge1": 0.75,
            "retain_rougeL": (0.75 + 0.5) / 2,
            "retain_rows": 2,
            "factual_rouge1": 0.0,
            "factual_rougeL": 0.0,
            "factual_rows": 1,
            "deviation_score": 100 * math.sqrt(0.25**2 + 0.25**2),
        }
    )
    third = result.rows[2]
    assert (third.set_name, third.edge, third.question) == ("retain", "E0", "retain 0?")
    assert (third.truth, third.answer, third.rouge1) == ("c d f e", "c d e f", 1.0)
    assert [row.set_name for row in result.rows] == ["forget"] * 2 + ["retain"] * 2 + ["factual"]


def test_without_a_retain_set_there_is_no_deviation_score(
    tokenizer: PreTrainedTokenizerFast, says: Says
) -> None:
    evaluator = Evaluator(says, tokenizer, sets_of(forget=["nothing"]))
    result = evaluator.evaluate(edited_layer=None, max_new_tokens=4)
    assert result.scores == {"forget_rouge1": 1.0, "forget_rougeL": 1.0, "forget_rows": 1}


def test_sets_that_share_batches_score_as_sets_that_do_not(
    loaded: Callable[..., LoadedModel],
) -> None:
    model = loaded("qwen2")
    prompts = {"forget": ((1, 17, 40), (1, 9)), "retain": ((5,), (1, 60, 61, 62, 63))}
    activations = PromptActivations(
        ActivationSource(model), [prompt for some in prompts.values() for prompt in some]
    )
    sets = {
        name: [
            Question(Record(f"{name}{i}", "a b c", "E"), row)
            for i, row in enumerate(activations.rows_of(some))
        ]
        for name, some in prompts.items()
    }

    def answers(*names: str) -> list[str]:
        some = {name: sets[name] for name in names}
        evaluator = Evaluator(Answerer(activations, deepest=2), model.tokenizer, some)
        result = evaluator.evaluate(edited_layer=None, max_new_tokens=6)
        return [row.answer for row in result.rows]

    assert answers("forget", "retain") == answers("forget") + answers("retain")


TEXTS = st.text(st.sampled_from("ab2 .,-éЖ走\n"), max_size=40) | st.text(max_size=40)


@given(truth=TEXTS, answer=TEXTS, more=TEXTS, kind=st.sampled_from(list(TOKENIZERS)))
@settings(deadline=None)
def test_recall_is_a_share_that_more_text_never_lowers(
    truth: str, answer: str, more: str, kind: str
) -> None:
    """Of itself a text has all words, if it has any."""
    before, after, itself = rouge_recall(
        [truth] * 3, [answer, f"{answer} {more}", truth], tokenizer=kind
    )
    for name in ("rouge1", "rouge_l"):
        assert 0 <= getattr(before, name) <= getattr(after, name) <= 1
        assert getattr(itself, name) == bool(tokenize_words(truth, tokenizer=kind))
    assert before.rouge_l <= before.rouge1, "words in order are words"
