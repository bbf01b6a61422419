"""Whether a model is the one that it was: of its files what counts, whatever it was loaded as."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lunar_tune.errors import ModelError
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.fingerprint import check_same, differing, identity_of, number_format_of
from lunar_tune.models.loading import LoadedModel, load_model

OWN = ChatFormat()


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a checkpoint in float32 that a test may change."""
    return Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "model"))


def load(folder: Path, dtype: str = "float32", weights: Path | None = None) -> LoadedModel:
    path = None if weights is None else str(weights)
    spec = ModelSpec(name="m", source=str(folder), weights=path, dtype=dtype, device="cpu")
    return load_model(spec)


def change_bit(folder: Path, name: str = "model.safetensors") -> None:
    """Change one element of the file by its 7th bit after the point, which bfloat16 has too."""
    tensors = load_file(folder / name)
    values = next(iter(tensors.values())).view(-1)
    values[3] *= 1 + 2**-7
    save_file(tensors, folder / name, metadata={"format": "pt"})


def change_json(folder: Path, name: str, **changes: object) -> None:
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(document | changes))


def change_merges(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def change_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": change_bit,
    "configuration": lambda folder: change_json(folder, "config.json", rms_norm_eps=1e-3),
    "tokenizer": change_merges,
    "chat template": change_template,
}


@pytest.mark.parametrize("part", CHANGES)
def test_what_changed_in_a_folder_is_said_and_nothing_else(part: str, folder: Path) -> None:
    before = json.loads(json.dumps(identity_of(load(folder), OWN)))  # as a study keeps it
    again = load(folder)
    again.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    check_same(again, OWN, before)
    CHANGES[part](folder)
    now = load(folder)
    assert differing(identity_of(now, OWN), before) == [part]
    with pytest.raises(ModelError, match=f"{folder}: its {part} changed since the search began"):
        check_same(now, OWN, before)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("then", "now"), [("bfloat16", "float32"), ("float16", "float32")])
def test_weights_compare_where_they_were_rounded_then(
    stored: torch.dtype, then: str, now: str, folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before = identity_of(load(folder, then), OWN)
    check_same(load(folder, now), OWN, before)
    change_bit(folder)
    with pytest.raises(ModelError, match="its weights changed"):
        check_same(load(folder, now), OWN, before)


@pytest.mark.parametrize(("then", "now"), [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_what_cannot_be_compared_is_said_and_not_refused(
    then: str, now: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = identity_of(load(folder, then), OWN)
    check_same(load(folder, now), OWN, before)
    assert f"its weights changed since the search began is not known: {now} here" in caplog.text
    caplog.clear()
    check_same(load(folder, then), OWN, {**before, "tokenizer": ["tokenizers 0.1", ""]})
    (said,) = [record.message for record in caplog.records]
    assert "whether its tokenizer changed" in said
    check_same(load(folder, then), OWN, {})  # of a search that noted nothing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_number_format_that_a_first_worker_chose_is_told_by_its_model(
    dtype: str, folder: Path
) -> None:
    loaded = load(folder, dtype)
    known = json.loads(json.dumps(identity_of(loaded, OWN)))
    assert number_format_of(known) == dtype
    loaded = dataclasses.replace(loaded, merged_from="a digest")
    assert number_format_of(identity_of(loaded, OWN)) == dtype
    loaded.model.register_buffer("counted", torch.zeros(1))  # kept in float32, whatever the rest is
    assert number_format_of(identity_of(loaded, OWN)) == dtype
    assert number_format_of({}) == "auto"


def test_an_adapter_is_part_of_the_weights_as_its_file_is(folder: Path, tmp_path: Path) -> None:
    """Merging rounds, and not everywhere alike: another way of merging is no other model."""
    adapter = tmp_path / "adapter"
    config = LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(load(folder).model, config).save_pretrained(str(adapter))
    loaded = load(folder, weights=adapter)
    before = identity_of(loaded, OWN)
    loaded.model.model.layers[0].mlp.down_proj.weight.data *= 1 + 2**-23
    check_same(loaded, OWN, before)
    for where, name in ((adapter, "adapter_model.safetensors"), (folder, "model.safetensors")):
        kept = (where / name).read_bytes()
        change_bit(where, name)
        with pytest.raises(ModelError, match=f"{folder} with {adapter}: its weights changed"):
            check_same(load(folder, weights=adapter), OWN, before)
        (where / name).write_bytes(kept)
