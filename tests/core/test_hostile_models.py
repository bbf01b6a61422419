"""Models and adapters of strangers: no code runs, nothing hangs, no number is wrong in silence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import build_model, build_tokenizer

from lunar_tune.errors import ModelError
from lunar_tune.models.catalog import Lineage, ModelSpec, resolve_model
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.device import n_parameters
from lunar_tune.models.loading import load_model
from lunar_tune.models.weights import check_weights

IDS = torch.tensor([[1, 17, 40, 11, 200]])


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


def spec(source: Path, *, weights: Path | None = None, dtype: str = "auto") -> ModelSpec:
    own = None if weights is None else str(weights)
    return ModelSpec(name="test", source=str(source), device="cpu", weights=own, dtype=dtype)


def rewrite(file: Path, **changes: Any) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | changes))


def adapted(folder: Path, vocabulary: int = 320, **settings: Any) -> torch.Tensor:
    """Write a LoRA adapter with random weights; return peft's own logits with it."""
    from peft import LoraConfig, get_peft_model

    base, draw = build_model("llama"), torch.Generator().manual_seed(0)
    if vocabulary != 320:
        base.resize_token_embeddings(vocabulary, mean_resizing=False)
    config = LoraConfig(r=2, **({"target_modules": ["q_proj", "down_proj"]} | settings))
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for weight in (one for one in model.parameters() if one.requires_grad):
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.2)
        logits: torch.Tensor = model(input_ids=IDS).logits
    model.save_pretrained(str(folder), save_embedding_layers=vocabulary != 320)
    return logits


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 5}},
        {"modules_to_save": ["lm_head", "post_attention_layernorm"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [3, 40]},
        {"init_lora_weights": "pissa", "layers_to_transform": [1]},
        {"vocabulary": 325, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"vocabulary": 300, "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tie)")
def test_a_merged_adapter_answers_as_peft_does(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    logits = adapted(tmp_path / "adapter", **settings)
    path = check_weights(str(tmp_path / "adapter"), "--model-path")
    merged = load_model(spec(folder, weights=path)).model
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert merged.config.vocab_size == settings.get("vocabulary", 320)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "of the kind PROMPT_TUNING. Only plain LoRA adapters"),
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"peft_type": None}, "of the kind None"),
        ({"layer_replication": [[0, 3], [0, 3]]}, "with layer_replication. Only"),
        ({"megatron_config": {"x": 1}, "megatron_core": "os"}, "LORA with megatron_config"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_by_its_kind_before_torch(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    rewrite(tmp_path / "adapter_config.json", **{"peft_type": "LORA", **changes})
    with pytest.raises(ModelError, match=message):
        check_weights(str(tmp_path), "--model-path")


def test_an_adapter_of_another_base_or_a_newer_peft_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "adapter"
    adapted(path)
    rewrite(path / "adapter_config.json", base_model_name_or_path="meta-llama/Other")
    load_model(spec(folder, weights=path))
    assert f"{path} was trained on meta-llama/Other, and is put on {folder}" in caplog.text
    rewrite(path / "adapter_config.json", use_news=True, peft_version="9.9")
    with pytest.raises(ModelError, match=r"peft 9\.9 has saved it with use_news"):
        load_model(spec(folder, weights=path))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000"),
        ("config.json", {"vocab_size": 10**12}, "vocab_size 1,000,000,000,000"),
        ("config.json", {"vocab_size": 10**7}, r"vocab_size 10,000,000, .* hold 43,744 numbers"),
        ("config.json", {"intermediate_size": 10**6}, "intermediate_size 1,000,000"),
        ("config.json", {"head_dim": 10**6}, "head_dim 1,000,000"),
        ("config.json", {"hidden_size": -4}, "hidden_size -4"),
        ("config.json", {"x": "y" * 1_000_001}, "config.json cannot be read .*larger than the"),
    ],
)
def test_a_configuration_of_more_than_the_weights_hold_is_refused_at_once(
    folder: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    rewrite(folder / file, **changes)
    for look in (lambda: resolve_model(str(folder)), lambda: check_weights(str(folder), "--m")):
        with pytest.raises(ModelError, match=message):
            look()


def test_a_quantised_folder_is_called_quantised_and_still_bounded(folder: Path) -> None:
    """Eight weights of 4 bits stand in one number, so it holds fewer than its configuration has."""
    from safetensors.torch import load_file, save_file

    def packed(weight: torch.Tensor) -> torch.Tensor:
        return torch.zeros(-(-weight.numel() // 8), dtype=torch.int32)

    file, quantised = folder / "model.safetensors", {"quant_method": "awq", "bits": 4}
    save_file({name: packed(weight) for name, weight in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="not the configuration of these weights"):
        resolve_model(str(folder))
    rewrite(folder / "config.json", quantization_config=quantised)
    with pytest.raises(ModelError, match=r"quantised \(awq\).* Use the 16- or 32-bit checkpoint"):
        load_model(resolve_model(str(folder)))
    rewrite(folder / "config.json", vocab_size=10**7)
    with pytest.raises(ModelError, match="not the configuration of these weights"):
        resolve_model(str(folder))


def test_what_would_hang_or_fill_the_memory_is_no_model(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+b") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(ModelError, match=r"tokenizer\.json has 1,099,511,627,776 bytes"):
        resolve_model(str(folder))
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json is a device or a pipe"):
        resolve_model(str(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    "asked", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn", "evil/kernel"]
)
def test_attention_that_is_no_part_of_torch_is_replaced_with_a_word(
    folder: Path, caplog: pytest.LogCaptureFixture, asked: str
) -> None:
    """A package may not be installed, and a kernel is code that is fetched from a hub."""
    rewrite(folder / "config.json", attn_implementation=asked)
    loaded = load_model(spec(folder))
    assert loaded.model.config._attn_implementation == "sdpa"
    assert f"asks for the attention of {asked}; sdpa" in caplog.text
    assert torch.equal(loaded.model(IDS).logits, build_model("llama")(IDS).logits)
    rewrite(folder / "config.json", attn_implementation="eager")
    assert load_model(spec(folder)).model.config._attn_implementation == "eager"


def test_numbers_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    """They gave empty answers, and so a perfect score."""
    from safetensors.torch import load_file, save_file

    file, name = folder / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    whole = load_file(file)
    for value in (float("nan"), float("inf")):
        changed = {key: tensor.clone() for key, tensor in whole.items()}
        changed[name][3, 5] = value
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"{name} holds numbers that are infinite or none"):
            load_model(spec(folder))
    save_file({k: t * (1e6 if k == name else 1) for k, t in whole.items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} .* as float16.*--dtype bfloat16"):
        load_model(spec(folder, dtype="float16"))
    large = {k: t * (1e4 if "embed" in k or "norm" in k else 1) for k, t in whole.items()}
    save_file(large, file, {"format": "pt"})
    load_model(spec(folder))
    with pytest.raises(ModelError, match=r"computes no numbers \(NaN\) .* as float16"):
        load_model(spec(folder, dtype="float16"))
    save_file(whole, file, {"format": "pt"})
    adapted(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"adapter: model\.layers\.0.* infinite or none"):
        load_model(spec(folder, weights=tmp_path / "adapter"))


def test_files_beside_the_weights_are_not_counted(folder: Path, tmp_path: Path) -> None:
    """Mistral's repositories hold the same weights a second time, in one file."""
    model, split = build_model("llama"), tmp_path / "split"
    model.save_pretrained(split, max_shard_size="60KB")
    build_tokenizer().save_pretrained(split)
    assert len(list(split.glob("model-*.safetensors"))) > 1
    for place in (folder, split):
        shutil.copy(folder / "model.safetensors", place / "consolidated.safetensors")
        assert n_parameters(spec(place)) == sum(one.numel() for one in model.parameters())
    assert torch.equal(load_model(spec(split)).model(IDS).logits, model(IDS).logits)


CODE = "raise SystemExit('code of the model ran')"


def test_no_code_of_a_checkpoint_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a class of transformers' own does, that is used; where none does, it is refused."""
    monkeypatch.setattr("builtins.input", None)  # transformers would ask for consent
    for file in ("mine.py", "modeling_llama.py", "custom_generate/generate.py", "setup.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(CODE)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n(tR.")  # a pickle
    classes = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": "mine.T"}
    rewrite(folder / "config.json", auto_map=classes)
    rewrite(folder / "generation_config.json", auto_map=classes, custom_generate="mine")
    loaded = load_model(spec(folder))
    assert torch.equal(loaded.model(IDS).logits, build_model("llama")(IDS).logits)
    rewrite(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]})
    rewrite(folder / "tokenizer_config.json", tokenizer_class="T")
    with pytest.raises(ModelError, match="repeat the command with --trust-remote-code"):
        load_model(spec(folder))


def test_a_model_that_is_asked_otherwise_than_it_was_taught_says_both(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"chat_template": "own", "system_prompt": "Be brief."}
    whole = {"source": "s", "weights": None, "revision": None, "fingerprint": "f"}
    lineage = Lineage(base="tiny", data="mini", data_digest="d", settings=settings, **whole)
    lineage.write(folder)
    load_model(spec(folder), ChatFormat(system_prompt="Be brief."))
    assert caplog.text == ""
    load_model(spec(folder))
    then, now = "system prompt 'Be brief.'", "chat template own and system prompt None"
    assert f"taught with chat template own and {then}, and is asked with {now}" in caplog.text
    other = lineage.taught_otherwise("{{ messages[0].content }}" * 9, "Be brief.")
    assert f"chat template {'{{ messages[0].content }}' * 2}{{{{ [...] and system" in other
