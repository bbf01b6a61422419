"""Answers from kept streams are those of `generate`, whatever is kept; families: test_families."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import Mock

import engine_cases as cases
import pytest
from random_models import FAMILIES

from lunar_tune.engine import answering, slot_decoding
from lunar_tune.engine.decoding import AnswerRules, generate_tokens, token_budget
from lunar_tune.engine.slot_decoding import REMEMBERED, Guesser
from lunar_tune.methods.lunar.method import edited
from lunar_tune.models.device import DeviceMemory
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]
BUDGET, LONGEST = 14, 24
_said: dict[tuple[str, tuple[int, ...]], list[list[int]]] = {}


def said(loaded: LoadedModel, *layers: int) -> list[list[int]]:
    key = (loaded.spec.source, layers)
    if key not in _said:
        by_hand = cases.edited_by_hand(loaded, cases.new_weights(loaded, *layers))
        _said[key] = cases.generated(by_hand, cases.PROMPTS, budget=LONGEST)
    return _said[key]


KINDS: dict[str, Callable[[list[list[int]], list[list[int]], int, int], Sequence[int]]] = {
    "right at first": lambda answers, wrong, _, i: [*answers[i][: 2 + i], *wrong[i][2 + i :]],
    "wrong at first": lambda answers, wrong, _, i: [wrong[i][0], *answers[i][1:]],
    "wrong once": lambda answers, wrong, _, i: [*answers[i][:5], wrong[i][5], *answers[i][6:]],
    "another row's": lambda answers, _, _eos, i: answers[i - 1],
    "some": lambda answers, _, _eos, i: answers[i][: 5 * i] if i % 2 else (),
    "with an end inside": lambda answers, _, eos, i: [*answers[i][:3], eos, *answers[i][3:]],
}


def drafts_like(kind: str, answers: list[list[int]], eos: int = 2) -> list[list[int]]:
    """Return drafts for answers: right, wrong, wrong from somewhere on, of all lengths."""
    drawn = random.Random(kind)
    wrong = [[(token + drawn.randrange(1, 300)) % 320 for token in row] for row in answers]
    return [list(KINDS[kind](answers, wrong, eos, i)) for i in range(len(answers))]


def test_right_drafts_leave_no_work(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("mistral")
    weights, eos = cases.new_weights(model, 1), cases.ends_of(said(model, 1))
    short = cases.cut_all(said(model, 1), eos, BUDGET)
    made = cases.answerer(cases.with_eos(model, eos), drafts=short)
    monkeypatch.setattr(answering, "SlotDecoding", pytest.fail)
    assert cases.answers_of(made, weights, budget=BUDGET) == short
    with edited(model, weights):  # whose reads are there already
        known = made.begin(AnswerRules(edited_layer=1, max_new_tokens=BUDGET)).open([2, 4])
    assert known == {2: short[2], 4: short[4]}


def test_plain_decoding_ignores_a_penalty(loaded: Load) -> None:
    model = cases.with_eos(loaded("qwen3"), cases.NEVER)
    expected = said(model)
    model.model.generation_config.repetition_penalty = 5.0
    try:
        assert generate_tokens(model, cases.PROMPTS, max_new_tokens=LONGEST) == expected
        assert cases.generated(model.model, cases.PROMPTS, budget=LONGEST) != expected
    finally:
        model.model.generation_config.repetition_penalty = 1.0
    assert generate_tokens(model, [], max_new_tokens=4) == []


def test_a_batch_of_plain_decoding_is_what_memory_holds(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values by hand: 2 of a token and block, times heads, their size and 4 bytes."""
    model, sizes = cases.with_eos(loaded("qwen3"), cases.NEVER), list[int]()
    config, longest = model.model.config, max(map(len, cases.PROMPTS))
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    row = (longest + LONGEST) * keys + 8 * config.vocab_size
    row += longest * 8 * 4 * config.intermediate_size
    answered = partial(generate_tokens, model, cases.PROMPTS, max_new_tokens=LONGEST)
    expected = answered()
    for free, most in ((0, 1), (2 * row - 1, 1), (3 * row, 3)):
        monkeypatch.setattr(DeviceMemory, "free_bytes", lambda _, free=free: free)
        sizes.clear()
        assert answered(on_batch=sizes.append) == expected
        assert (max(sizes), sum(sizes)) == (most, len(cases.PROMPTS))


