"""Scores of each set by hand; an evaluation that stops has missed the floor for certain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache, partial
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast as Tokenizer

from lunar_tune.data.records import Record
from lunar_tune.engine.decoding import AnswerRules, PlainAnswerer
from lunar_tune.metrics.evaluate import Evaluation, Evaluator, Question
from lunar_tune.metrics.means import mean_scores

TRUTH = "a b c d e f g h i j"
N_WORDS = 10
N_FORGET, N_FACTUAL = 3, 2
RULES = AnswerRules(edited_layer=2, max_new_tokens=32, stop=None)


def sets_of(**truths: Sequence[str]) -> dict[str, list[Question]]:
    """Return a set for each name, whose rows are numbered from 0 over all sets."""
    rows = count()
    return {
        name: [Question(Record(f"{name} {i}?", t, f"E{i}"), next(rows)) for i, t in enumerate(some)]
        for name, some in truths.items()
    }


class Told(PlainAnswerer):
    """Answers row n with the n-th of these texts; an answerer and its run."""

    def __init__(
        self, tokenizer: Tokenizer, texts: Sequence[str], known: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self._known = tokenizer, set(known)
        encode = cache(partial(tokenizer.encode, add_special_tokens=False))
        self._told = list(map(encode, texts))
        self.opened: list[int] = []
        self.closed = 0

    def begin(self, rules: AnswerRules) -> Told:
        assert rules == RULES
        self.opened = []
        return self

    def open(self, rows: Sequence[int]) -> Mapping[int, list[int]]:
        assert not set(rows) & set(self.opened)
        assert len(set(rows)) == len(rows)
        self.opened += rows
        return {row: self._told[row] for row in rows if row in self._known}

    def close(self) -> Mapping[int, list[int]]:
        self.closed += 1
        return {row: self._told[row] for row in self.opened}

    def evaluate(
        self, sets: Mapping[str, list[Question]], floor: float | None = None, seed: int = 0
    ) -> Evaluation:
        evaluator = Evaluator(self, self.tokenizer, sets, seed=seed)
        return evaluator.evaluate(edited_layer=2, max_new_tokens=32, floor=floor)


def test_scores_are_means_over_each_set_and_rows_keep_their_place(tokenizer: Tokenizer) -> None:
    told = Told(tokenizer, ["nothing", "a b", "c d e f", "x y", "g"])
    sets = sets_of(forget=["a b", "a c"], retain=["c d f e", "x z"], factual=["h"])
    result = told.evaluate(sets)
    # forget: 0 and 1/2. retain: all four words, three in order; one of two. factual: none.
    forget = {"forget_rouge1": 0.25, "forget_rougeL": 0.25, "forget_rows": 2}
    # Both of two rows lie as far from their mean: that, over the root of two.
    forget |= {"forget_rouge1_se": 0.25 / 2**0.5, "forget_rougeL_se": 0.25 / 2**0.5}
    expected = {
        **{"retain_rouge1": 0.75, "retain_rougeL": (0.75 + 0.5) / 2, "retain_rows": 2},
        **{"retain_rouge1_se": 0.25 / 2**0.5, "retain_rougeL_se": 0.125 / 2**0.5},
        **{"factual_rouge1": 0.0, "factual_rougeL": 0.0, "factual_rows": 1},
        **{"factual_rouge1_se": 0.0, "factual_rougeL_se": 0.0},
        "deviation_score": 100 * math.sqrt(0.25**2 + 0.25**2),
    }
    assert result.scores == pytest.approx(forget | expected)
    assert told.evaluate({"forget": sets["forget"]}, floor=1.0).scores == pytest.approx(forget)
    third = result.rows[2]
    assert (third.set_name, third.edge, third.question) == ("retain", "E0", "retain 0?")
    assert (third.truth, third.answer, third.rouge1) == ("c d f e", "c d e f", 1.0)
    assert [row.set_name for row in result.rows] == ["forget"] * 2 + ["retain"] * 2 + ["factual"]


def test_a_standard_error_is_what_the_mean_of_resampled_rows_scatters_by() -> None:
    draw = np.random.default_rng(0)
    for values in ([0.0, 0.25, 1.0, 1.0], [*draw.random(40), *[1.0] * 60], [0.75] * 5):
        means = draw.choice(values, (20_000, len(values))).mean(1)
        found = mean_scores("retain_rouge1", values)
        assert found["retain_rouge1_se"] == pytest.approx(means.std(), rel=0.03, abs=1e-12)
        assert found["retain_rouge1"] == pytest.approx(np.mean(values))


def test_a_prompt_that_stands_in_two_sets_is_opened_once(tokenizer: Tokenizer) -> None:
    told = Told(tokenizer, ["a b c d", TRUTH])
    sets = {
        "forget": [Question(Record("Q?", "a b", "E"), 0), Question(Record("R?", "b", "E"), 0)],
        "retain": [Question(Record("Q?", "d e", "E"), 0), Question(Record("S?", TRUTH, "E"), 1)],
        "factual": [Question(Record("S?", "z", "E"), 1)],
    }
    for floor in (None, 0.5, 0.9):
        result = told.evaluate(sets, floor)
        assert sorted(told.opened) == [0, 1]
        assert result.scores["forget_rouge1"] == 1.0
        assert result.scores["retain_rouge1"] == (1 / 2 + 1) / 2
        assert result.complete == (floor != 0.9)


class Exam(Told):
    """Retain answers with so many of the truth's ten words.

    Rows 0 to 2 are to forget, with five words, the next ones to retain; the last two are facts.
    """

    def __init__(
        self, tokenizer: Tokenizer, right: Sequence[int], known: Sequence[int] = ()
    ) -> None:
        self.right = [5] * N_FORGET + list(right) + [N_WORDS] * N_FACTUAL
        super().__init__(
            tokenizer, [TRUTH[: 2 * n] for n in self.right], [N_FORGET + i for i in known]
        )

    def take(self, floor: float | None, seed: int = 0) -> Evaluation:
        """Evaluate with a floor and hold the result against the whole truth, in fractions."""
        right = self.right[N_FORGET:-N_FACTUAL]
        sizes = {"forget": N_FORGET, "retain": len(right), "factual": N_FACTUAL}
        sets = sets_of(**{name: [TRUTH] * size for name, size in sizes.items()})
        result = self.evaluate(sets, floor, seed)
        if floor is None:
            return result
        asked = [row for row in self.opened if N_FORGET <= row < N_FORGET + len(right)]
        if result.complete:
            opened, closed = self.opened, self.closed
            assert result == self.evaluate(sets, None)
            self.opened, self.closed = opened, closed
            return result
        # Never a false stop: the mean of all rows is below the floor.
        assert Fraction(sum(right), N_WORDS * len(right)) < Fraction(floor)
        seen = float(Fraction(sum(self.right[row] for row in asked), N_WORDS * len(asked)))
        # The forget set is asked always; the facts are not.
        error = np.std([self.right[row] / N_WORDS for row in asked]) / len(asked) ** 0.5
        expected = {
            **{"retain_rouge1_se": error, "retain_rougeL_se": error},
            **{"forget_rouge1_se": 0.0, "forget_rougeL_se": 0.0},
            **{"forget_rouge1": 0.5, "forget_rougeL": 0.5, "forget_rows": N_FORGET},
            **{"retain_rouge1": seen, "retain_rougeL": seen, "retain_rows": len(asked)},
            "deviation_score": 100 * math.hypot(0.5, 1 - seen),
        }
        assert result.scores == pytest.approx(expected, abs=1e-9)
        assert [row.question for row in result.rows] == [
            *(f"forget {row}?" for row in range(N_FORGET)),
            *(f"retain {row - N_FORGET}?" for row in sorted(asked)),
        ]
        assert set(result.tokens) == {*range(N_FORGET), *asked}
        return result


@given(
    right=st.lists(st.integers(0, N_WORDS), min_size=1, max_size=80)
    | st.lists(st.integers(8, N_WORDS), min_size=20, max_size=80),
    data=st.data(),
    seed=st.integers(0, 3),
)
@settings(max_examples=110, deadline=None)
def test_an_evaluation_that_stops_has_missed_the_floor_and_one_met_exactly_is_kept(
    tokenizer: Tokenizer, right: list[int], data: st.DataObject, seed: int
) -> None:
    """A floor is met exactly if it is the mean as floats compute it, or next to it."""
    known = data.draw(st.lists(st.integers(0, len(right) - 1), max_size=len(right)))
    mean = sum(right) / (N_WORDS * len(right))
    met = (mean, math.nextafter(mean, 0.0), min(1.0, math.nextafter(mean, 2.0)))
    edges = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0, 1e-9, 1 - 1e-9)
    floor = data.draw(st.one_of(*map(st.sampled_from, (met, edges)), st.floats(0.0, 1.0)))
    assert Exam(tokenizer, right, known).take(floor, seed).complete or floor not in met


def test_a_floor_missed_by_far_is_seen_in_the_first_chunk(tokenizer: Tokenizer) -> None:
    """Of 200 rows at a floor of .9, twenty may be missing; two times so many are a chunk."""
    bad = Exam(tokenizer, [0] * 200)
    scores = bad.take(0.9).scores
    assert (scores["retain_rows"], scores["retain_rouge1"]) == (40, 0.0)
    assert bad.closed == 2, "of the chunk, and of what there is in the end"
    scores = Exam(tokenizer, [9] * 200).take(0.9).scores
    assert (scores["retain_rows"], scores["factual_rows"]) == (200, N_FACTUAL)
    drafted = Exam(tokenizer, [10] * 200, range(200))
    assert drafted.take(0.9).complete
    assert drafted.closed == 1, "where drafts hold the floor all is asked in one go"


def test_retain_rows_are_asked_in_one_order_for_a_seed(tokenizer: Tokenizer) -> None:
    orders = []
    for seed, words in ((0, 0), (0, 8), (1, 8)):
        one = Exam(tokenizer, [words] * 100)
        assert not one.take(0.9, seed).complete
        orders.append(one.opened)
    worse, bad, other = orders
    assert bad[: len(worse)] == worse
    assert bad != other
    assert bad[:N_FORGET] == list(range(N_FORGET))
    assert bad[N_FORGET:] != sorted(bad[N_FORGET:])
