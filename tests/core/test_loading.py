"""Loading: what is read is what was saved, and what cannot be read says what to do."""

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
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast as Tokenizer

from lunar_tune.config.options import TINY
from lunar_tune.data.records import Record
from lunar_tune.errors import ModelError
from lunar_tune.files import CACHE_VARIABLE
from lunar_tune.models.catalog import FETCHED, ModelSpec, resolve_model
from lunar_tune.models.chat import PUBLISHED, ChatFormat
from lunar_tune.models.loading import load_config, load_model
from lunar_tune.models.weights import check_weights, is_adapter
from lunar_tune.training.answer_loss import Encoder

IDS = torch.tensor([[1, 17, 40, 11, 200]])
Checkpoint = Callable[..., Path]
Adapter = tuple[Path, torch.Tensor]


def spec(source: Path | str, *, weights: Path | None = None, dtype: str = "auto") -> ModelSpec:
    own = None if weights is None else str(weights)
    return ModelSpec(name="test", source=str(source), device="cpu", weights=own, dtype=dtype)


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint("llama"), tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Return a LoRA adapter folder for the llama checkpoint, and peft's own logits with it."""
    from peft import LoraConfig, get_peft_model

    parts = LoraConfig(r=2, target_modules=["down_proj", "q_proj"])
    model, draw = get_peft_model(build_model("llama"), parts), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=draw)
        logits = model.eval()(input_ids=IDS).logits
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(path))
    return path, logits


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_gives_what_was_saved(folder: Path, tokenizer: Tokenizer) -> None:
    loaded = load_model(spec(folder))
    assert torch.equal(loaded.model(IDS).logits, build_model("llama")(IDS).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.n_layers, loaded.device.type) == (3, "cpu")
    assert loaded.model.config.model_type == "llama"
    text = "The 12 buyers pay 14 March."
    assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
    assert load_model(spec(folder, dtype="float16")).model.dtype == torch.float16


def test_another_folder_replaces_both(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    tuned = shutil.copytree(checkpoint("llama", seed=7), tmp_path / "tuned")
    own = build_tokenizer()
    own.chat_template = "tuned {{ messages[0]['content'] }}"
    own.save_pretrained(tuned)
    loaded = load_model(spec(folder, weights=tuned))
    assert torch.equal(loaded.model(IDS).logits, build_model("llama", seed=7)(IDS).logits)
    assert loaded.tokenizer.chat_template == own.chat_template
    for file in (*tuned.glob("tokenizer*"), *tuned.glob("chat_template*")):
        file.unlink()
    plain = load_model(spec(folder, weights=tuned)).tokenizer
    assert plain.chat_template == build_tokenizer().chat_template


def test_an_adapter_is_merged_as_peft_does_or_does_not_fit(
    folder: Path, checkpoint: Checkpoint, adapter: Adapter
) -> None:
    """Phi-3 has no q_proj; two blocks are not three: peft would leave a part out."""
    path, logits = adapter
    loaded = load_model(spec(folder, weights=path))
    torch.testing.assert_close(loaded.model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(build_model("llama")(IDS).logits, logits)
    assert not any("lora" in name or p.requires_grad for name, p in loaded.model.named_parameters())
    sizes = ({"intermediate_size": 64}, {"num_hidden_layers": 2})
    for other in (checkpoint("phi3"), *(checkpoint("llama", **size) for size in sizes)):
        with pytest.raises(ModelError, match="the adapter does not fit"):
            load_model(spec(other, weights=path))


def test_every_end_of_sequence_id_of_generation_config_and_tokenizer_counts(folder: Path) -> None:
    for configured, expected in ((7, (2, 7)), ([9, 7], (2, 7, 9)), (None, (2,))):
        rewrite(folder / "generation_config.json", eos_token_id=configured)
        assert load_model(spec(folder)).eos_ids == expected
    bare = build_tokenizer()
    bare.eos_token, bare.chat_template = None, "{{ messages[0]['content'] }}"
    bare.save_pretrained(folder)
    rewrite(folder / "config.json", eos_token_id=None)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_model(spec(folder))


def test_what_ends_a_turn_of_the_chat_format_ends_an_answer(folder: Path, tmp_path: Path) -> None:
    """Also where neither configuration nor tokenizer name it; of the format that is used alone."""
    (folder / "generation_config.json").unlink()
    rewrite(folder / "config.json", eos_token_id=0)
    rewrite(folder / "tokenizer_config.json", eos_token="<|pad|>")
    assert load_model(spec(folder)).eos_ids == (0, 2)
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}\n### Answer:")
    chat = ChatFormat.from_option(str(tmp_path / "mine.jinja"), None)
    assert load_model(spec(folder), chat).eos_ids == (0,)
    assert load_model(spec(folder), ChatFormat(template=PUBLISHED)).eos_ids == (0, 2)


def test_a_token_that_the_model_does_not_embed_is_refused_where_it_is_needed(folder: Path) -> None:
    """A tokenizer with a few more than the model has is common; most of them are never used."""
    larger = build_tokenizer()
    larger.add_tokens(["kettles"])
    larger.save_pretrained(folder)
    encoder = Encoder(load_model(spec(folder)), ChatFormat())
    assert encoder.pairs([Record("What is due?", "Copper.", edge="A")])
    pattern = r"token 320 of its tokenizer, 'kettles', is needed, .* embeds 320 tokens"
    for needs in (encoder.prompts, encoder.answers, encoder.texts):
        with pytest.raises(ModelError, match=pattern):
            needs(["Forty kettles."])
    larger.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    larger.chat_template = larger.chat_template.replace("<|im_end|>", "<|end|>")
    larger.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"token 321 of its tokenizer, '<\|end\|>', is needed"):
        load_model(spec(folder))