def test_a_budget_is_twice_the_longest_true_answer_or_32() -> None:
    words, answer = [1, 2], [3] * 20
    assert token_budget(None, [words, answer]) == 40
    assert token_budget(None, [words, words]) == token_budget(None, []) == 32
    assert token_budget(7, [answer]) == 7


@pytest.mark.parametrize("share", [0.0, answering.KEYS_SHARE])
def test_answers_depend_neither_on_trials_before_nor_on_how_many_blocks_change(
    loaded: Load, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(answering, "KEYS_SHARE", share)
    model = cases.with_eos(loaded("qwen3"), cases.NEVER)
    made = cases.answerer(model, drafts=drafts_like("right at first", said(model, 0, 2)))
    for layers in ([2], [0, 2], [], [0, 1, 2], [2]):
        weights, expected = cases.new_weights(model, *layers), said(model, *layers)
        assert cases.answers_of(made, weights, budget=LONGEST) == expected
    assert cases.answers_of(made, weights, budget=LONGEST, edited_layer=None) == expected
    assert said(model, 0, 2) != said(model, 0)


@pytest.mark.parametrize("seed", range(12))
def test_rows_may_be_opened_in_any_groups(
    loaded: Load, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """All else is drawn too: block, draft, budget, ends, batches, what is kept."""
    drawn = random.Random(seed)
    monkeypatch.setattr(answering, "LOGITS_AT_ONCE", drawn.choice([1, 1000, 2**27]))
    monkeypatch.setattr(answering, "KEYS_SHARE", drawn.choice([0.0, 0.5]))
    monkeypatch.setattr(answering, "FIRST_SLOTS", drawn.choice([1, 4, 64]))
    monkeypatch.setitem(slot_decoding.STEPS_PER_LOOK, "cpu", drawn.choice([1, 3, 100]))
    monkeypatch.setattr(slot_decoding, "STEPS_PER_READING", drawn.choice([1, 2, 4]))
    model = loaded(drawn.choice(FAMILIES))
    layers = drawn.choice([[0], [1], [2], []])
    weights, expected = cases.new_weights(model, *layers), said(model, *layers)
    eos = drawn.choice([cases.NEVER, cases.ends_of(expected)])
    made = cases.answerer(
        cases.with_eos(model, eos),
        drafts=drafts_like(drawn.choice(list(KINDS)), expected, eos[0] % 320),
        batch_size=drawn.choice([1, 2, 3, None]),
    )
    for _ in range(3):
        rows = drawn.sample(range(len(cases.PROMPTS)), drawn.randint(1, len(cases.PROMPTS)))
        marks = sorted(drawn.choices(range(len(rows) + 1), k=2))
        groups = [rows[: marks[0]], rows[marks[0] : marks[1]], rows[marks[1] :]]
        budget = drawn.randint(1, BUDGET)
        answers = cases.answers_of(made, weights, budget=budget, groups=groups)
        assert answers == cases.cut_all([expected[row] for row in sorted(rows)], eos, budget)


def test_a_guess_goes_on_as_most_known_answers_did_or_as_a_repetition() -> None:
    guesser = Guesser([(5, 6, 7, 8), (5, 6, 7, 8), (5, 6, 9), (4, 6, 1)])
    for said_before, length, guess in (
        *(([5, 6], 10, [7, 8]), ([5, 6], 1, [7]), ([1, 2, 5, 6], 10, [7, 8]), ([6, 7], 10, [8])),
        # At an answer's beginning one token says enough, if it stood at a beginning.
        *(([5], 10, [6, 7, 8]), ([4], 10, [6, 1]), ([6], 10, [])),
        *(([6, 5], 10, []), ([9], 10, [])),  # was never said
        *((4 * unit + unit[:2], 5, (5 * unit)[2:7]) for unit in ([31, 32], [31, 32, 33])),
        *((none, 5, []) for none in ([3, 3, 3], [*range(17)] * 3)),  # few, long
    ):
        assert guesser.guess(0, said_before, length) == guess
    assert Guesser([]).guess(0, [5, 6], 10) == Guesser([(), (5,)]).guess(0, [5], 10) == []


def test_what_a_question_was_answered_before_is_guessed_first() -> None:
    guesser = Guesser([(1, 2, 3, 4)])
    for answer in ([1, 2, 7, 7], [1, 2, 8], [9, 9]):
        guesser.remember(5, answer)
    assert guesser.guess(5, [1, 2], 9) == [8], "the latest"
    assert guesser.guess(5, [1, 2, 7], 9) == [7]
    assert guesser.guess(5, [1, 2, 8], 9) == [], "it ended there, and there is no third token"
    assert guesser.guess(6, [1, 2], 9) == [3, 4], "another question"
    for token in range(20, 20 + REMEMBERED):
        guesser.remember(5, [token, token])
    assert guesser.guess(5, [1, 2], 9) == [3, 4], "forgotten again"


class Oracle(Guesser):
    """Knows what the model is going to say, and tells so many tokens of it before wrong ones."""

    def __init__(self, right: int, answers: Sequence[Sequence[int]]) -> None:
        super().__init__([])
        self._right, self._known = right, answers

    def guess(self, row: int, said: Sequence[int], length: int) -> list[int]:  # noqa: ARG002
        """Return what follows `said` in the known answer that begins with it."""
        rest = next(row[len(said) :] for row in self._known if row[: len(said)] == list(said))
        if self._right < 0:  # of some rows, of all lengths
            return [] if said[0] % 2 else rest[: said[-1] % (length + 1)]
        wrong = [(token + 1) % 300 for token in rest[self._right : length]]
        return [*rest[: min(self._right, length)], *wrong]


@pytest.mark.parametrize("right", [100, 2, -1])
def test_guesses_right_or_wrong_change_no_answer(
    loaded: Load, monkeypatch: pytest.MonkeyPatch, right: int
) -> None:
    monkeypatch.setitem(slot_decoding.TOKENS_PER_GUESS, "cpu", 4096)
    monkeypatch.setattr(slot_decoding, "SHARE_WITH_GUESS", 0.01)
    model = loaded("llama")
    weights, expected = cases.new_weights(model, 1), said(model, 1)
    for eos, first_slots in ((cases.NEVER, 4), (cases.ends_of(expected), 64)):
        monkeypatch.setattr(answering, "FIRST_SLOTS", first_slots)
        made = cases.answerer(cases.with_eos(model, eos))
        made.guesser = Oracle(right, expected)
        for budget in (2, BUDGET):
            answers = cases.cut_all(expected, eos, budget)
            assert cases.answers_of(made, weights, budget=budget) == answers


def test_right_guesses_save_forwards(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of the whole model are those of decoding; prompts go through the decoder alone.

    The 23 tokens after the first take 23 forwards, or two of 1 + 8 and 14 of 1 + 16 if guessed.
    """
    monkeypatch.setitem(slot_decoding.TOKENS_PER_GUESS, "cpu", 4096)
    model = cases.with_eos(loaded("llama"), cases.NEVER)
    weights, expected = cases.new_weights(model, 1), said(model, 1)
    made, forwards = cases.answerer(model), Mock(return_value=None)
    with model.model.register_forward_pre_hook(forwards):
        for right, count in ((100, 2), (0, 23)):
            made.guesser = Oracle(right, expected)
            forwards.reset_mock()
            assert cases.answers_of(made, weights, budget=24) == expected
            assert forwards.call_count == count
