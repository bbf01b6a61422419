"""Answers from kept streams are those of transformers' own `generate`, row by row."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lunar_tune.engine import answering as answering_module
from lunar_tune.engine import slot_decoding as decoding_module
from lunar_tune.engine.answering import Answerer, choose_tokens
from lunar_tune.engine.decoding import AnswerRules
from lunar_tune.engine.prompt_activations import ActivationSource, PromptActivations
from lunar_tune.engine.slot_decoding import REMEMBERED, Guesser, SlotCache
from lunar_tune.methods.lunar.method import edited
from lunar_tune.models.device import BatchSize
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]
Rows = dict[int, list[int]]

# Prompts that share beginnings, one of them the beginning of two others, one of a single token.
PROMPTS = (
    (1, 17, 40, 11),
    (1, 17, 40),
    (1, 17, 40, 30, 31, 32),
    (1, 9),
    (1, 60, 61, 62, 63, 64, 65, 66, 67),
    (5,),
    (1, 200, 17, 17, 250, 31),
)
BUDGET, LONGEST = 24, 40
CASES: list[tuple[str, dict[str, Any], int | None]] = [
    *((family, {}, layer) for family in LAYOUTS for layer in (0, 1, 2, None)),
    ("mistral", {"sliding_window": 64}, 1),  # longer than any row
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, 0),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, 1),
]
NEVER = (320,)  # beyond the vocabulary: nothing ever ends


def new_weights(loaded: LoadedModel, *layers: int) -> dict[int, Tensor]:
    """Return a down-projection for each layer that is far from the model's own."""
    weights = {}
    for layer in layers:
        weight = loaded.layout.down_projection_of(loaded.model, layer).weight
        generator = torch.Generator().manual_seed(layer)
        weights[layer] = weight + 0.3 * torch.randn(weight.shape, generator=generator)
    return weights


_generated: dict[tuple[str, tuple[int, ...], int], list[list[int]]] = {}


def said(loaded: LoadedModel, *layers: int, budget: int = LONGEST) -> list[list[int]]:
    """Return each answer of the model with `new_weights`, as generated, once for all tests."""
    key = (loaded.spec.source, layers, budget)
    if key not in _generated:
        _generated[key] = generated(loaded, new_weights(loaded, *layers), budget=budget)
    return _generated[key]


def generated(
    loaded: LoadedModel,
    weights: Mapping[int, Tensor],
    *,
    eos: Sequence[int] = (),
    budget: int = LONGEST,
    alone: bool = False,
) -> list[list[int]]:
    """Return what transformers generates with a copy of the model that is edited by hand."""
    model: Any = copy.deepcopy(loaded.model)
    for layer, weight in weights.items():
        model.model.layers[layer].mlp.down_proj.weight.copy_(weight)
    answers = []
    for prompts in [[prompt] for prompt in PROMPTS] if alone else [PROMPTS]:
        width = max(map(len, prompts))
        ids = model.generate(
            input_ids=torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
            do_sample=False,
            max_new_tokens=budget,
            pad_token_id=0,
            eos_token_id=list(eos) or None,
        )
        answers += [cut(row, eos, budget) for row in ids[:, width:].tolist()]
    return answers


def cut_all(answers: Sequence[Sequence[int]], eos: Sequence[int], budget: int) -> list[list[int]]:
    return [cut(row, eos, budget) for row in answers]


def cut(answer: Sequence[int], eos: Sequence[int], budget: int) -> list[int]:
    """Return an answer to its budget or to before its first end-of-sequence token."""
    within = list(answer[:budget])
    return within[: next((i for i, token in enumerate(within) if token in eos), len(within))]


