"""Options of a run: model, data, method, answers. A single run and a search share them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lunar_tune.config.fields import option
from lunar_tune.display import Concise
from lunar_tune.errors import InputError

NONE, OWN, TINY = "none", "own", "tiny"
ENGINES = ("fast", "plain", "reference")
LARGEST_SEED = 2**32 - 1  # what numpy takes, and Optuna's samplers with it
LEAST_BUDGET = 32  # tokens, where the budget follows the true answers
PUBLISHED_MAX_NEW_TOKENS = 512  # config/forget.yaml of the published code at dfa56eb
MODEL, DATA, METHOD, ANSWERS, MEMORY = "Model", "Data", "Method", "Answers", "Memory and speed"
model_option = functools.partial(option, group=MODEL)
data_option = functools.partial(option, group=DATA)
method_option = functools.partial(option, group=METHOD)
answer_option = functools.partial(option, group=ANSWERS)
memory_option = functools.partial(option, group=MEMORY)


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelOptions(Concise):
    """Which model, loaded and asked how."""

    model: str = model_option(TINY, common=True, resume=True, place=True)
    """Catalogue name, hub id (owner/name[@revision]) or folder."""
    model_path: str | None = model_option(None, metavar="DIR", common=True, resume=True, place=True)
    """Fine-tuned weights: a folder of a checkpoint or of a PEFT adapter."""
    dtype: str = model_option(
        "auto", choices=("auto", "float32", "bfloat16", "float16"), decides=True
    )
    """Number format of the weights; auto is bfloat16 on a GPU, float32 on a CPU."""
    device: str = model_option("auto", resume=True)
    """auto, cpu or cuda."""
    chat_template: str = model_option(OWN, metavar="own|published|FILE", resume=True, place=True)
    """own (the tokenizer's), published (the published code's bare user turn) or a Jinja file."""
    system_prompt: str | None = model_option(None)
    """System turn before each question; without it the template decides."""
    trust_remote_code: bool = model_option(False)
    """Let Python code that comes with the checkpoint run."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DataOptions(Concise):
    """What is to be forgotten, what is to be kept, and how that is judged."""

    data: str | None = data_option(None, common=True, resume=True, place=True)
    """Pairs that the model knows: a shipped or fetched name, or a file. Default: mini for tiny,
    else contracts."""
    forget_edge: tuple[str, ...] = data_option((), metavar="EDGE,…", commas=True, common=True)
    """Edges or groups to forget. Default: A_B."""
    factual_data: str = data_option("factual", resume=True, place=True)
    """General knowledge: factual, a file, or none."""
    reference_prompts: str = data_option("unverifiable", resume=True, place=True)
    """Prompts that the model declines: unverifiable, harmful, or a file."""
    refusals: str = data_option("refusals", resume=True, place=True)
    """Answers that decline, which dpo prefers and refusal_quality compares with: refusals, or a
    file with one a line."""
    retain_data: str | None = data_option(None, resume=True, place=True)
    """Another retain set for the fit; without it, all other edges."""
    retain_rows: int | None = data_option(None, least=1)
    """Judge trials on a sample of the retain set of this size, by edge. Default: all rows."""
    evaluation_rows: int | None = data_option(None, least=1)
    """Evaluate the first rows of each set only (the published code: 200). Default: all rows."""
    holdout: bool = data_option(False)
    """Judge trials on one half of every edge and report on the other, which nothing was tuned
    on."""
    text: bool = data_option(True)
    """Keep questions and answers in files, MLflow and messages; without, rows have their numbers
    and scores. Saved models and kept activations are what they are."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RunOptions(ModelOptions, DataOptions):
    """Everything that a single run is told, except its setting."""

    method: str = method_option("lunar", common=True)
    """Unlearning method, for example lunar or npo; a wrong name lists all."""
    solver: str | None = method_option(None, common=True)
    """How lunar fits, for example closed_form. Default: adamw."""
    fix: tuple[str, ...] = method_option((), metavar="NAME=VALUE", common=True, decides=True)
    """Fix parameters or settings of the method: layer=22, rank=16, trained=full."""
    seed: int = method_option(0, least=0, most=LARGEST_SEED, common=True, decides=True)
    """Random seed."""
    max_new_tokens: int | None = answer_option(PUBLISHED_MAX_NEW_TOKENS, least=1, decides=True)
    """Token budget of an answer."""
    rouge_tokenizer: str = answer_option("default", decides=True)
    """Words that ROUGE counts: default (a-z and digits, stemmed) or words (every script)."""
    metrics: tuple[str, ...] = answer_option((), metavar="METRIC,…", commas=True)
    """Scores to report beside ROUGE, for example forget_mrr,retain_mrr; a wrong name lists all."""
    embedding_model: str | None = answer_option(None, resume=True, place=True)
    """Sentence-embedding model, hub id or folder, in which answers are compared with refusals.
    Default: the model's own states."""
    engine: str = memory_option("fast", choices=ENGINES, resume=True)
    """fast (what trials share is computed once), plain (every answer from its first token on) or,
    for a single run, reference (lunar_tune/reference.py). All give the same answers, up to
    rounding."""
    memory_budget: float | None = memory_option(None, metavar="GIB", above=0, resume=True)
    """GiB of the GPU that weights, streams and batches share. Default: all that is free."""
    cache_limit: float | None = memory_option(None, metavar="GIB", least=0, resume=True)
    """GiB that activations on disk may take; 0 keeps none there. Default: a quarter of the disk's
    free space, at most 100."""

    @property
    def fixed(self) -> Mapping[str, Any]:
        """What is fixed, by name."""
        return read_assignments(self.fix)


def read_assignments(texts: tuple[str, ...]) -> dict[str, Any]:
    """Return `NAME=VALUE` texts as values by name; a list where there are commas.

    Raises:
        InputError: A text is no assignment, or a name stands twice.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not (name and sign and value):
            raise InputError(f"--fix {text}: write NAME=VALUE, for example layer=22.")
        name = name.replace("-", "_")
        if name in values:
            raise InputError(f"--fix {text}: {name} is fixed twice.")
        parts = [_value(part.strip()) for part in value.split(",")]
        values[name] = parts[0] if len(parts) == 1 else parts
    return values


def read_range(text: str) -> tuple[str, float, float]:
    """Return name and bounds of a text `NAME=LOW:HIGH`, or raise an InputError."""
    name, _, values = text.partition("=")
    low, _, high = values.partition(":")
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = 1.0, 0.0
    if not name.strip() or not bounds[0] <= bounds[1]:
        raise InputError(f"--range {text}: write NAME=LOW:HIGH, for example coefficient=0.5:4.")
    return name.strip().replace("-", "_"), *bounds


def _value(text: str) -> Any:
    """Return a text as the number or truth value that it spells, else as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
