"""Loading: what is read is what was saved, and what cannot be read says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_models import build_model, build_tokenizer
from transformers import PreTrainedTokenizerFast

from lunar_tune.config.run_options import TINY
from lunar_tune.errors import InputError, ModelError
from lunar_tune.models.catalog import (
    CATALOG,
    ModelSpec,
    check_weights,
    is_adapter,
    resolve_model,
)
from lunar_tune.models.device import limit_threads, resolve_device, resolve_dtype
from lunar_tune.models.loading import load_config, load_model

IDS = torch.tensor([[1, 17, 40, 11, 200]])


def spec(source: Path | str, **changes: str | None) -> ModelSpec:
    return ModelSpec(name="test", source=str(source), device="cpu", **changes)  # type: ignore[arg-type]


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a copy of a checkpoint folder that a test may spoil."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("llama"), copy)
    return copy


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Return a LoRA adapter folder for the llama checkpoint, and peft's own logits with it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        build_model("llama"), LoraConfig(r=2, target_modules=["down_proj", "q_proj"])
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        logits = model.eval()(input_ids=IDS).logits
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(path))
    return path, logits


def test_a_folder_gives_the_model_and_the_tokenizer_that_were_saved(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = load_model(spec(folder))
    assert torch.equal(loaded.model(IDS).logits, build_model("llama")(IDS).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.n_layers, loaded.family, loaded.device.type) == (3, "llama", "cpu")
    text = "The 12 buyers pay 14 March."
    assert loaded.tokenizer.encode(text) == tokenizer.encode(text)


def test_weights_from_another_folder_replace_those_of_the_source(
    folder: Path, checkpoint: Callable[..., Path]
) -> None:
    other = checkpoint("llama", seed=7)
    loaded = load_model(spec(folder, weights=str(other)))
    assert torch.equal(loaded.model(IDS).logits, build_model("llama", seed=7)(IDS).logits)


def test_an_adapter_is_merged_and_answers_as_peft_does(
    folder: Path, adapter: tuple[Path, torch.Tensor]
) -> None:
    path, logits = adapter
    loaded = load_model(spec(folder, weights=str(path)))
    torch.testing.assert_close(loaded.model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(build_model("llama")(IDS).logits, logits)
    assert type(loaded.model) is type(build_model("llama"))
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_an_adapter_for_a_model_of_another_size_is_refused(
    checkpoint: Callable[..., Path], adapter: tuple[Path, torch.Tensor]
) -> None:
    wide = checkpoint("llama", intermediate_size=64)
    with pytest.raises(ModelError, match="the adapter does not fit"):
        load_model(spec(wide, weights=str(adapter[0])))


def test_an_adapter_for_other_modules_or_more_blocks_is_refused(
    checkpoint: Callable[..., Path], adapter: tuple[Path, torch.Tensor]
) -> None:
    """phi3 has no q_proj; two blocks are not three: peft would leave a part out."""
    for other in (checkpoint("phi3"), checkpoint("llama", num_hidden_layers=2)):
        with pytest.raises(ModelError, match="the adapter does not fit"):
            load_model(spec(other, weights=str(adapter[0])))


def test_a_tokenizer_beside_the_weights_wins(
    folder: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(checkpoint("llama", seed=7), tuned)
    own = build_tokenizer()
    own.chat_template = "tuned {{ messages[0]['content'] }}"
    own.save_pretrained(tuned)
    assert load_model(spec(folder, weights=str(tuned))).tokenizer.chat_template == own.chat_template
    for file in (*tuned.glob("tokenizer*"), *tuned.glob("chat_template*")):
        file.unlink()
    plain = load_model(spec(folder, weights=str(tuned))).tokenizer
    assert plain.chat_template == build_tokenizer().chat_template


@pytest.mark.parametrize(
    ("configured", "expected"), [(7, (2, 7)), ([9, 7], (2, 7, 9)), ([2], (2,)), (None, (2,))]
)
def test_every_end_of_sequence_id_of_generation_config_and_tokenizer_counts(
    folder: Path, configured: int | list[int] | None, expected: tuple[int, ...]
) -> None:
    file = folder / "generation_config.json"
    content = json.loads(file.read_text()) | {"eos_token_id": configured}
    file.write_text(json.dumps(content))
    assert load_model(spec(folder)).eos_ids == expected


def test_a_tokenizer_without_padding_token_pads_with_an_end_token(folder: Path) -> None:
    bare = build_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(folder)
    assert load_model(spec(folder)).pad_id == 2


def test_a_model_that_names_no_end_token_is_refused(folder: Path) -> None:
    bare = build_tokenizer()
    bare.eos_token = None
    bare.save_pretrained(folder)
    for name in ("generation_config.json", "config.json"):
        content = json.loads((folder / name).read_text()) | {"eos_token_id": None}
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_model(spec(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_number_format_asked_for(folder: Path, dtype: str) -> None:
    loaded = load_model(spec(folder, dtype=dtype))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}


# Refusals


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the folder cannot be loaded: .*model.safetensors"):
        load_model(spec(folder))
    with pytest.raises(ModelError, match=r"no \*.safetensors file.*save_pretrained"):
        check_weights(str(folder), "--model-path")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(build_model("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"the folder cannot be loaded: .*safetensors"):
        load_model(spec(folder))
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors file.*pickled"):
        check_weights(str(folder), "--model-path")


def test_pickled_adapter_weights_are_not_read(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    pickled = tmp_path / "adapter"
    shutil.copytree(adapter[0], pickled)
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        check_weights(str(pickled), "--model-path")


def test_a_weight_file_cut_short_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="the folder cannot be loaded"):
        load_model(spec(folder))


def test_weights_of_another_size_than_the_configuration_says_are_refused(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 64}))
    with pytest.raises(ModelError, match="the folder cannot be loaded"):
        load_model(spec(folder))


def test_weights_that_lack_a_block_are_refused_not_made_up(folder: Path) -> None:
    """Transformers fills what is missing with random numbers and a warning."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"lack.*layers.3"):
        load_model(spec(folder))