def ends_of(answers: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return ids that end these answers at different lengths, the first of them at once."""
    return tuple(sorted({2, answers[0][0], answers[2][3], answers[3][9], answers[4][17]}))


def answerer(
    loaded: LoadedModel,
    *,
    drafts: Sequence[Sequence[int]] | None = None,
    batch_size: int | None = None,
    deepest: int = 2,
) -> Answerer:
    known = None
    if drafts is not None:
        known = {p: tuple(d) for p, d in zip(PROMPTS, drafts, strict=True)}
    activations = PromptActivations(ActivationSource(loaded), PROMPTS, drafts=known)
    made = Answerer(activations, deepest=deepest)
    if batch_size is not None:
        size = BatchSize(batch_size, "the answers")
        vars(made)["decode_size"] = lambda _max_new_tokens: size
    made.prepare()
    return made


def answers_of(
    made: Answerer,
    weights: Mapping[int, Tensor],
    *,
    budget: int = BUDGET,
    edited_layer: int | None = -1,
    groups: Sequence[Sequence[int]] = (tuple(range(len(PROMPTS))),),
) -> list[list[int]]:
    """Return all rows' answers, opened group after group."""
    if edited_layer == -1:
        edited_layer = min(weights, default=None)
    rules = AnswerRules(edited_layer=edited_layer, max_new_tokens=budget)
    if edited_layer is not None:
        made.activations.reads(edited_layer)  # of the base model, as a fit asks for them
    with edited(made.loaded, weights):
        run = made.begin(rules)
        known: Rows = {}
        for group in groups:
            known |= run.open(group)
        answers = run.close()
    assert sorted(answers) == sorted(row for group in groups for row in group)
    assert all(answers[row] == tokens for row, tokens in known.items())
    return [list(answers[row]) for row in sorted(answers)]


def with_eos(loaded: LoadedModel, eos: Sequence[int]) -> LoadedModel:
    return dataclasses.replace(loaded, eos_ids=tuple(eos))


@pytest.mark.parametrize(
    ("family", "changes", "layer"),
    CASES,
    ids=["-".join((family, *changes, str(layer))) for family, changes, layer in CASES],
)
def test_answers_are_those_of_generate_on_the_edited_model(
    loaded: Load,
    unchanged: Callable[[Any], None],
    family: str,
    changes: dict[str, Any],
    layer: int | None,
) -> None:
    """Without drafts to the budget; with those of the base model to other ends."""
    model = loaded(family, **changes)
    unchanged(model.model)
    layers = [] if layer is None else [layer]
    weights, expected = new_weights(model, *layers), said(model, *layers, budget=BUDGET)
    whole = answers_of(answerer(with_eos(model, NEVER)), weights)
    assert whole == cut_all(expected, NEVER, BUDGET)
    eos = ends_of(expected)
    drafts = cut_all(said(model, budget=BUDGET), eos, 10)
    short = answers_of(answerer(with_eos(model, eos), drafts=drafts), weights)
    assert short == cut_all(expected, eos, BUDGET)
    assert len({len(row) for row in short}) >= 4


def test_rows_on_their_own_and_with_ends_and_budgets_of_generate_itself(loaded: Load) -> None:
    model = loaded("qwen2")
    weights = new_weights(model, 1)
    eos = ends_of(said(model, 1))
    made = answerer(with_eos(model, eos))
    for budget in (1, 12, BUDGET):
        expected = generated(model, weights, eos=eos, budget=budget, alone=True)
        assert expected == cut_all(said(model, 1), eos, budget)
        assert answers_of(made, weights, budget=budget) == expected


def drafts_like(kind: str, answers: Sequence[Sequence[int]], eos: int) -> list[list[int]]:
    """Return drafts for answers: right, wrong, wrong from somewhere on, of all lengths."""
    shuffled = random.Random(kind)
    wrong = [[shuffled.randrange(3, 319) for _ in row] for row in answers]
    places = range(len(answers))
    kinds: dict[str, Callable[[int], Sequence[int]]] = {
        "right": lambda i: answers[i],
        "right at first": lambda i: [*answers[i][: 2 + i], *wrong[i][2 + i :]],
        "wrong": lambda i: wrong[i],
        "wrong at first": lambda i: [wrong[i][0], *answers[i][1:]],
        "wrong once": lambda i: [*answers[i][:5], (answers[i][5] + 1) % 300, *answers[i][6:]],
        "another row's": lambda i: answers[i - 1],
        "some": lambda i: answers[i][: 5 * i] if i % 2 else (),
        "one token": lambda i: answers[i][:1],
        "with an end inside": lambda i: [*answers[i][:3], eos, *answers[i][3:]],
    }
    return [list(kinds[kind](i)) for i in places]


KINDS = (
    "right",
    "right at first",
    "wrong",
    "wrong at first",
    "wrong once",
    "another row's",
    "some",
    "one token",
    "with an end inside",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_changes_no_answer_whatever_it_says(loaded: Load, kind: str) -> None:
    model = loaded("llama")
    weights, expected = new_weights(model, 1), said(model, 1)
    eos = ends_of(expected)
    for ends, budgets in ((NEVER, (1, 5, BUDGET)), (eos, (11, BUDGET))):
        made = answerer(with_eos(model, ends), drafts=drafts_like(kind, expected, ends[0] % 320))
        for budget in budgets:
            answers = answers_of(made, weights, budget=budget)
            assert answers == cut_all(expected, ends, budget)


def test_every_budget_gives_so_many_tokens(loaded: Load) -> None:
    """The drafts are right for 30 tokens and more, so that few are decoded one by one."""
    model = with_eos(loaded("qwen3"), NEVER)
    weights, expected = new_weights(model, 0), said(model, 0)
    made = answerer(model, drafts=[row[: 30 + i] for i, row in enumerate(expected)])
    for budget in range(1, LONGEST + 1):
        assert answers_of(made, weights, budget=budget) == cut_all(expected, NEVER, budget)


def test_drafts_that_are_right_to_the_end_leave_nothing_to_decode(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("mistral")
    weights, expected = new_weights(model, 1), said(model, 1)
    eos = ends_of(expected)
    short = cut_all(expected, eos, BUDGET)
    made = answerer(with_eos(model, eos), drafts=short)
    monkeypatch.setattr(made, "decode_size", lambda _: pytest.fail("something is decoded"))
    assert answers_of(made, weights) == short
    with edited(model, weights):  # whose reads are there already
        known = made.begin(AnswerRules(edited_layer=1, max_new_tokens=BUDGET)).open([2, 4])
    assert known == {2: short[2], 4: short[4]}


@pytest.mark.parametrize("batch_size", [1, 2, None])
@pytest.mark.parametrize(("look", "reading"), [(1, 4), (3, 1), (5, 2)])
def test_an_answer_depends_neither_on_batches_nor_on_when_ended_rows_leave(
    loaded: Load,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int | None,
    look: int,
    reading: int,
) -> None:
    monkeypatch.setitem(decoding_module.STEPS_PER_LOOK, "cpu", look)
    monkeypatch.setattr(decoding_module, "STEPS_PER_READING", reading)
    model = loaded("qwen2")
    weights, expected = new_weights(model, 1), said(model, 1)
    eos = ends_of(expected)
    drafts = drafts_like("right at first", expected, 2)
    made = answerer(with_eos(model, eos), drafts=drafts, batch_size=batch_size)
    assert answers_of(made, weights) == cut_all(expected, eos, BUDGET)


@pytest.mark.parametrize(
    ("family", "layer"), [("gemma", 0), ("gemma", 1), ("gemma", 2), ("phi3", 1), ("phi3", None)]
)
@pytest.mark.parametrize(
    ("share", "first_slots"), [(0.0, 1), (0.0, 64), (answering_module.KEYS_SHARE, 1)]
)
def test_keys_that_do_not_fit_are_computed_again_and_caches_grow(  # noqa: PLR0917
    loaded: Load,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    layer: int | None,
    share: float,
    first_slots: int,
) -> None:
    grown: list[int] = []
    grow = SlotCache.grow

    def counting(cache: SlotCache, slots: int) -> None:
        grown.append(slots)
        grow(cache, slots)

    monkeypatch.setattr(answering_module, "KEYS_SHARE", share)
    monkeypatch.setattr(answering_module, "FIRST_SLOTS", first_slots)
    monkeypatch.setattr(SlotCache, "grow", counting)
    model = loaded(family)
    layers = [] if layer is None else [layer]
    weights, expected = new_weights(model, *layers), said(model, *layers)
    eos = ends_of(expected)
    drafts = drafts_like("right at first", expected, 2)
    made = answerer(with_eos(model, eos), drafts=drafts, batch_size=4)
    assert (made.kept_keys is None) == (share == 0)
    assert answers_of(made, weights) == cut_all(expected, eos, BUDGET)
    assert bool(grown) == (first_slots == 1)


@pytest.mark.parametrize("share", [0.0, answering_module.KEYS_SHARE])
@pytest.mark.parametrize("layers", [(0, 2), (1, 2), (0, 1, 2)])
def test_several_edited_blocks_are_answered_from_above_the_lowest(
    loaded: Load, monkeypatch: pytest.MonkeyPatch, layers: tuple[int, ...], share: float
) -> None:
    monkeypatch.setattr(answering_module, "KEYS_SHARE", share)
    model = with_eos(loaded("qwen3"), NEVER)
    expected = said(model, *layers)
    assert expected != said(model, layers[0])
    made = answerer(model, drafts=drafts_like("right at first", expected, 2))
    assert answers_of(made, new_weights(model, *layers)) == cut_all(expected, NEVER, BUDGET)


def test_a_method_that_promises_nothing_is_answered_from_the_first_block_on(loaded: Load) -> None:
    model = with_eos(loaded("llama"), NEVER)
    answers = answers_of(answerer(model), new_weights(model, 1), edited_layer=None)
    assert answers == cut_all(said(model, 1), NEVER, BUDGET)


def test_a_trials_answers_do_not_depend_on_the_trials_before(loaded: Load) -> None:
    model = with_eos(loaded("qwen2"), NEVER)
    made = answerer(model, drafts=cut_all(said(model), NEVER, 7))
    for layers in ([2], [0], [], [2], [1]):
        answers = answers_of(made, new_weights(model, *layers))
        assert answers == cut_all(said(model, *layers), NEVER, BUDGET)


@pytest.mark.parametrize("seed", range(8))
def test_rows_may_be_opened_in_any_groups(loaded: Load, seed: int) -> None:
    """All else is drawn too: block, draft, budget, ends, batches."""
    drawn = random.Random(seed)
    model = loaded(drawn.choice(list(LAYOUTS)))
    layers = drawn.choice([[0], [1], [2], []])
    weights, expected = new_weights(model, *layers), said(model, *layers)
    eos = drawn.choice([NEVER, ends_of(expected)])
    made = answerer(
        with_eos(model, eos),
        drafts=drafts_like(drawn.choice(KINDS), expected, eos[0] % 320),
        batch_size=drawn.choice([2, 3, None]),
    )
    for _ in range(3):
        rows = drawn.sample(range(len(PROMPTS)), drawn.randint(1, len(PROMPTS)))
        marks = sorted(drawn.choices(range(len(rows) + 1), k=2))
        groups = [rows[: marks[0]], rows[marks[0] : marks[1]], rows[marks[1] :]]
        budget = drawn.randint(1, BUDGET)
        answers = answers_of(made, weights, budget=budget, groups=groups)
        assert answers == [cut(expected[row], eos, budget) for row in sorted(rows)]


def test_a_row_opened_after_others_were_closed_is_answered_as_ever(loaded: Load) -> None:
    model = with_eos(loaded("llama"), NEVER)
    expected = cut_all(said(model, 1), NEVER, BUDGET)
    made = answerer(model, drafts=drafts_like("right at first", expected, 2))
    made.activations.reads(1)
    with edited(model, new_weights(model, 1)):
        run = made.begin(AnswerRules(edited_layer=1, max_new_tokens=BUDGET))
        run.open([1, 4])
        assert run.close() == {1: expected[1], 4: expected[4]}
        run.open([])
        run.open([0, 2, 6])
        assert run.close() == {row: expected[row] for row in (0, 1, 2, 4, 6)}
        assert run.close() == {row: expected[row] for row in (0, 1, 2, 4, 6)}


@pytest.mark.parametrize("at_once", [1, 1000, 2**27])
def test_tokens_are_chosen_alike_whatever_number_of_logits_is_held(
    loaded: Load, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(answering_module, "LOGITS_AT_ONCE", at_once)
    model = loaded("llama")
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    expected = (hidden @ model.model.lm_head.weight.T).argmax(1)
    assert torch.equal(choose_tokens(model, hidden), expected)


# Guesses


def test_a_guess_goes_on_as_most_known_answers_that_said_the_same_did() -> None:
    guesser = Guesser([(5, 6, 7, 8), (5, 6, 7, 8), (5, 6, 9), (4, 6, 1)])
    assert guesser.guess(0, [5, 6], 10) == [7, 8]
    assert guesser.guess(0, [5, 6], 1) == [7]
    assert guesser.guess(0, [1, 2, 5, 6], 10) == [7, 8]
    assert guesser.guess(0, [6, 7], 10) == [8]


def test_at_an_answers_beginning_one_token_says_enough() -> None:
    guesser = Guesser([(5, 6, 7), (4, 6, 1), (4, 6, 1)])
    assert guesser.guess(0, [5], 10) == [6, 7]
    assert guesser.guess(0, [4], 10) == [6, 1]
    assert guesser.guess(0, [6], 10) == []  # stands in answers, but not at the beginning


def test_what_was_never_said_gives_no_guess() -> None:
    guesser = Guesser([(5, 6, 7)])
    assert guesser.guess(0, [6, 5], 10) == []
    assert guesser.guess(0, [9], 10) == []
    assert Guesser([]).guess(0, [5, 6], 10) == []
    assert Guesser([(), (5,)]).guess(0, [5], 10) == []


@pytest.mark.parametrize("period", [1, 2, 3, 7, 16])
def test_a_repetition_is_guessed_to_go_on(period: int) -> None:
    unit = list(range(30, 30 + period))
    said = [1, 2, *unit, *unit, *unit, *unit]
    assert Guesser([]).guess(0, said, 40) == (unit * 40)[:40]
    started = [*said, *unit[: period // 2]]
    assert Guesser([]).guess(0, started, 5) == (unit[period // 2 :] + unit * 5)[:5]


def test_a_few_equal_tokens_and_long_periods_are_no_repetition() -> None:
    guesser = Guesser([])
    assert guesser.guess(0, [3, 3, 3], 5) == []  # three: the fourth may end it
    assert guesser.guess(0, [3, 3, 3, 3], 5) == [3] * 5
    assert guesser.guess(0, list(range(17)) * 3, 5) == []
    assert guesser.guess(0, [7, 8, 7], 5) == []


def test_what_a_question_was_answered_before_is_guessed_first_the_latest_before_all() -> None:
    guesser = Guesser([(1, 2, 3, 4)])
    assert guesser.guess(5, [1, 2], 9) == [3, 4]
    for answer in ([1, 2, 7, 7], [1, 2, 8], [9, 9]):
        guesser.remember(5, answer)
    assert guesser.guess(5, [1, 2], 9) == [8]
    assert guesser.guess(5, [1, 2, 7], 9) == [7]
    assert guesser.guess(5, [1, 2, 8], 9) == []  # it ended there, and there is no third token
    assert guesser.guess(6, [1, 2], 9) == [3, 4]  # another question
    guesser.remember(5, [1, 2, 7, 7])
    assert guesser.guess(5, [1, 2], 1) == [7]
    for token in range(20, 20 + REMEMBERED):
        guesser.remember(5, [token, token])
    assert guesser.guess(5, [1, 2], 9) == [3, 4]  # forgotten again


class Oracle(Guesser):
    """Knows what the model is going to say, and tells it as its kind does."""

    def __init__(self, kind: str, answers: Sequence[Sequence[int]]) -> None:
        super().__init__([])
        self._kind, self._known = kind, answers
        self.asked = 0

    def guess(self, row: int, said: Sequence[int], length: int) -> list[int]:  # noqa: ARG002
        """Return what follows `said` in the known answer that begins with it."""
        self.asked += 1
        rest = next(row[len(said) :] for row in self._known if row[: len(said)] == list(said))
        if self._kind == "wrong":
            return [(token + 1) % 300 for token in rest[:length]]
        if self._kind == "right at first":
            return [*rest[:2], *[(token + 1) % 300 for token in rest[2:length]]]
        if self._kind == "of some rows" and said[0] % 2:
            return []
        if self._kind == "of all lengths":
            return rest[: said[-1] % (length + 1)]
        return rest[:length]


GUESSES = ("right", "wrong", "right at first", "of some rows", "of all lengths")


@pytest.mark.parametrize("kind", GUESSES)
@pytest.mark.parametrize("first_slots", [4, 64])
def test_guesses_right_or_wrong_change_no_answer(
    loaded: Load, monkeypatch: pytest.MonkeyPatch, first_slots: int, kind: str
) -> None:
    monkeypatch.setitem(decoding_module.TOKENS_PER_GUESS, "cpu", 4096)
    monkeypatch.setattr(decoding_module, "SHARE_WITH_GUESS", 0.01)
    monkeypatch.setattr(answering_module, "FIRST_SLOTS", first_slots)
    model = loaded("llama")
    weights, expected = new_weights(model, 1), said(model, 1)
    for eos in (NEVER, ends_of(expected)):
        made = answerer(with_eos(model, eos))
        made.guesser = oracle = Oracle(kind, expected)
        for budget in (2, BUDGET):
            assert answers_of(made, weights, budget=budget) == cut_all(expected, eos, budget)
        assert oracle.asked


def test_right_guesses_save_forwards_and_wrong_ones_cost_none(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards of the whole model are those of decoding; prompts go through the decoder alone.

    One after the other, the 23 tokens after the first take 23 forwards. Right guesses give 1 + 8
    tokens, then the last 14 of 1 + 16.
    """
    monkeypatch.setitem(decoding_module.TOKENS_PER_GUESS, "cpu", 4096)
    model = with_eos(loaded("llama"), NEVER)
    weights, expected = new_weights(model, 1), said(model, 1)
    made = answerer(model)
    forwards: list[int] = []
    handle = model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    counts = []
    try:
        for kind in ("right", "wrong"):
            made.guesser = Oracle(kind, expected)
            forwards.clear()
            assert answers_of(made, weights) == cut_all(expected, NEVER, BUDGET)
            counts.append(len(forwards))
    finally:
        handle.remove()
    assert counts == [2, 23]


def test_answers_that_loop_are_those_of_generate(loaded: Load) -> None:
    """With small random weights a model soon says the same again and again."""
    model = with_eos(loaded("qwen2", initializer_range=0.05), NEVER)
    weights = {1: torch.zeros_like(new_weights(model, 1)[1])}
    expected = generated(model, weights, budget=70)
    made = answerer(model)
    right = [
        any(made.guesser.guess(0, row[:n], 10) == row[n : n + 10] for n in range(4, 60))
        for row in expected
    ]
    assert sum(right) >= 3
    for budget in (33, 70):
        assert answers_of(made, weights, budget=budget) == cut_all(expected, NEVER, budget)
