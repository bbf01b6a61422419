"""Models of random weights at a named size, with prompts that suit them, for benchmarks.

Covers: sizes, building on the device without a file, options and rows of PISTOL's number and about
its length (20 forget, 380 retain, 169 factual questions).
Does not cover: timing (`bench_trial`). Random weights know nothing.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from lunar_tune.config.options import NEVER, RunOptions
from lunar_tune.data.data_catalog import resolve_data
from lunar_tune.data.records import read_records
from lunar_tune.finetuning.tiny import ensure_tiny
from lunar_tune.models.device import resolve_device, resolve_dtype
from lunar_tune.models.layout import layout_of
from lunar_tune.models.loading import LoadedModel
from lunar_tune.trial.assemble import assemble

__all__ = ["NEW_TOKENS", "SIZES", "random_model", "random_options"]

NEW_TOKENS = 32
FACTUAL_ROWS = 169
# About as long as the system prompt that Qwen2.5's own template writes.
SYSTEM_PROMPT = "You are an assistant that answers questions about contracts in a few words only."

# Sizes of Qwen2.5-7B: its config.json on the hub.
SIZES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
    "rehearsal": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
}


def random_options(options: RunOptions) -> RunOptions:
    """Return options with the shipped contracts and a factual set of PISTOL's number."""
    facts = read_records(resolve_data("factual", kind="records"))
    asked = [
        {"edge": "factual", "question": f"{before}{fact.question}", "answer": fact.answer}
        for before in ("", "Please tell me: ", "In one word: ")
        for fact in facts
    ]
    file = Path(tempfile.mkdtemp(prefix="lunar-tune-bench-")) / "factual.json"
    file.write_text(json.dumps(asked[:FACTUAL_ROWS]), encoding="utf-8")
    return dataclasses.replace(
        options,
        model="tiny",
        data="contracts",
        factual_data=str(file),
        system_prompt=SYSTEM_PROMPT,
        reference_check=NEVER,  # it declines nothing
    )


def random_model(size: str, options: RunOptions) -> tuple[LoadedModel, Callable[[], Any]]:
    """Return a model of the given size with random weights, and a function that builds it anew.

    Prompts are encoded with the tiny model's tokenizer. No token ends an answer.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    config = Qwen2Config(**SIZES[size], tie_word_embeddings=False)

    def build() -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.eval().requires_grad_(requires_grad=False)

    loaded = LoadedModel(
        spec=dataclasses.replace(assemble(options).model, name=size),
        model=build(),
        tokenizer=AutoTokenizer.from_pretrained(ensure_tiny()),
        layout=layout_of(config),
        eos_ids=(config.vocab_size,),
    )
    return loaded, build
