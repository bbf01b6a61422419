"""An evaluation that stops has missed the floor for certain, and one that does not is as ever."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lunar_tune.data.records import Record
from lunar_tune.engine.decoding import AnswerRules
from lunar_tune.metrics.evaluate import Evaluation, Evaluator, Question

TRUTH = "a b c d e f g h i j"
N_WORDS = 10
N_FORGET, N_FACTUAL = 3, 2


class Exam:
    """Retain answers with so many of the truth's ten words; both of an answerer's parts.

    Rows 0 to 2 are to forget, the next ones to retain, the last two are facts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        right: Sequence[int],
        *,
        known: Sequence[bool] = (),
    ) -> None:
        said = [tokenizer.encode(TRUTH[: 2 * n], add_special_tokens=False) for n in range(11)]
        self.tokenizer = tokenizer
        self.right = [5] * N_FORGET + list(right) + [10] * N_FACTUAL
        self._answers = [said[n] for n in self.right]
        self._known = [False] * N_FORGET + [*known, *[False] * (len(right) - len(known))]
        self._known += [False] * N_FACTUAL
        self.opened: list[int] = []
        self.closed = 0
        self.rules: list[AnswerRules] = []

    def sets(self) -> dict[str, list[Question]]:
        n_retain = len(self.right) - N_FORGET - N_FACTUAL
        rows = iter(range(len(self.right)))
        return {
            name: [Question(Record(f"{name} {i}?", TRUTH, "E"), next(rows)) for i in range(count)]
            for name, count in (("forget", N_FORGET), ("retain", n_retain), ("factual", N_FACTUAL))
        }

    def prepare(self) -> None:
        """Keep nothing."""

    def begin(self, rules: AnswerRules) -> Exam:
        self.rules.append(rules)
        self.opened = []
        return self

    def open(self, rows: Sequence[int]) -> Mapping[int, list[int]]:
        assert not set(rows) & set(self.opened)
        assert len(set(rows)) == len(rows)
        self.opened += rows
        return {row: self._answers[row] for row in rows if self._known[row]}

    def close(self) -> Mapping[int, list[int]]:
        self.closed += 1
        return {row: self._answers[row] for row in self.opened}

    def evaluate(self, floor: float | None, *, seed: int = 0) -> Evaluation:
        evaluator = Evaluator(self, self.tokenizer, self.sets(), seed=seed)
        return evaluator.evaluate(edited_layer=2, max_new_tokens=32, floor=floor)


@pytest.fixture(scope="module")
def exam(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Exam]:
    """Return a factory of exams."""

    def make(right: Sequence[int], **options: Sequence[bool]) -> Exam:
        return Exam(tokenizer, right, **options)

    return make


def check(one: Exam, floor: float, seed: int) -> Evaluation:
    """Evaluate with a floor and hold the result against the whole truth, in fractions."""
    right = one.right[N_FORGET:-N_FACTUAL]
    mean = Fraction(sum(right), N_WORDS * len(right))
    result = one.evaluate(floor, seed=seed)
    asked = [row for row in one.opened if N_FORGET <= row < N_FORGET + len(right)]
    if result.complete:
        everything = one.evaluate(None)
        assert result == everything
        return result
    # Never a false stop: the mean of all rows is below the floor.
    assert mean < Fraction(floor)
    seen = Fraction(sum(one.right[row] for row in asked), N_WORDS * len(asked))
    assert result.scores["retain_rouge1"] == pytest.approx(float(seen), abs=1e-12)
    assert result.scores["retain_rougeL"] == pytest.approx(float(seen), abs=1e-12)
    assert result.scores["retain_rows"] == len(asked) <= len(right)
    # The forget set is asked always; the facts are not.
    assert result.scores["forget_rouge1"] == 0.5
    assert result.scores["forget_rows"] == N_FORGET
    assert set(result.scores) == {
        *(f"{name}_{what}" for name in ("forget", "retain") for what in ("rouge1", "rougeL")),
        "forget_rows",
        "retain_rows",
        "deviation_score",
    }
    assert result.scores["deviation_score"] == pytest.approx(
        100 * math.hypot(0.5, 1 - float(seen)), abs=1e-9
    )
    assert [row.set_name for row in result.rows] == ["forget"] * N_FORGET + ["retain"] * len(asked)
    assert [row.question for row in result.rows[N_FORGET:]] == [
        f"retain {row - N_FORGET}?" for row in sorted(asked)
    ]
    assert set(result.tokens) == {*range(N_FORGET), *asked}
    return result


floors = st.one_of(
    st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0, 1e-9, 1 - 1e-9]),
    st.floats(0.0, 1.0),
)


