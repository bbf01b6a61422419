"""Answers that repeat themselves: where they are ended, and that their scores stay."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import Told, sets_of
from transformers import PreTrainedTokenizerFast as Tokenizer

from lunar_tune.engine.decoding import AnswerRules
from lunar_tune.engine.repetition import first_repetition, period_of
from lunar_tune.metrics import settling
from lunar_tune.metrics.evaluate import Evaluator
from lunar_tune.metrics.rouge import rouge_recall
from lunar_tune.metrics.settling import Settling

BUDGET = 60
FEW = st.lists(st.integers(0, 2), max_size=6)


class Plain(Told):
    """Heeds no rules, as an engine that decodes all of an answer."""

    def begin(self, _: AnswerRules) -> Plain:
        self.opened = []
        return self


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "LONGEST_PERIOD", 5)
    monkeypatch.setattr(settling, "LEAST_REPEATED", 8)


@given(FEW, st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(0, 9), FEW)
def test_the_first_repetition_is_the_first_at_the_end_of_a_beginning(
    before: list[int], loop: list[int], times: int, after: list[int]
) -> None:
    said = [*before, *loop * times, *after]
    periods = [period_of(said[:n], longest=4, least=6) for n in range(len(said) + 1)]
    found = next(((n, period) for n, period in enumerate(periods) if period), None)
    assert first_repetition(said, longest=4, least=6) == found
    for n, period in enumerate(periods):
        repeated = said[n - max(5, period) - period : n]
        assert not period or repeated[period:] == repeated[:-period]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_is_cut_scores_as_the_repetition_up_to_the_budget(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Words of a truth may be said by the third period alone: then the answer goes on till then."""
    words = st.lists(st.sampled_from("abcd"), min_size=1, max_size=4)
    truth, begin, loop = (" ".join(data.draw(words)) for _ in range(3))
    said = tokenizer.encode(f"{begin} {f'{loop} ' * BUDGET}", add_special_tokens=False)[:BUDGET]
    if (found := first_repetition(said, longest=5, least=8)) is not None:
        # The first one may be of the beginning with a part of the loop, and be left by the rest.
        end, period = found
        said = (said[:end] + said[end - period : end] * BUDGET)[:BUDGET]
    own = Settling(tokenizer, {0: [truth]}, rouge_tokenizer="default", budget=BUDGET)
    length = own.length(0, said)

    def recall(tokens: Sequence[int]) -> object:
        return rouge_recall(truth, tokenizer.decode(list(tokens), skip_special_tokens=True))

    if length is None:
        assert period_of(said[:-1], longest=5, least=8) == 0 or recall(said[:-1]) != recall(said)
        return
    assert recall(said[:length]) == recall(said)
    # The same, however much of it is there: engines look at different times.
    for n in range(length, BUDGET):
        assert own.length(0, said[:n]) == length
        assert own.done([0], [said[:n]]) == [True]
    assert all(own.length(0, said[:n]) is None for n in range(length))
    left = [*said[: length - 1], max(said) + 1, *said[length:]]
    assert own.length(0, left) != length


def test_ended_answers_are_counted_and_what_the_budget_would_have_cost(
    tokenizer: Tokenizer,
) -> None:
    told = Plain(tokenizer, ["b " * 40, "a c", "d a " * 30])
    sets = sets_of(forget=["a b", "a c"], retain=["a d"])
    whole, ended = (
        Evaluator(told, tokenizer, sets, settle=settle).evaluate(
            edited_layer=2, max_new_tokens=BUDGET
        )
        for settle in (False, True)
    )
    assert ended.scores == whole.scores
    assert (whole.repeating, whole.whole_cost) == ({}, 1.0)
    assert ended.repeating == {"forget": 1, "retain": 1}
    lengths = [len(ended.tokens[row]) for row in range(3)]
    assert [row.ended for row in ended.rows] == [False, True, False]
    assert lengths[1] == len(whole.tokens[1])
    assert max(lengths[0], lengths[2]) < 20
    assert ended.whole_cost == (2 * BUDGET + lengths[1]) / sum(lengths)
