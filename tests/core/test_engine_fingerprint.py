"""The same weights have one fingerprint; one bit, place, format or setting makes another."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lunar_tune.models import lineage as lineage_module
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.lineage import fingerprint
from lunar_tune.models.loading import LoadedModel, load_model

Load = Callable[..., LoadedModel]
Checkpoint = Callable[..., Path]


@pytest.fixture
def copied(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """Return a model of one's own, whose parameters are summed in several stretches."""
    monkeypatch.setattr(lineage_module, "_WORDS", 256)
    original = loaded("qwen2")
    return dataclasses.replace(original, model=copy.deepcopy(original.model))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.data.view(-1).view(torch.uint8)


def load(folder: Path) -> LoadedModel:
    return load_model(ModelSpec(name="one", source=str(folder), device="cpu"))


@pytest.mark.parametrize("family", list(LAYOUTS))
def test_weights_loaded_twice_have_one_fingerprint_and_families_have_their_own(
    checkpoint: Checkpoint, loaded: Load, family: str
) -> None:
    one, other = (fingerprint(load(checkpoint(family))) for _ in range(2))
    assert one == other
    assert len(one) == 64
    rest = {fingerprint(loaded(name)) for name in LAYOUTS if name != family}
    assert len(rest) == len(LAYOUTS) - 1
    assert one not in rest


def test_where_a_model_was_loaded_from_and_its_name_do_not_count(
    loaded: Load, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    original = loaded("llama")
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    again = load_model(ModelSpec(name="other", source=str(tmp_path), device="cpu"))
    assert fingerprint(again) == fingerprint(load(checkpoint("llama")))


def test_taking_it_changes_nothing(
    copied: LoadedModel, unchanged: Callable[[nn.Module], None]
) -> None:
    unchanged(copied.model)
    assert fingerprint(copied) == fingerprint(copied)


def test_one_bit_anywhere_makes_another(copied: LoadedModel) -> None:
    """Of every parameter a bit of the first byte, one inside and the last bit of the last."""
    before = fingerprint(copied)
    for number, parameter in enumerate(copied.model.parameters()):
        raw = as_bytes(parameter)
        inside = (7919 * number) % len(raw)
        for place, bit in ((0, 1), (inside, 1 << number % 8), (len(raw) - 1, 128)):
            raw[place] ^= bit
            assert fingerprint(copied) != before
            raw[place] ^= bit
    assert fingerprint(copied) == before


@pytest.mark.parametrize("length", [1, 3, 5])
def test_the_last_bytes_count_where_they_fill_no_word(copied: LoadedModel, length: int) -> None:
    """In bfloat16 an odd number of elements leaves two, four or six bytes over."""
    copied.model.bfloat16()
    odd = torch.arange(1, length + 1).bfloat16()
    copied.model.register_buffer("odd", odd)
    before = fingerprint(copied)
    for place in range(2 * length):
        for bit in range(8):
            as_bytes(odd)[place] ^= 1 << bit
            assert fingerprint(copied) != before
            as_bytes(odd)[place] ^= 1 << bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_that_change_together_make_another(copied: LoadedModel, dtype: torch.dtype) -> None:
    """The same bit of two elements, the highest of a word among them: signs and exponents."""
    copied.model.to(dtype)
    before = fingerprint(copied)
    raw = as_bytes(copied.model.model.layers[1].mlp.down_proj.weight)
    for place in (0, 1, 3, 5, 7):
        for bit in (0, 5, 6, 7):
            for distance in (8, 80):
                for byte in (place, place + distance):
                    raw[byte] ^= 1 << bit
                assert fingerprint(copied) != before, (place, bit, distance)
                for byte in (place, place + distance):
                    raw[byte] ^= 1 << bit
    assert fingerprint(copied) == before


def test_another_number_format_is_another_model(copied: LoadedModel) -> None:
    """Also where every weight is the same number in both."""
    for parameter in copied.model.parameters():
        parameter.data.fill_(0.5)
    seen = [fingerprint(copied)]
    for convert in (nn.Module.bfloat16, nn.Module.half, nn.Module.double):
        convert(copied.model)
        seen.append(fingerprint(copied))
    assert len(set(seen)) == 4


@pytest.mark.parametrize("negative", [False, True])
def test_two_elements_that_change_places_make_another(copied: LoadedModel, negative: bool) -> None:
    """In one word, in neighbouring ones, far apart, between two parameters; also x and −x."""
    before = fingerprint(copied)
    flat = copied.model.model.layers[1].mlp.down_proj.weight.data.view(-1)
    other = copied.model.model.layers[2].mlp.down_proj.weight.data.view(-1)
    for one, i, two, j in (
        (flat, 0, flat, 1),
        (flat, 0, flat, 2),
        (flat, 1, flat, 301),
        (flat, 3, flat, -1),
        (flat, 5, other, 5),
    ):
        if negative:
            two[j] = -one[i]
            before = fingerprint(copied)
        first, second = one[i].clone(), two[j].clone()
        assert first != second
        one[i], two[j] = second, first
        assert fingerprint(copied) != before
        one[i], two[j] = first, second
        assert fingerprint(copied) == before


def test_stretches_that_change_places_make_another(
    copied: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are taken over stretches; here of four words, each with the same multipliers."""
    monkeypatch.setattr(lineage_module, "_WORDS", 4)
    seen = {fingerprint(copied)}
    raw = as_bytes(copied.model.model.layers[0].mlp.down_proj.weight)
    first, second = raw[:32].clone(), raw[32:64].clone()
    raw[:32], raw[32:64] = second, first
    seen.add(fingerprint(copied))
    assert len(seen) == 2


def test_two_parameters_that_change_names_make_another(copied: LoadedModel) -> None:
    before = fingerprint(copied)
    mlp = copied.model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    assert fingerprint(copied) != before


@pytest.mark.parametrize("offset", [3, 4])
def test_how_a_weight_lies_in_memory_does_not_count(copied: LoadedModel, offset: int) -> None:
    """Float32 at an odd offset stands across words of 8 bytes."""
    before = fingerprint(copied)
    norm = copied.model.model.norm.weight
    large = torch.zeros(len(norm) + 7)
    large[offset : offset + len(norm)] = norm.data
    norm.data = large[offset : offset + len(norm)]
    assert fingerprint(copied) == before
    transposed = copied.model.model.layers[0].mlp.down_proj.weight
    transposed.data = transposed.data.T.contiguous().T
    assert fingerprint(copied) == before


def test_attention_and_configuration_make_another(copied: LoadedModel) -> None:
    seen = {fingerprint(copied)}
    copied.model.config.rms_norm_eps *= 2
    seen.add(fingerprint(copied))
    copied.model.set_attn_implementation("eager")
    seen.add(fingerprint(copied))
    assert len(seen) == 3


def test_another_version_of_a_library_makes_another(
    copied: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the version the first two parts count."""
    seen = []
    for number in ("9.1.0", "9.1.2", "9.2.0"):
        monkeypatch.setattr(lineage_module, "version", lambda _, number=number: number)
        seen.append(fingerprint(copied))
    assert seen[0] == seen[1] != seen[2]
