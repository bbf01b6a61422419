"""Unverifiable prompts: as many as wanted, all different, new ones for a new seed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.data.invented import generate_unverifiable
from lunar_tune.errors import DataError


def shape(prompt: str) -> str:
    """Return a prompt without the capitalised words after the first, that is its template."""
    first, rest = prompt.split(" ", 1)
    return f"{first} " + re.sub(r"\b[A-Z][a-z]+", "_", rest)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.integers(0, 10_000))
def test_prompts_are_different_questions_of_the_length_of_others(count: int, seed: int) -> None:
    prompts = generate_unverifiable(count, seed=seed)
    assert len(set(prompts)) == len(prompts) == count
    assert all(prompt.endswith("?") and 5 <= len(prompt.split()) <= 14 for prompt in prompts)


def test_the_same_seed_gives_the_same_prompts_and_fewer_are_the_first_of_more() -> None:
    prompts = generate_unverifiable(100, seed=1)
    assert generate_unverifiable(100, seed=1) == prompts
    assert generate_unverifiable(40, seed=1) == prompts[:40]


def test_another_seed_gives_unseen_prompts() -> None:
    assert not set(generate_unverifiable(500, seed=1)) & set(generate_unverifiable(500, seed=2))


def test_at_least_twenty_five_templates_take_turns() -> None:
    shapes = [shape(prompt) for prompt in generate_unverifiable(72, seed=4)]
    assert len(set(shapes)) >= 25
    assert max(shapes.count(one) for one in shapes) == 2


def test_none_is_refused() -> None:
    with pytest.raises(DataError, match="ask for at least 1"):
        generate_unverifiable(0, seed=1)


def test_many_thousands_can_be_had() -> None:
    prompts = generate_unverifiable(20_000, seed=9)
    assert len(set(prompts)) == 20_000
