"""Activations of prompts are captured once; one bit of a model makes another fingerprint."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import PROMPTS, full_forwards
from torch import Tensor

from lunar_tune.engine import activations
from lunar_tune.engine.activations import ActivationSource, PromptActivations
from lunar_tune.engine.cache import ActivationCache
from lunar_tune.engine.forward import PrefixTree
from lunar_tune.models import digests
from lunar_tune.models import fingerprint as fingerprints
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.device import DeviceMemory
from lunar_tune.models.fingerprint import fingerprint
from lunar_tune.models.loading import LoadedModel, load_model

Load = Callable[..., LoadedModel]


@pytest.fixture
def runs(model: LoadedModel) -> Iterator[Counter[int]]:
    """Count how often each block is run."""
    counts: Counter[int] = Counter()
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: counts.update([layer]))
        for layer, block in enumerate(model.layout.blocks_of(model.model))
    ]
    yield counts
    for handle in handles:
        handle.remove()


def sources(model: LoadedModel, root: Path, limit: float = 1.0) -> ActivationSource:
    return ActivationSource(model, ActivationCache(limit, root))


def assert_right(activations: PromptActivations, layer: int) -> None:
    full = full_forwards(activations.source.loaded.model)
    for found, name in zip(activations.reads(layer), ("inputs", "residual"), strict=True):
        torch.testing.assert_close(found, full[name][layer], rtol=1e-4, atol=1e-4)


def test_a_second_run_reads_from_disk_without_a_sweep(
    model: LoadedModel, runs: Counter[int], tmp_path: Path
) -> None:
    """What remains is the one block that is asked for, run on its kept input."""
    first = sources(model, tmp_path)
    last = first.last_tokens(PROMPTS)
    activations = PromptActivations(first, PROMPTS, layers=(1, 2))
    kept = {layer: activations.reads(layer) for layer in (1, 2)}
    assert runs[0] == 2, "a sweep for the last tokens and one for both blocks' inputs"
    about = {"kind": "last tokens", "model": "qwen2", "dtype": "float32", "rows": len(PROMPTS)}
    assert about in [entry.about for entry in ActivationCache(1.0, tmp_path).entries()]
    memory, second = (
        PromptActivations(source, PROMPTS, layers=(1, 2))
        for source in (ActivationSource(model), sources(model, tmp_path))
    )
    assert torch.equal(memory.source.last_tokens(PROMPTS), last)
    runs.clear()
    assert torch.equal(second.source.last_tokens(PROMPTS), last)
    assert not runs
    for layer in (2, 1, 2):
        reads = second.reads(layer)
        for found, once, held in zip(reads, kept[layer], memory.reads(layer), strict=True):
            assert torch.equal(found, once)
            assert torch.equal(found, held)
    assert runs == Counter({0: 1, 1: 3, 2: 2}), "those in memory are swept for, once"
    assert_right(second, 1)


def test_layers_are_captured_on_demand(model: LoadedModel, tmp_path: Path) -> None:
    for source, announced in (
        (ActivationSource(model), (1,)),
        (sources(model, tmp_path), (1,)),
        (sources(model, tmp_path / "none", 0.0), (0, 1, 2)),
    ):
        activations = PromptActivations(source, PROMPTS, layers=announced)
        for layer in (1, 2, 1, 0):
            assert_right(activations, layer)
    names = sorted(file.stem for file in tmp_path.rglob("*.safetensors"))
    assert names == ["point-000", "point-001", "point-002"]


@pytest.mark.parametrize(("fitted", "together"), [(0, 2), (3, 1)])
def test_what_a_fit_reads_by_itself_counts_as_memory_too(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, fitted: int, together: int
) -> None:
    """There is room for two streams, or for one block's reads, of all rows, and no byte more."""
    swept: list[tuple[int, int]] = []
    sweep, nodes, config = activations._sweep, PrefixTree(PROMPTS).n_nodes, model.model.config

    def spy(*args: Any, **options: Any) -> list[Tensor]:
        found = sweep(*args, **options)
        swept.append((len(found), sum(one.nbytes for one in found)))
        return found

    room = 2 * 4 * nodes * config.hidden_size
    host = SimpleNamespace(available=room / activations.SWEEP_SHARE)
    free = 4 * nodes * (config.hidden_size + config.intermediate_size) / activations.READS_SHARE
    monkeypatch.setattr(activations, "_sweep", spy)
    monkeypatch.setattr(activations, "psutil", SimpleNamespace(virtual_memory=lambda: host))
    monkeypatch.setattr(DeviceMemory, "free_bytes", lambda _: int(free) + 1)
    known = PromptActivations(ActivationSource(model), PROMPTS, layers=(1, 2), fitted=fitted)
    first, _ = known.reads(1), known.reads(2)
    streams = swept[: 2 if fitted else 1]
    assert streams[0][0] == together
    assert sum(size for _, size in streams) <= room
    swept.clear()
    for found, before in zip(known.reads(1), first, strict=True):
        assert torch.equal(found, before)
    assert bool(swept) == bool(fitted), "they stay while the next block's find room"