def test_a_configuration_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="the folder cannot be loaded"):
        load_config(spec(folder))


def test_a_quantised_checkpoint_is_refused_before_weights_are_read(folder: Path) -> None:
    file = folder / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantised))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\)"):
        load_model(spec(folder))


def test_remote_code_is_off_and_the_message_says_how_to_allow_it(folder: Path) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MineConfig"},
    }
    file.write_text(json.dumps(content))
    (folder / "mine.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelError, match="repeat the command with --trust-remote-code"):
        load_config(spec(folder))


def test_a_hub_that_cannot_be_reached_gives_advice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the offline switch: with it off the same message comes after 20 s of retries."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"model Qwen/Absent: .*hub could not be reached.*--model tiny"
    ):
        load_config(spec("Qwen/Absent"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "no such folder"),
        (lambda path: path.write_text("x"), "no such folder"),
        (lambda path: path.mkdir(), "holds no config.json file.* adapter_config.json"),
    ],
    ids=["absent", "a-file", "empty"],
)
def test_a_model_path_without_a_model_is_refused(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "path")
    with pytest.raises(ModelError, match=rf"--model-path .*path: .*{message}"):
        check_weights(str(tmp_path / "path"), "--model-path")


def test_model_paths_of_checkpoints_and_adapters_are_told_apart(
    folder: Path, adapter: tuple[Path, torch.Tensor]
) -> None:
    assert check_weights(str(folder), "--model-path") == folder
    assert check_weights(str(adapter[0]), "--model-path") == adapter[0]
    assert is_adapter(adapter[0])
    assert not is_adapter(folder)


# The catalogue


def test_names_of_the_catalogue_hub_ids_and_folders_are_told_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CATALOG["qwen2.5-7b"]
    assert resolve_model("qwen2.5-7b").source == entry.hub_id == "Qwen/Qwen2.5-7B-Instruct"
    assert resolve_model("Owner/Model").source == "Owner/Model"
    assert resolve_model(str(folder)).source == str(folder)
    monkeypatch.chdir(folder.parent)
    assert resolve_model("checkpoint").source == str(folder)
    assert resolve_model(TINY).source == TINY


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen2.5-7", "unknown model 'qwen2.5-7'. Did you mean 'qwen2.5-7b'.*There are: tiny"),
        ("./absent", "--model ./absent: no such folder"),
        ("/absent", "--model /absent: no such folder"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("", "unknown model ''"),
    ],
)
def test_a_model_name_that_means_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


@pytest.mark.parametrize(
    ("text", "source", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("org/name@", "org/name", None),
        ("qwen2.5-7b@abc", "Qwen/Qwen2.5-7B-Instruct", "abc"),
    ],
)
def test_what_follows_an_at_sign_is_the_revision(
    text: str, source: str, revision: str | None
) -> None:
    found = resolve_model(text)
    assert (found.source, found.revision) == (source, revision)
    assert "@" not in found.name


def test_a_folder_with_an_at_sign_in_its_name_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "org" / "name@main"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text in ("org/name@main", str(folder)):
        found = resolve_model(text)
        assert (found.name, found.source, found.revision) == ("name@main", str(folder), None)
    assert resolve_model("org/name@other").revision == "other"


# Device and number format


@pytest.mark.parametrize("device", ["gpu", "auto:1", "cpu:x", "cuda:x", "cuda:-1", ""])
def test_a_device_that_means_nothing_is_refused(device: str) -> None:
    with pytest.raises(InputError, match=f"--device {device}"):
        resolve_device(device)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--device cuda: torch .* sees no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match=r"--device cuda:2: .*2"):
        resolve_device("cuda:2")


def test_auto_is_bfloat16_on_a_gpu_and_float32_elsewhere() -> None:
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    with pytest.raises(InputError, match=r"--dtype int8: unknown. There are: auto, float32"):
        resolve_dtype("int8", torch.device("cpu"))


def test_threads_are_bounded_by_what_there_is() -> None:
    before = torch.get_num_threads()
    try:
        assert limit_threads(1) == torch.get_num_threads() == 1
        assert 1 <= limit_threads(10_000) == limit_threads()
    finally:
        torch.set_num_threads(before)
