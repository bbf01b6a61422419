"""Trials on random models with small data, and what transformers alone says of a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import engine_cases
from scores_by_hand import prompt_of
from transformers import AutoTokenizer

from lunar_tune.config.options import RunOptions
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.spec import TrialSpec


def write_records(file: Path, edges: Mapping[str, int], *, answer: str = "Kettles {}.") -> str:
    """Write so many pairs of each edge; return the file."""
    rows = [
        {"edge": edge, "question": f"What of {edge}, {n}?", "answer": answer.format(n)}
        for edge, count in edges.items()
        for n in range(count)
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    return str(file)


def random_spec(
    model: Path, data: str, *, changed: Mapping[str, Any] | None = None, **options: Any
) -> TrialSpec:
    """Return what short trials of a model need: two epochs, three reference prompts."""
    own = {"device": "cpu", "factual_data": "none", "max_new_tokens": 3, "cache_limit": 0}
    own["reference_check"] = "never"
    lunar = options.get("method", "lunar") == "lunar" and options.get("solver") != "closed_form"
    own["fix"] = ("epochs=2",) if lunar else ()
    made = assemble(RunOptions(model=str(model), data=data, **(own | options)))
    few = dataclasses.replace(made.data, reference_prompts=made.data.reference_prompts[:3])
    return dataclasses.replace(made, data=few, **(changed or {}))


def generated(folder: Path, model: Any, questions: Sequence[str], *, budget: int) -> list[str]:
    """Ask transformers, one question at a time, with its own chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts, eos = [prompt_of(tokenizer, one) for one in questions], [tokenizer.eos_token_id]
    said = engine_cases.generated(model, prompts, budget=budget, eos=eos, alone=True)
    return list(tokenizer.batch_decode(said, skip_special_tokens=True))
