"""Steering adds exactly what it is told after one block, and nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lunar_tune.engine.decoding import generate_tokens
from lunar_tune.errors import ModelError
from lunar_tune.methods.lunar.method import steered
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]
IDS = torch.tensor([[1, 17, 40, 11, 60], [1, 9, 9, 200, 31]])
SHIFT = torch.linspace(-3.0, 4.0, 32, dtype=torch.float64)


def streams(loaded: LoadedModel) -> list[torch.Tensor]:
    """Return every block's output, seen by hooks that are there before any other."""
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _i, output: seen.append(output))
        for block in loaded.model.get_submodule("model").layers
    ]
    with torch.no_grad():
        loaded.model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def hooks_of(loaded: LoadedModel) -> int:
    return sum(len(module._forward_hooks) for module in loaded.model.modules())


@pytest.mark.parametrize(("family", "layer"), list(zip(LAYOUTS, [0, 1, 2, 1, 0, 2], strict=True)))
def test_what_the_next_block_reads_is_the_output_and_the_shift_at_every_position(
    loaded: Load, family: str, layer: int, unchanged: Callable[[Any], None]
) -> None:
    model = loaded(family)
    unchanged(model.model)
    before = streams(model)
    with steered(model, layer, SHIFT):
        inside = streams(model)
    # These hooks were there last, so they see what takes the output's place.
    assert torch.equal(inside[layer], before[layer] + SHIFT.float())
    assert all(torch.equal(a, b) for a, b in zip(inside[:layer], before[:layer], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(inside[layer:], before[layer:], strict=True))


def test_logits_are_those_of_a_hook_written_by_hand(loaded: Load) -> None:
    model = loaded("qwen2")

    def by_hand(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + SHIFT.float()[None, None, :]

    handle = model.model.get_submodule("model.layers.1").register_forward_hook(by_hand)
    with torch.no_grad():
        expected = model.model(input_ids=IDS).logits
        handle.remove()
        with steered(model, 1, SHIFT):
            assert torch.equal(model.model(input_ids=IDS).logits, expected)
        assert not torch.allclose(model.model(input_ids=IDS).logits, expected)


def test_generated_tokens_are_moved_too(loaded: Load) -> None:
    """One position at a time, the answer is that of full forwards in which every token is moved."""
    model = loaded("llama")
    with steered(model, 0, SHIFT), torch.no_grad():
        (answer,) = generate_tokens(model, [[1, 17, 40]], max_new_tokens=6)
        ids = [1, 17, 40]
        for _ in range(6):
            ids.append(int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    ends = [i for i, token in enumerate(ids[3:]) if token in model.eos_ids]
    assert answer == ids[3:][: ends[0] if ends else None]


def test_shifts_of_nested_contexts_add_up(loaded: Load) -> None:
    model = loaded("qwen2")
    with steered(model, 1, SHIFT):
        with steered(model, 1, SHIFT):
            twice = streams(model)[1]
        once = streams(model)[1]
    assert torch.equal(once, streams(model)[1] + SHIFT.float())
    assert torch.equal(twice, once + SHIFT.float())


def test_the_model_is_as_it_was_afterwards_also_when_the_body_raises(
    loaded: Load, unchanged: Callable[[Any], None]
) -> None:
    model = loaded("qwen2")
    unchanged(model.model)
    before, hooks = streams(model), hooks_of(model)
    with steered(model, 1, SHIFT):
        assert hooks_of(model) == hooks + 1
    with pytest.raises(RuntimeError, match="of the body"), steered(model, 1, SHIFT):
        raise RuntimeError("of the body")
    assert hooks_of(model) == hooks
    assert all(torch.equal(a, b) for a, b in zip(streams(model), before, strict=True))


@pytest.mark.parametrize("layer", [3, -1])
def test_a_block_that_is_not_there_is_refused(loaded: Load, layer: int) -> None:
    model = loaded("qwen2")
    with pytest.raises(ModelError, match="3 decoder blocks"), steered(model, layer, SHIFT):
        pass


def test_a_shift_of_another_width_is_refused(loaded: Load) -> None:
    """Of width 1 it would be spread over the whole stream."""
    model = loaded("qwen2")
    hooks = hooks_of(model)
    with pytest.raises(ValueError, match="width 32"), steered(model, 0, torch.ones(1)):
        pass
    assert hooks_of(model) == hooks
