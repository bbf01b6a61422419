"""ROUGE recall by hand; an answer that may stop has recall 1 whatever follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engine_cases import NEVER, PROMPTS, answerer, new_weights, with_eos
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from transformers import PreTrainedTokenizerFast as Tokenizer

from lunar_tune.config.options import ROUGE_TOKENIZERS
from lunar_tune.data.records import Record
from lunar_tune.errors import DataError
from lunar_tune.methods.lunar.method import edited
from lunar_tune.metrics.evaluate import Evaluation, Evaluator, Question, deviation_score
from lunar_tune.metrics.rouge import (
    RecallStop,
    check_scorable,
    finished_part,
    lost_letters,
    lost_share,
    rouge_recall,
    tokenize_words,
)
from lunar_tune.models.loading import LoadedModel


@pytest.mark.parametrize(
    ("kind", "truth", "answer", "rouge1", "rouge_l"),
    [
        ("default", "forty copper kettles", "well, it is forty fine copper kettles", 1, 1),
        ("default", "forty copper kettles", "forty kettles", 2 / 3, 2 / 3),
        ("default", "forty copper kettles", "kettles copper forty", 1, 1 / 3),  # in order: one
        ("default", "the buyer the seller", "the buyer", 2 / 4, 2 / 4),  # words are counted
        ("default", "Paying buyers!", "pays; the buyer", 1, 1),  # stems, case and punctuation
        # Each ideograph, kana or Hangul syllable is a word: four, of which the answer has three.
        ("words", "東京都庁", "庁都京東", 1, 1 / 4),
        # Also where they touch letters or digits: 2021, 年, 3, 月.
        ("words", "2021年3月", "3月", 2 / 4, 2 / 4),
        ("words", "ｶﾅ", "カナ", 1, 1),
        ("words", "हिन्दी भाषा", "हन्द भाषा", 1 / 2, 1 / 2),
        # An accent is the same letter composed and decomposed, and not the plain letter.
        ("words", "café", "cafe\u0301", 1, 1),
        ("words", "café", "cafe", 0, 0),
        *((kind, "José Müller", "Jose\u0301 Mu\u0308ller", 1, 1) for kind in ROUGE_TOKENIZERS),
        ("words", "snake_case", "case", 1 / 2, 1 / 2),
        ("words", "Straße, ΟΔΟΣ", "STRASSE; οδος", 1, 1),
        # Scripts without spaces, divided by hand: he/born/at/Chiang Mai; price/water/tea.
        ("words", "เขา เกิด ที่ เชียงใหม่", "เขาเกิดที่เชียงใหม่", 1, 1),
        ("words", "ราคาน้ำชา", "น้ำ", 1 / 3, 1 / 3),
        ("words", "ລາວ ເກີດ ຢູ່ ຫຼວງພະບາງ", "ລາວເກີດຢູ່ຫຼວງພະບາງ", 1, 1),
        ("words", "គាត់ កើត នៅ សៀមរាប", "គាត់កើតនៅសៀមរាប", 1, 1),
        ("words", "ကျွန်တော် ကော်ဖီ ကြိုက် တယ်", "ကျွန်တော်ကော်ဖီကြိုက်တယ်", 1, 1),
        # "He was born in Bangkok", answered with a sentence of other words and the same letters.
        ("words", "เขาเกิดที่กรุงเทพ", "ร้านขายกาต้มน้ำทองแดง", 0, 0),
        ("words", "ราคา12บาท", "ราคา21บาท", 2 / 3, 2 / 3),
    ],
)
def test_recall_counts_the_true_answers_words(
    kind: str, truth: str, answer: str, rouge1: float, rouge_l: float
) -> None:
    recall = rouge_recall(truth, answer, kind)
    assert (recall.rouge1, recall.rouge_l) == pytest.approx((rouge1, rouge_l))


TEXTS = st.text(st.sampled_from("ab2 .,-é\u0301Ж走\n"), max_size=40) | st.text(max_size=40)


@given(truth=TEXTS, answer=TEXTS, more=TEXTS, kind=st.sampled_from(list(ROUGE_TOKENIZERS)))
@settings(max_examples=40, deadline=None)
def test_more_text_never_lowers_recall(truth: str, answer: str, more: str, kind: str) -> None:
    """Of itself a text has all words, if it has any."""
    before, after, itself = (
        rouge_recall(truth, said, kind) for said in (answer, f"{answer} {more}", truth)
    )
    for name in ("rouge1", "rouge_l"):
        assert 0 <= getattr(before, name) <= getattr(after, name) <= 1
        assert getattr(itself, name) == bool(tokenize_words(truth, tokenizer=kind))
    assert before.rouge_l <= before.rouge1, "words in order are words"


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("Forty kettles.", 0),
        ("José", 1 / 4),
        ("Jose\u0301", 1 / 5),  # a mark is a letter that is lost
        ("Đà Nẵng.", 3 / 6),
        ("Łódź", 3 / 4),
        ("\u212a\u0130", 1 / 3),  # KELVIN SIGN lowers to k, a dotted capital I to i and a mark
        ("Да, 7", 2 / 3),
        ("他写了9本", 4 / 5),
        ("\uff11\uff12", 1),
        ("—", 1),
        ("😀", 1),
    ],
)
def test_the_share_of_letters_that_rouge_cannot_see_is_counted_by_hand(
    answer: str, share: float
) -> None:
    assert lost_share(answer) == pytest.approx(share)
    assert (share < 1) == bool(tokenize_words(answer))
    assert lost_share(answer, tokenizer="words") == float(answer in "—😀")


def test_answers_of_which_rouge_sees_too_little_are_refused_by_row_and_by_set() -> None:
    many = [Record(f"Q{n}?", "Да, 7.", f"E{n}") for n in range(8)]
    told = r"8 true .*E4: 'Q4\?' -> 'Да, 7.' and 3 more. Give --rouge-tokenizer words"
    with pytest.raises(DataError, match=told):
        check_scorable({"forget": [Record("Q?", "Forty.", "A_B"), *many], "retain": many})
    all_scripts = [Record("Q?", a, "A_B") for a in ("Сорок", "四十", "\uff17", "Đà Nẵng")]
    check_scorable({"forget": all_scripts}, tokenizer="words")
    with pytest.raises(DataError, match=r"1 true .*: A_B: 'Q\?' -> '…'. Correct or remove them\.$"):
        check_scorable({"forget": [Record("Q?", "…", "A_B")]}, tokenizer="words")
    spanish, vietnamese = (
        [Record("Q?", answer, "E")] for answer in ("José nació en Málaga.", "Ông ở Đà Nẵng.")
    )
    check_scorable({"forget": [Record("Q?", "Forty.", "A_B"), *vietnamese], "retain": spanish})
    with pytest.raises(DataError, match=r"^the retain answers lose 50% .* Give --rouge-tok"):
        check_scorable({"forget": spanish, "retain": vietnamese})
    assert "1 of 2 true answers (edges: E) lose up to 18% of" in lost_letters(
        [*spanish, Record("Q?", "Forty.", "F")], "default"
    )
    assert not lost_letters(vietnamese, "words")


def test_the_deviation_score_is_the_distance_from_perfect_in_percent() -> None:
    """100·sqrt(.09 + .16); LUNAR on TOFU with Llama-2-7B, as a public reproduction quotes it."""
    for forget, retain, expected in ((0.0, 1.0, 0.0), (1.0, 1.0, 100.0), (0.3, 0.6, 50.0)):
        assert deviation_score(forget, retain) == pytest.approx(expected)
    assert round(deviation_score(0.109, 0.898), 1) == 14.9


each_tokenizer = pytest.mark.parametrize("kind", ROUGE_TOKENIZERS)
KELVIN, DOTTED_I, LONG_S, REPLACEMENT = "\u212a", "\u0130", "\u017f", "\ufffd"

# Words that stems change, scripts with marks, ideographs, letters that lower to a-z or to two.
SPACED = (
    "Cedar cedars paying paid 7 40 a I K snake_case don't ß ﬁ é 東京 都 カ ﾅ 서울 हिन्दी медных "
    "กาต้ม น้ำ ทองแดง ๕ ພາສາ ຂ້ອຍ ភាសា ខ្ញុំ မြန်မာ ဖွား "
    "ΟΔΟΣ Σ \u03b1 𠮷 ² e\u0301 \u1112\u1161\u11ab . , : - ' … 。 = < \uff08"
)
PIECES = (
    *SPACED.split(),
    *(KELVIN, DOTTED_I, LONG_S, "\u0301", "\u0338", "\u093f", "\u200d", "\u0e33", "\u0e49"),
    *(" ", "  ", "\n", "\u00a0", "\u00ad"),
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
    recall = rouge_recall(truth, answer, kind)
    return recall.rouge1, recall.rouge_l


@each_tokenizer
@given(text=texts, more=texts, replaced=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_finished_words_stay_as_they_are(kind: str, text: str, more: str, replaced: int) -> None:
    """Replacement characters at the end stand for whatever a half character becomes."""
    finished = words_of(finished_part(text + REPLACEMENT * replaced, rouge_tokenizer=kind), kind)
    assert words_of(text + more, kind)[: len(finished)] == finished


def stop(tokenizer: Tokenizer, *truths: str, kind: str = "default") -> RecallStop:
    return RecallStop(tokenizer, {0: truths}, rouge_tokenizer=kind)


@pytest.mark.parametrize(
    ("kind", "truth", "done", "not_done"),
    [
        ("default", "Cedar.", ("Cedar.", "It is Cedar, ", f"Cedar.{REPLACEMENT}"), ("Cedar", "")),
        ("default", "Cedar Street", ("Cedar. Street!",), ("Cedar. Street", "Street Cedar.")),
        ("default", "cedar cedar", ("Cedar, cedar.",), ("Cedar.",)),
        ("default", "paying buyers", ("They pay the buyer.",), ("They pay the buyer",)),  # stems
        ("words", "東京都", ("東京都。",), ("東京都", "都京東。", f"東京都{REPLACEMENT}")),
        ("words", "kettles", ("kettles.",), ("kettle.",)),  # no stems
        ("words", "हिन्दी", ("हिन्दी ",), ("हिन्द ",)),
    ],
)
def test_an_answer_stops_once_its_finished_words_hold_the_truth_in_order(
    tokenizer: Tokenizer, kind: str, truth: str, done: Sequence[str], not_done: Sequence[str]
) -> None:
    said = [tokenizer.encode(text, add_special_tokens=False) for text in (*done, *not_done)]
    expected = [True] * len(done) + [False] * len(not_done)
    assert stop(tokenizer, truth, kind=kind).done([0] * len(said), said) == expected


def test_rows_go_on_until_all_their_truths_are_said(tokenizer: Tokenizer) -> None:
    both = stop(tokenizer, "Cedar Street", "Street")
    said = [tokenizer.encode(s, add_special_tokens=False) for s in ("Street. ", "Cedar Street. ")]
    assert both.done([0, 0], said) == [False, True]
    truths = RecallStop(tokenizer, {3: ["a"], 5: ["b"]}, rouge_tokenizer="default")
    letter = tokenizer.encode("a. ", add_special_tokens=False)
    assert truths.done([5, 3, 4], [letter] * 3) == [False, True, False], "4 has no truth"


@each_tokenizer
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_may_stop_has_recall_1(tokenizer: Tokenizer, kind: str, data: st.DataObject) -> None:
    """Truths are parts of the text, so that many answers do stop; tokens are bytes and words."""
    text = data.draw(texts)
    words = words_of(text, kind)
    chosen = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    truth = " ".join(word for word, is_in in zip(words, chosen, strict=True) if is_in)
    if not words_of(truth, kind):
        return
    tokens = tokenizer.encode(text, add_special_tokens=False)
    more = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    begun = [tokens[:n] for n in range(len(tokens) + 1)]
    verdicts = stop(tokenizer, truth, kind=kind).done([0] * len(begun), begun)
    for one, verdict in zip(begun, verdicts, strict=True):
        for answer in (one, tokens, one + more, tokens + more) if verdict else ():
            said = tokenizer.decode(answer, skip_special_tokens=True)
            assert recalls(truth, said, kind) == (1.0, 1.0)


def test_bytes_that_more_bytes_spoil_finish_nothing() -> None:
    """Llama 2, Gemma, Phi-3: a character's first byte makes all bytes before it unreadable."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Cedar", "."]
    numbers = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(numbers, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = Tokenizer(tokenizer_object=backend, unk_token="<unk>")
    said = [1 + byte for byte in "東。".encode()]
    spoiled = [*said, 1 + "京".encode()[0]]
    assert tokenizer.decode(said) == "東。"
    assert recalls("東", tokenizer.decode(spoiled), "words") == (0.0, 0.0)
    one = stop(tokenizer, "東", kind="words")
    assert one.done([0], [said]) == [False]
    assert one.done([0], [[*said, numbers["."]]]) == [True]


BUDGET = 40


def evaluated(
    loaded: LoadedModel, truths: Sequence[str], *, kind: str, drafts: Any = None, **how: Any
) -> Evaluation:
    answers = answerer(loaded, drafts=drafts)
    answers.activations.reads(1)
    asked = [Question(Record(f"Q{i}?", t, "E"), i % len(PROMPTS)) for i, t in enumerate(truths)]
    sets = {"forget": asked[:3], "retain": asked[3:]}
    evaluator = Evaluator(answers, loaded.tokenizer, sets, rouge_tokenizer=kind, **how)
    with edited(loaded, new_weights(loaded, 1)):
        return evaluator.evaluate(edited_layer=1, max_new_tokens=BUDGET)


@each_tokenizer
def test_an_early_exit_changes_no_score(loaded: Callable[..., LoadedModel], kind: str) -> None:
    """The last row asks the first prompt again."""
    model = with_eos(loaded("qwen2"), NEVER)
    nothing = evaluated(model, ["zebra"] * 8, kind=kind)
    end = nothing.tokens[0][10]
    ending = evaluated(with_eos(model, (end,)), ["zebra"] * 8, kind=kind)
    rows = [i % len(PROMPTS) for i in range(8)]
    assert [row.ended for row in ending.rows] == [end in nothing.tokens[row] for row in rows]
    said = [tokenize_words(row.answer, tokenizer=kind) for row in nothing.rows]
    assert all(len(words) > 6 for words in said)
    hard, some, none = [*said[4][:2], "zebra"], said[5][1:4], ["zebra"]
    truths = [said[0][:2], said[1][:5:2], none, said[3], hard, some, none, said[0][3:6]]
    truths = [" ".join(words) for words in truths]
    whole = evaluated(model, truths, kind=kind)
    assert all(len(tokens) == BUDGET for tokens in whole.tokens.values())
    for drafts in (None, [list(nothing.tokens[row])[: 5 * row] for row in range(len(PROMPTS))]):
        early = evaluated(model, truths, kind=kind, early_exit={"forget", "retain"}, drafts=drafts)
        assert early.scores == whole.scores
        for one, other in zip(early.rows, whole.rows, strict=True):
            assert (one.rouge1, one.rouge_l) == (other.rouge1, other.rouge_l)
            assert other.answer.startswith(one.answer.rstrip(REPLACEMENT))
            assert other.ended is False
            assert one.ended is (None if one.rouge_l == 1 else False)
        lengths = {row: len(tokens) for row, tokens in early.tokens.items()}
        assert lengths[2] == lengths[4] == BUDGET
        assert max(lengths[row] for row in (0, 1, 5)) < BUDGET
