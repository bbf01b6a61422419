"""Activations of prompts: captured once, from memory or disk what a full forward computes."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import PROMPTS, full_forwards

from lunar_tune.engine.activations import ActivationSource, PromptActivations
from lunar_tune.engine.cache import ActivationCache
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]


@pytest.fixture
def model(loaded: Load, unchanged: Callable[[Any], None]) -> LoadedModel:
    unchanged(loaded("qwen2").model)
    return loaded("qwen2")


@contextmanager
def forwards(loaded: LoadedModel) -> Iterator[Counter[int]]:
    """Inside, count how often each block is run."""
    counts: Counter[int] = Counter()
    with ExitStack() as stack:
        for layer, block in enumerate(loaded.layout.blocks_of(loaded.model)):
            stack.enter_context(
                block.register_forward_hook(lambda *_, layer=layer: counts.update([layer]))
            )
        yield counts


def sources(model: LoadedModel, root: Path, limit: float = 1.0) -> ActivationSource:
    return ActivationSource(model, ActivationCache(limit, root))


def assert_right(activations: PromptActivations, layer: int) -> None:
    full = full_forwards(activations.source.loaded.model)
    for found, name in zip(activations.reads(layer), ("inputs", "residual"), strict=True):
        torch.testing.assert_close(found, full[name][layer], rtol=1e-4, atol=1e-4)


def test_a_second_run_reads_from_disk_without_a_sweep(model: LoadedModel, tmp_path: Path) -> None:
    """What remains is the one block that is asked for, run on its kept input."""
    first = sources(model, tmp_path)
    with forwards(model) as counts:
        last = first.last_tokens(PROMPTS)
        activations = PromptActivations(first, PROMPTS, layers=(1, 2))
        kept = {layer: activations.reads(layer) for layer in (1, 2)}
    assert counts[0] == 2, "a sweep for the last tokens and one for both blocks' inputs"
    memory = PromptActivations(ActivationSource(model), PROMPTS, layers=(1, 2))
    assert torch.equal(memory.source.last_tokens(PROMPTS), last)

    second = PromptActivations(sources(model, tmp_path), PROMPTS, layers=(1, 2))
    with forwards(model) as counts:
        assert torch.equal(second.source.last_tokens(PROMPTS), last)
        assert counts == Counter()
        for layer in (2, 1, 2):
            reads = second.reads(layer)
            for found, once, held in zip(reads, kept[layer], memory.reads(layer), strict=True):
                assert torch.equal(found, once)
                assert torch.equal(found, held)
    assert counts == Counter({0: 1, 1: 3, 2: 2}), "those in memory are swept for, once"
    assert_right(second, 1)


def test_layers_that_were_not_announced_or_find_no_room_are_captured_on_demand(
    model: LoadedModel, tmp_path: Path
) -> None:
    for source in (ActivationSource(model), sources(model, tmp_path)):
        activations = PromptActivations(source, PROMPTS, layers=(1,))
        for layer in (1, 2, 0):
            assert_right(activations, layer)
    names = sorted(file.stem for file in tmp_path.rglob("*.safetensors"))
    assert names == ["point-000", "point-001", "point-002"]
    nowhere = sources(model, tmp_path / "none", 0.0)
    activations = PromptActivations(nowhere, PROMPTS, layers=(0, 1, 2))
    for layer in (1, 2, 1, 0):
        assert_right(activations, layer)
    assert list((tmp_path / "none").rglob("*.safetensors")) == []


def test_a_damaged_file_is_captured_again(model: LoadedModel, tmp_path: Path) -> None:
    for damaged, swept in ((False, 1), (True, 1), (False, 0)):
        if damaged:
            [file] = tmp_path.rglob("point-001.safetensors")
            os.truncate(file, file.stat().st_size // 2)
        activations = PromptActivations(sources(model, tmp_path), PROMPTS, layers=(1,))
        with forwards(model) as counts:
            activations.reads(1)
        assert counts[0] == swept
        assert_right(activations, 1)
        del activations  # else the file stays mapped


def test_what_activations_depend_on_gives_another_key_and_nothing_else_does(
    loaded: Load, model: LoadedModel, tmp_path: Path
) -> None:
    def key(changed: LoadedModel, prompts: Any = PROMPTS, kind: str = "streams") -> str:
        entry = sources(changed, tmp_path).entry(kind, prompts)
        assert entry is not None
        return entry.key

    half = dataclasses.replace(model, model=copy.deepcopy(model.model).bfloat16())
    one_weight = dataclasses.replace(model, model=copy.deepcopy(model.model))
    one_weight.model.model.layers[1].mlp.down_proj.weight.data[3, 5] += 1e-3
    keys = [
        key(model),
        key(model, PROMPTS[:-1]),
        key(model, PROMPTS[::-1]),
        key(model, ((1, 1, 7, 40, 11), *PROMPTS[1:])),
        key(model, kind="last tokens"),
        *map(key, (loaded("qwen2", seed=1), loaded("llama"), half, one_weight)),
    ]
    assert len(set(keys)) == len(keys)
    same = dataclasses.replace(model, model=copy.deepcopy(model.model))
    assert key(same, [list(prompt) for prompt in PROMPTS]) == keys[0]


def test_an_entry_is_described_and_without_a_cache_nothing_is_fingerprinted(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources(model, tmp_path)
    source.last_tokens(PROMPTS)
    about = {"kind": "last tokens", "model": "qwen2", "dtype": "float32", "rows": len(PROMPTS)}
    assert [entry.about for entry in ActivationCache(1.0, tmp_path).entries()] == [about]
    monkeypatch.setattr("lunar_tune.engine.activations.fingerprint", pytest.fail)
    ActivationSource(model).last_tokens(PROMPTS)
