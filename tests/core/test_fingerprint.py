"""One bit, place, format or setting of a model makes another fingerprint."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lunar_tune.models import lineage as lineage_module
from lunar_tune.models.lineage import fingerprint
from lunar_tune.models.loading import LoadedModel


@pytest.fixture
def copied(
    loaded: Callable[..., LoadedModel],
    unchanged: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> LoadedModel:
    """Return a model of one's own, whose parameters are summed in several stretches."""
    monkeypatch.setattr(lineage_module, "_WORDS", 256)
    original = loaded("qwen2")
    unchanged(original.model)
    return dataclasses.replace(original, model=copy.deepcopy(original.model))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.data.view(-1).view(torch.uint8)


def down_projection(loaded: LoadedModel, layer: int) -> Tensor:
    weight: Tensor = loaded.layout.down_projection_of(loaded.model, layer).weight.data
    return weight


def flipped(loaded: LoadedModel, raw: Tensor, flips: Sequence[tuple[int, int]]) -> str:
    """Return the fingerprint while some bytes differ by some bits."""
    for place, bits in flips:
        raw[place] ^= bits
    found = fingerprint(loaded)
    for place, bits in flips:
        raw[place] ^= bits
    return found


def test_one_bit_anywhere_makes_another(copied: LoadedModel) -> None:
    """Of every parameter a bit of the first byte, one inside and the last bit of the last.

    In bfloat16 an odd number of elements leaves two, four or six bytes over, which fill no word.
    """
    before = fingerprint(copied)
    for number, parameter in enumerate(copied.model.parameters()):
        raw = as_bytes(parameter)
        inside = (7919 * number) % len(raw)
        for place, bits in ((0, 1), (inside, 1 << number % 8), (len(raw) - 1, 128)):
            assert flipped(copied, raw, [(place, bits)]) != before
    assert fingerprint(copied) == before
    for length in (1, 3, 5):
        odd = torch.arange(1, length + 1).bfloat16()
        copied.model.register_buffer("odd", odd)
        before = fingerprint(copied)
        for place in range(2 * length):
            assert flipped(copied, as_bytes(odd), [(place, 1 << place % 8)]) != before


def test_bits_that_change_together_make_another(copied: LoadedModel) -> None:
    """The same bit of two elements, the highest of a word among them: signs and exponents."""
    for dtype in (torch.float32, torch.bfloat16):
        copied.model.to(dtype)
        before = fingerprint(copied)
        raw = as_bytes(down_projection(copied, 1))
        for place in (0, 3, 7):
            for bits in (1, 64, 128):
                for distance in (8, 80):
                    flips = [(place, bits), (place + distance, bits)]
                    assert flipped(copied, raw, flips) != before, (flips, dtype)
        assert fingerprint(copied) == before


@pytest.mark.parametrize("negative", [False, True])
def test_two_elements_that_change_places_make_another(copied: LoadedModel, negative: bool) -> None:
    """In one word, in neighbouring ones, far apart, between two parameters; also x and −x."""
    one, two = (down_projection(copied, layer).view(-1) for layer in (1, 2))
    for first, i, second, j in (
        *((one, 0, one, 1), (one, 0, one, 2), (one, 1, one, 301)),
        *((one, 3, one, -1), (one, 5, two, 5)),
    ):
        if negative:
            second[j] = -first[i]
        before = fingerprint(copied)
        a, b = first[i].clone(), second[j].clone()
        assert a != b
        first[i], second[j] = b, a
        assert fingerprint(copied) != before


def test_stretches_or_parameters_that_change_places_make_another(
    copied: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are taken over stretches; here of four words, each with the same multipliers."""
    monkeypatch.setattr(lineage_module, "_WORDS", 4)
    seen = {fingerprint(copied)}
    raw = as_bytes(down_projection(copied, 0))
    first, second = raw[:32].clone(), raw[32:64].clone()
    raw[:32], raw[32:64] = second, first
    seen.add(fingerprint(copied))
    mlp = copied.model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    seen.add(fingerprint(copied))
    assert len(seen) == 3


def test_how_a_weight_lies_in_memory_does_not_count(copied: LoadedModel) -> None:
    """Float32 at an odd offset stands across words of 8 bytes."""
    before = fingerprint(copied)
    norm = copied.model.model.norm.weight
    for offset in (3, 4):
        large = torch.zeros(len(norm) + 7)
        large[offset : offset + len(norm)] = norm.data
        norm.data = large[offset : offset + len(norm)]
        assert fingerprint(copied) == before
    weight = copied.model.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert fingerprint(copied) == before


def test_number_format_attention_configuration_and_library_make_another(
    copied: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every weight is the same number; of a version the first two parts count."""
    for parameter in copied.model.parameters():
        parameter.data.fill_(0.5)
    seen = [fingerprint(copied)]
    for convert in (nn.Module.bfloat16, nn.Module.half, nn.Module.double):
        convert(copied.model)
        seen.append(fingerprint(copied))
    copied.model.config.rms_norm_eps *= 2
    seen.append(fingerprint(copied))
    copied.model.set_attn_implementation("eager")
    seen.append(fingerprint(copied))
    for number in ("9.1.0", "9.1.2", "9.2.0"):
        monkeypatch.setattr(lineage_module, "version", lambda _, number=number: number)
        seen.append(fingerprint(copied))
    assert seen[-3] == seen[-2]
    assert len(set(seen)) == len(seen) - 1 == 8
