"""Greedy answers are those of `generate`, row by row, whatever else is in the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lunar_tune.engine import decoding as decoding_module
from lunar_tune.engine.decoding import generate_tokens, token_budget
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]

PROMPTS = [
    [1, 17, 40, 11],
    [1, 9],
    [1, 60, 61, 62, 63, 64, 65, 66, 67],
    [5],
    [1, 200, 17, 17, 250, 31],
    [1, 101, 102, 103],
]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in LAYOUTS),
    ("mistral", {"sliding_window": 4}),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
]


def generated(
    loaded: LoadedModel, prompts: list[list[int]], budget: int, **options: Any
) -> list[list[int]]:
    """Return the new tokens of transformers' own greedy decoding of one left-padded batch."""
    width = max(map(len, prompts))
    model: Any = loaded.model
    with torch.no_grad():
        ids = model.generate(
            input_ids=torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
            do_sample=False,
            max_new_tokens=budget,
            pad_token_id=0,
            eos_token_id=list(loaded.eos_ids),
            **options,
        )
    rows = ids[:, width:].tolist()
    ends = [[i for i, token in enumerate(row) if token in loaded.eos_ids] for row in rows]
    return [row[: end[0]] if end else row for row, end in zip(rows, ends, strict=True)]


def text_of(loaded: LoadedModel, rows: list[list[int]]) -> list[str]:
    return loaded.tokenizer.batch_decode(rows, skip_special_tokens=True)


def answers_to(
    loaded: LoadedModel, prompts: list[list[int]], budget: int = 12, **settings: Any
) -> list[str]:
    return text_of(loaded, generate_tokens(loaded, prompts, max_new_tokens=budget, **settings))


def stopping_early(loaded: LoadedModel, budget: int = 12) -> LoadedModel:
    """Return the model with end-of-sequence ids that end its answers at different lengths."""
    never = dataclasses.replace(loaded, eos_ids=(2,))
    first, second, *_ = generated(never, PROMPTS, budget)
    return dataclasses.replace(loaded, eos_ids=tuple(sorted({2, first[3], second[7]})))


@pytest.mark.parametrize(
    ("family", "changes"),
    VARIANTS,
    ids=["-".join((family, *changes)) for family, changes in VARIANTS],
)
def test_answers_are_those_of_generate_with_left_padding(
    loaded: Load, family: str, changes: dict[str, Any]
) -> None:
    model = stopping_early(loaded(family, **changes))
    expected = generated(model, PROMPTS, 12)
    assert len({len(row) for row in expected}) > 1
    assert answers_to(model, PROMPTS) == text_of(model, expected)


@pytest.mark.parametrize("size", [1, 2, 4, None])
@pytest.mark.parametrize("look", [1, 3, 100])
def test_an_answer_depends_neither_on_its_neighbours_nor_on_when_ended_rows_leave(
    loaded: Load, monkeypatch: pytest.MonkeyPatch, size: int | None, look: int
) -> None:
    model = stopping_early(loaded("qwen2"))
    monkeypatch.setitem(decoding_module.STEPS_PER_LOOK, "cpu", look)
    alone = [row for prompt in PROMPTS for row in generated(model, [prompt], 12)]
    assert answers_to(model, PROMPTS, batch_size=size) == text_of(model, alone)


def test_answers_come_in_the_order_of_the_prompts(loaded: Load) -> None:
    model = stopping_early(loaded("llama"))
    forward = answers_to(model, PROMPTS, batch_size=2)
    assert answers_to(model, PROMPTS[::-1], batch_size=2) == forward[::-1]
    assert len(set(forward)) > 1


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_the_token_budget_is_the_longest_answer(loaded: Load, budget: int) -> None:
    model = dataclasses.replace(loaded("llama"), eos_ids=(2,))
    expected = text_of(model, generated(model, PROMPTS, budget))
    assert answers_to(model, PROMPTS, budget) == expected


def test_every_end_of_sequence_id_ends_an_answer_and_is_not_part_of_it(loaded: Load) -> None:
    never = dataclasses.replace(loaded("gemma"), eos_ids=(2,))
    tokens = generated(never, PROMPTS[:1], 8)[0]
    for place in (0, 2, 4):
        model = dataclasses.replace(never, eos_ids=(2, tokens[place]))
        assert answers_to(model, PROMPTS[:1], 8) == text_of(
            model, [tokens[: tokens.index(tokens[place])]]
        )


def test_no_prompts_give_no_answers(loaded: Load) -> None:
    assert generate_tokens(loaded("llama"), [], max_new_tokens=4) == []


def test_the_checkpoints_own_repetition_penalty_is_not_obeyed(loaded: Load) -> None:
    model = stopping_early(loaded("qwen3"))
    plain = text_of(model, generated(model, PROMPTS, 12))
    model.model.generation_config.repetition_penalty = 5.0
    try:
        assert answers_to(model, PROMPTS) == plain
        assert text_of(model, generated(model, PROMPTS, 12)) != plain
    finally:
        model.model.generation_config.repetition_penalty = 1.0


def test_special_tokens_are_left_out_of_an_answer(loaded: Load) -> None:
    model = loaded("llama")
    tokens = [0, 1, 3, *model.tokenizer.encode("hello", add_special_tokens=False)]
    assert text_of(model, [tokens]) == ["hello"]


def test_a_budget_that_is_not_given_is_twice_the_longest_true_answer_or_32(loaded: Load) -> None:
    tokenizer = loaded("llama").tokenizer
    long = "Forty copper kettles and three clocks, to be paid in March. " * 3
    length = len(tokenizer.encode(long, add_special_tokens=False))
    assert length > 16
    assert token_budget(None, tokenizer, ["Yes.", long]) == 2 * length
    assert token_budget(None, tokenizer, ["Yes.", "No."]) == 32
    assert token_budget(None, tokenizer, []) == 32
    assert token_budget(7, tokenizer, [long]) == 7