@given(
    right=st.one_of(
        st.lists(st.integers(0, N_WORDS), min_size=1, max_size=80),
        st.lists(st.integers(8, N_WORDS), min_size=20, max_size=80),
    ),
    data=st.data(),
    floor=floors,
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_whatever_the_recalls_an_evaluation_that_stops_has_missed_the_floor(
    exam: Callable[..., Exam], right: list[int], data: st.DataObject, floor: float, seed: int
) -> None:
    known = data.draw(st.lists(st.booleans(), min_size=len(right), max_size=len(right)))
    check(exam(right, known=known), floor, seed)


@given(
    right=st.lists(st.integers(0, N_WORDS), min_size=1, max_size=60),
    more=st.sampled_from([-1, 0, 1]),
    seed=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_a_floor_that_is_met_exactly_is_not_missed(
    exam: Callable[..., Exam], right: list[int], more: int, seed: int
) -> None:
    """The floor is the mean as floats compute it, or next to it."""
    floor = sum(right) / (N_WORDS * len(right))
    for _ in range(abs(more)):
        floor = min(1.0, max(0.0, math.nextafter(floor, math.inf * more)))
    result = exam(right).evaluate(floor, seed=seed)
    assert result.complete
    assert result == exam(right).evaluate(None)


def test_a_floor_of_0_asks_everything(exam: Callable[..., Exam]) -> None:
    for right in ([0] * 50, [10] * 50):
        assert check(exam(right), 0.0, 0).complete


def test_a_floor_of_1_is_missed_by_one_missing_word_and_by_nothing_else(
    exam: Callable[..., Exam],
) -> None:
    assert check(exam([10] * 50), 1.0, 0).complete
    for place in (0, 17, 49):
        right = [10] * 50
        right[place] = 9
        assert not check(exam(right), 1.0, 0).complete


def test_a_floor_missed_by_far_is_seen_in_the_first_chunk(exam: Callable[..., Exam]) -> None:
    """Of 200 rows at a floor of .9, twenty may be missing; two times so many are a chunk."""
    one = exam([0] * 200)
    result = check(one, 0.9, 0)
    assert not result.complete
    assert result.scores["retain_rows"] == 40
    assert result.scores["retain_rouge1"] == 0.0
    assert one.closed == 2  # of the chunk, and of what there is in the end


def test_where_drafts_hold_the_floor_all_is_asked_in_one_go(exam: Callable[..., Exam]) -> None:
    one = exam([10] * 200, known=[True] * 200)
    assert one.evaluate(0.9).complete
    assert one.closed == 1


def test_where_drafts_are_of_no_use_a_good_model_is_still_asked_everything(
    exam: Callable[..., Exam],
) -> None:
    result = check(exam([9] * 200), 0.9, 0)
    assert result.complete
    assert result.scores["retain_rows"] == 200
    assert result.scores["factual_rows"] == N_FACTUAL


@pytest.mark.parametrize("seed", [0, 1])
def test_retain_rows_are_asked_in_one_order_for_a_seed(
    exam: Callable[..., Exam], seed: int
) -> None:
    """What is asked of a bad model is asked of a worse one first, and in no other order."""
    orders = []
    for right in ([0] * 100, [3] * 100, [8] * 100, [8] * 100):
        one = exam(right)
        assert not check(one, 0.9, seed).complete
        orders.append(one.opened)
    shortest = min(map(len, orders))
    assert all(order[:shortest] == orders[0][:shortest] for order in orders)
    assert orders[2] == orders[3]
    assert orders[0][:N_FORGET] == list(range(N_FORGET))
    assert orders[0][N_FORGET:] != sorted(orders[0][N_FORGET:])


def test_another_seed_is_another_order(exam: Callable[..., Exam]) -> None:
    orders = []
    for seed in (0, 1):
        one = exam([0] * 100)
        one.evaluate(0.9, seed=seed)
        orders.append(one.opened)
    assert orders[0] != orders[1]


def test_rules_reach_the_answerer(exam: Callable[..., Exam]) -> None:
    one = exam([10] * 4)
    one.evaluate(0.5)
    assert one.rules == [AnswerRules(edited_layer=2, max_new_tokens=32, stop=None)]


def test_a_prompt_that_stands_in_two_sets_is_opened_once(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Two records of one prompt, one to forget and one to retain, each with its own truth."""
    one = Exam(tokenizer, [4, 10])
    sets = {
        "forget": [Question(Record("Q?", "a b", "E"), 3), Question(Record("R?", "b", "E"), 3)],
        "retain": [Question(Record("Q?", "d e", "E"), 3), Question(Record("S?", TRUTH, "E"), 4)],
        "factual": [Question(Record("S?", "z", "E"), 4)],
    }
    for floor in (None, 0.5, 0.9):
        evaluator = Evaluator(one, tokenizer, sets)
        result = evaluator.evaluate(edited_layer=None, max_new_tokens=32, floor=floor)
        assert sorted(one.opened) == [3, 4]
        # Row 3 says "a b c d", row 4 all ten words: 1 and 1; 1/2 and 1.
        assert result.scores["forget_rouge1"] == 1.0
        assert result.scores["retain_rouge1"] == 0.75
        assert result.complete == (floor != 0.9)


def test_without_a_retain_set_a_floor_stops_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    one = Exam(tokenizer, [4])
    evaluator = Evaluator(one, tokenizer, {"forget": one.sets()["forget"]})
    result = evaluator.evaluate(edited_layer=None, max_new_tokens=32, floor=1.0)
    assert result.complete
    assert result.scores["forget_rows"] == N_FORGET