def add_tensors(folder: Path, *names: str) -> None:
    tensors = load_file(folder / "model.safetensors") | {name: torch.ones(1) for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(build_model("llama").state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded: .*model.safetensors"),
        (pickle_weights, "cannot be loaded: .*safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 1000), "cannot be loaded"),
        # Transformers fills what is missing with random numbers and a warning.
        (lambda f: rewrite(f / "config.json", num_hidden_layers=4), r"lack.*layers.3"),
        # What it has no place for it leaves out, with a table at most.
        (
            lambda f: add_tensors(f, "model.layers.0.self_attn.sinks", "lm_head.bias"),
            r"2 tensors that llama models do not compute with, among them lm_head.bias, .*sinks",
        ),
        (lambda f: rewrite(f / "config.json", num_hidden_layers=2), r"9 tensors .*layers\.2\."),
        (lambda f: rewrite(f / "config.json", logits_scaling=8.0), "logits_scaling is 8.0, which"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(
    folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_model(spec(folder))


def test_what_no_answer_depends_on_may_lie_beside_the_weights(folder: Path) -> None:
    """A value head, and frequencies that older versions kept."""
    add_tensors(folder, "v_head.summary.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    rewrite(folder / "config.json", output_hidden_states=True, return_dict=False)
    config = load_model(spec(folder)).model.config
    assert (config.output_hidden_states, config.return_dict) == (False, True)


def test_what_is_quantised_remote_code_or_out_of_reach_is_refused_before_it_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of reach by the offline switch: without it the message comes after 20 s of retries."""
    from huggingface_hub import constants

    (folder / "model.safetensors").unlink()
    (folder / "mine.py").write_text("raise SystemExit('remote code ran')")
    rewrite(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\)"):
        load_model(spec(folder))
    rewrite(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"})
    with pytest.raises(ModelError, match="repeat the command with --trust-remote-code"):
        load_config(spec(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = r"model Qwen/Absent: .*hub could not be reached.*--model tiny"
    with pytest.raises(ModelError, match=message):
        load_config(spec("Qwen/Absent"))
    with pytest.raises(ModelError, match=r"scripts/fetch_smollm2 takes this one"):
        load_config(resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct"))


def test_model_paths_are_checked(folder: Path, adapter: Adapter, tmp_path: Path) -> None:
    assert check_weights(str(folder), "--model-path") == folder
    assert check_weights(str(adapter[0]), "--model-path") == adapter[0]
    assert (is_adapter(folder), is_adapter(adapter[0])) == (False, True)
    (tmp_path / "empty").mkdir()
    pickled = shutil.copytree(adapter[0], tmp_path / "adapter")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    pickle_weights(folder)
    for path, message in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "empty", "holds no config.json file.* adapter_config.json"),
        (folder, r"holds no \*\.safetensors file.*pickled"),
        (pickled, "safetensors"),
    ):
        with pytest.raises(ModelError, match=rf"--model-path .*{path.name}: .*{message}"):
            check_weights(str(path), "--model-path")


def test_names_folders_and_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name@main"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text, source, revision in (
        (TINY, TINY, None),
        ("org/other", "org/other", None),
        ("org/other@refs/pr/1", "org/other", "refs/pr/1"),
        ("org/other@", "org/other", None),
        ("qwen2.5-7b@abc", "Qwen/Qwen2.5-7B-Instruct", "abc"),
        ("org/name@main", str(folder), None),
        ("org", str(tmp_path / "org"), None),
    ):
        found = resolve_model(text)
        assert (found.source, found.revision) == (source, revision)
    for name, message in (
        ("qwen2.5-7", "unknown model 'qwen2.5-7'. Did you mean 'qwen2.5-7b'.*There are: tiny"),
        ("./absent", "--model ./absent: no such folder"),
        ("a/b/c", "unknown model 'a/b/c'"),
    ):
        with pytest.raises(ModelError, match=message):
            resolve_model(name)


def test_what_was_fetched_under_a_name_is_taken_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    name, hub = "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (resolve_model(name).source, resolve_model(name).origin) == (hub, "")
    fetched = shutil.copytree(folder, tmp_path / "cache" / "models" / name)
    found = resolve_model(name)
    assert (found.name, found.source, found.origin) == (name, str(fetched), FETCHED[name])
    assert {resolve_model(one).source for one in (hub, f"{name}@main")} == {hub}
    (fetched / "config.json").write_text(json.dumps({"num_hidden_layers": 10**6}))
    with pytest.raises(ModelError, match=f"--model {name}: "):
        resolve_model(name)