def test_keys_follow_what_is_computed(loaded: Load, model: LoadedModel, tmp_path: Path) -> None:
    def key(changed: LoadedModel, prompts: Any = PROMPTS, kind: str = "streams") -> str:
        entry = sources(changed, tmp_path).entry(kind, prompts)
        assert entry is not None
        return entry.key

    same = own(model)
    keys = [key(same, [list(prompt) for prompt in PROMPTS])]
    assert keys == [key(model)]
    same.model.model.layers[1].mlp.down_proj.weight.data[3, 5] += 1e-3
    keys += [key(model, PROMPTS[::-1]), key(model, kind="last tokens"), key(same)]
    keys += [key(loaded("llama")), key(dataclasses.replace(same, model=same.model.bfloat16()))]
    assert len(set(keys)) == len(keys)


def own(model: LoadedModel) -> LoadedModel:
    return dataclasses.replace(model, model=copy.deepcopy(model.model))


@pytest.fixture
def copied(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """Return a model of one's own, whose parameters are summed in several stretches."""
    monkeypatch.setattr(digests, "_WORDS", 256)
    return own(model)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.data.view(-1).view(torch.uint8)


def down_projection(loaded: LoadedModel, layer: int) -> Any:
    return loaded.layout.down_projection_of(loaded.model, layer).weight


def flipped(loaded: LoadedModel, raw: Tensor, bits: int, *places: int) -> str:
    raw[list(places)] ^= bits
    found = fingerprint(loaded)
    raw[list(places)] ^= bits
    return found


def test_every_bit_counts(copied: LoadedModel, unchanged: Callable[[Any], None]) -> None:
    """Of every parameter a bit of the first byte, one inside and the last bit of the last.

    Then the same bit of two elements, signs and exponents among them. In bfloat16 an odd number of
    elements leaves two or six bytes over, which fill no word.
    """
    unchanged(copied.model)
    before = fingerprint(copied)
    for number, parameter in enumerate(copied.model.parameters()):
        raw = as_bytes(parameter)
        inside = (7919 * number) % len(raw)
        for place, bits in ((0, 1), (inside, 1 << number % 8), (len(raw) - 1, 128)):
            assert flipped(copied, raw, bits, place) != before
    assert fingerprint(copied) == before
    raw = as_bytes(down_projection(copied, 1))
    for place in (0, 3, 7):
        for distance in (8, 80):
            assert flipped(copied, raw, 128, place, place + distance) != before
    for length in (1, 3):
        odd = torch.arange(1, length + 1).bfloat16()
        copied.model.register_buffer("odd", odd)
        before = fingerprint(copied)
        for place in range(2 * length):
            assert flipped(copied, as_bytes(odd), 1 << place % 8, place) != before


def test_every_order_counts(copied: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements in one word, in neighbouring ones, far apart, of two parameters; also x and −x.

    Then stretches, here of four words, each with the same multipliers, and whole parameters.
    """
    one, two = (down_projection(copied, layer).data.view(-1) for layer in (1, 2))
    one[2] = -one[0]
    for i, second, j in ((0, one, 1), (0, one, 2), (1, one, 301), (3, one, -1), (5, two, 5)):
        before, a, b = fingerprint(copied), one[i].clone(), second[j].clone()
        assert a != b
        one[i], second[j] = b, a
        assert fingerprint(copied) != before
    monkeypatch.setattr(digests, "_WORDS", 4)
    seen = [fingerprint(copied)]
    raw = as_bytes(down_projection(copied, 0))
    raw[:64] = torch.cat([raw[32:64], raw[:32]])
    seen.append(fingerprint(copied))
    mlp = copied.model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    assert len({*seen, fingerprint(copied)}) == 3


def test_how_a_weight_lies_in_memory_or_on_disk_does_not_count(
    copied: LoadedModel, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Float32 at an odd offset stands across words of 8 bytes."""
    before, norm = fingerprint(copied), copied.model.model.norm.weight
    for offset in (3, 4):
        norm.data = torch.cat([torch.zeros(offset), norm.data])[offset:]
        assert fingerprint(copied) == before
    weight = down_projection(copied, 0)
    weight.data = weight.data.T.contiguous().T
    assert fingerprint(copied) == before
    moved = shutil.copytree(checkpoint("qwen2"), tmp_path / "moved")
    again = load_model(ModelSpec(name="another", source=str(moved), device="cpu"))
    assert fingerprint(again) == before


def test_all_settings_count(copied: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every weight is the same number; of a version the first two parts count."""
    for parameter in copied.model.parameters():
        parameter.data.fill_(0.5)
    seen = [fingerprint(copied)]
    for change in (
        copied.model.bfloat16,
        lambda: setattr(copied.model.config, "rms_norm_eps", 0.1),
        lambda: copied.model.set_attn_implementation("eager"),
        *(
            lambda number=number: monkeypatch.setattr(fingerprints, "version", lambda _: number)
            for number in ("9.1.0", "9.1.2", "9.2.0")
        ),
    ):
        change()
        seen.append(fingerprint(copied))
    assert seen[-3] == seen[-2]
    assert len(set(seen)) == len(seen) - 1
