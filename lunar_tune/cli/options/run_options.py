"""The table of a run's options: flag, field of `RunOptions`, panel, help.

Covers: every option that single runs, searches and other commands share, each once; texts that must
be read into a value.
Does not cover: how a command takes them (`given`), options of searches (`search_options`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lunar_tune.errors import InputError
from lunar_tune.metrics.names import LIKELIHOODS, METRICS
from lunar_tune.models.catalog import CATALOG

__all__ = ["LUNAR", "MODEL_PANEL", "PANELS", "RUN_OPTIONS", "RunOption"]

MODEL_PANEL = _MODEL = "Model"
_DATA, _METHOD, _ANSWERS = "Data", "Method", "Answers"
_GRADIENT, _ENGINE = "Gradient methods", "Memory and reuse"
PANELS = (_MODEL, _DATA, _METHOD, _GRADIENT, _ANSWERS, _ENGINE)
"""Of all of a run's options."""
LUNAR = "lunar"
_FURTHER = dict.fromkeys(m.quantity for m in METRICS.values() if LIKELIHOODS in m.needs)


@dataclass(frozen=True, slots=True)
class RunOption:
    """One option and the field it sets."""

    flag: str
    path: str
    """Field of `RunOptions`, dotted for a nested one."""
    kind: Any
    panel: str
    help: str
    metavar: str | None = None
    parse: Callable[[Any], Any] = lambda value: value
    gradient_path: str | None = None
    """The field instead, where the method is a gradient method."""

    def path_for(self, method: str) -> str:
        """Return the field that it sets for a method."""
        return self.path if method == LUNAR or self.gradient_path is None else self.gradient_path


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _metrics(text: str) -> tuple[str, ...]:
    if not (metrics := _names(text)):
        raise InputError("--metrics is empty: name at least one, for example forget_mrr.")
    return metrics


def _split(text: str) -> tuple[str, ...]:
    edges = _names(text)
    if not edges:
        raise InputError("--forget-edge is empty: name at least one edge, or leave it out for A_B.")
    return edges


def _points(text: str) -> float | None:
    try:
        return None if text == "all" else float(text)
    except ValueError:
        raise InputError(f"--retain-points {text}: all, or a number such as 1.") from None


RUN_OPTIONS = (
    RunOption(
        "--model", "model", str, _MODEL, f"Catalogue name ({', '.join(CATALOG)}), hub id or folder."
    ),
    RunOption(
        "--model-path",
        "model_path",
        str | None,
        _MODEL,
        "Fine-tuned weights: a checkpoint folder, or a PEFT adapter folder, merged on load.",
    ),
    RunOption("--revision", "revision", str | None, _MODEL, "Branch, tag or commit on the hub."),
    RunOption(
        "--dtype",
        "dtype",
        str,
        _MODEL,
        "auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or float16.",
    ),
    RunOption("--device", "device", str, _MODEL, "auto, cpu or cuda."),
    RunOption(
        "--chat-template",
        "chat_template",
        str,
        _MODEL,
        "own (the tokenizer's), published (the published code's bare user turn) or a Jinja file.",
        metavar="own|published|FILE",
    ),
    RunOption(
        "--system-prompt",
        "system_prompt",
        str | None,
        _MODEL,
        "System turn before each question; without it the template decides.",
    ),
    RunOption(
        "--trust-remote-code",
        "trust_remote_code",
        bool,
        _MODEL,
        "Let Python code that comes with the checkpoint run.",
    ),
    RunOption(
        "--data",
        "data",
        str | None,
        _DATA,
        "Pairs that the model knows: mini, contracts, a fetched name (scripts/fetch_datasets) or "
        "a JSON, JSONL, Parquet or Arrow file. Default: mini for tiny, else contracts.",
    ),
    RunOption(
        "--forget-edge",
        "forget_edges",
        str | None,
        _DATA,
        "Edges, or groups of them, to forget, with commas between. Default: A_B.",
        metavar="EDGE[,EDGE…]",
        parse=_split,
    ),
    RunOption(
        "--retain-data",
        "retain_data",
        str | None,
        _DATA,
        "Another retain set for the fit; without it, all other edges.",
    ),
    RunOption(
        "--factual-data", "factual_data", str, _DATA, "General knowledge: factual, a file, or none."
    ),
    RunOption(
        "--reference-prompts",
        "reference_prompts",
        str,
        _DATA,
        "Prompts that the model declines: unverifiable, harmful, or a file.",
    ),
    RunOption(
        "--retain-rows",
        "retain_rows",
        int | None,
        _DATA,
        "Judge trials on a sample of the retain set of this size, by edge. Default: all rows.",
    ),
    RunOption(
        "--evaluation-rows",
        "evaluation_rows",
        int | None,
        _DATA,
        "Evaluate the first rows of each set only (the published code: 200). Default: all rows.",
    ),
    RunOption(
        "--holdout",
        "holdout",
        bool,
        _DATA,
        "Judge trials on one half of every edge and report on the other, which nothing was tuned "
        "on.",
    ),
    RunOption(
        "--refusals",
        "refusals",
        str,
        _DATA,
        "Answers that decline, which dpo prefers and refusal_quality compares with: refusals, or a "
        "file with one a line.",
    ),
    RunOption(
        "--text/--no-text",
        "text",
        bool,
        _DATA,
        "Keep questions and answers out of files, MLflow and messages: rows have their numbers and "
        "scores. Saved models and kept activations are what they are.",
    ),
    RunOption(
        "--method",
        "method",
        str,
        _METHOD,
        "lunar, or a gradient method: ga, gd, ukl, dpo, npo, simnpo, rmu.",
    ),
    RunOption(
        "--solver", "lunar.solver", str, _METHOD, "adamw (as published), closed_form or lora."
    ),
    RunOption(
        "--train",
        "gradient.trained",
        str,
        _GRADIENT,
        "lora (an adapter on every linear map) or full (all weights).",
    ),
    RunOption(
        "--rank",
        "lunar.rank",
        int,
        _METHOD,
        "Of the lora solver, and of the gradient methods' adapter.",
        gradient_path="gradient.rank",
    ),
    RunOption("--alpha", "gradient.alpha", float, _GRADIENT, "The adapter's scale times its rank."),
    RunOption(
        "--dropout", "gradient.dropout", float, _GRADIENT, "Of the adapter's inputs, in training."
    ),
    RunOption(
        "--train-batch-size", "gradient.batch_size", int, _GRADIENT, "Answers to forget in a step."
    ),
    RunOption(
        "--beta", "gradient.beta", float | None, _GRADIENT, "Default: 0.1 (dpo, npo), 2.5 (simnpo)."
    ),
    RunOption("--gamma", "gradient.gamma", float, _GRADIENT, "Margin of simnpo."),
    RunOption(
        "--retain-weight",
        "gradient.retain_weight",
        float,
        _GRADIENT,
        "Weight of the usual loss on answers to keep, in npo and simnpo.",
    ),
    RunOption(
        "--steering-alpha",
        "gradient.steering_alpha",
        float,
        _GRADIENT,
        "Weight of keeping retained activations, in rmu.",
    ),
    RunOption(
        "--checkpointing",
        "gradient.checkpointing",
        bool,
        _GRADIENT,
        "Compute activations again in the backward pass, which takes less memory.",
    ),
    RunOption(
        "--positions",
        "lunar.positions",
        str,
        _METHOD,
        "Tokens of a forget prompt that are moved: all (as published) or last.",
    ),
    RunOption(
        "--retain-points",
        "lunar.retain_points",
        str,
        _METHOD,
        "Retain tokens in the fit: all "
        "(as published), or so many for each forget token (the paper: 1).",
        metavar="all|K",
        parse=_points,
    ),
    RunOption(
        "--epochs",
        "lunar.adamw.epochs",
        int,
        _METHOD,
        "Epochs of adamw and of the gradient methods.",
        gradient_path="gradient.epochs",
    ),
    RunOption(
        "--master-dtype",
        "lunar.adamw.master_dtype",
        str,
        _METHOD,
        "Number format of the trained matrix: float32, or bfloat16 as published.",
    ),
    RunOption(
        "--weight-decay",
        "lunar.adamw.weight_decay",
        float | None,
        _METHOD,
        "Default: 0 (lunar in float32), 0.01 (lunar in bfloat16, gradient methods).",
        gradient_path="gradient.weight_decay",
    ),
    RunOption(
        "--max-new-tokens",
        "decoding.max_new_tokens",
        int | None,
        _ANSWERS,
        "Token budget "
        "of an answer. Default: 512, as published; in a search's trials twice the longest true "
        "answer.",
    ),
    RunOption(
        "--repetition-penalty",
        "decoding.repetition_penalty",
        float,
        _ANSWERS,
        "1.0 is none, whatever the checkpoint asks for.",
    ),
    RunOption(
        "--batch-size",
        "decoding.batch_size",
        int | None,
        _ANSWERS,
        "Answers generated together. Default: what suits the device.",
    ),
    RunOption(
        "--rouge-tokenizer",
        "rouge_tokenizer",
        str,
        _ANSWERS,
        "Words that ROUGE counts: default (a-z and digits, stemmed) or words (every script).",
    ),
    RunOption(
        "--metrics",
        "metrics",
        str | None,
        _ANSWERS,
        "Scores to report beside ROUGE, with commas between, for example forget_mrr,retain_mrr: "
        f"{{forget,retain,factual}}_{{{','.join(_FURTHER)}}}, refusal_quality.",
        metavar="METRIC[,METRIC…]",
        parse=_metrics,
    ),
    RunOption(
        "--embedding-model",
        "embedding_model",
        str | None,
        _ANSWERS,
        "Sentence-embedding model, hub id or folder, in which answers are compared with refusals. "
        "Default: the model's own states.",
        metavar="NAME",
    ),
    RunOption("--seed", "seed", int, _METHOD, "Of everything random."),
    RunOption(
        "--early-exit/--whole-answers",
        "engine.early_exit",
        bool,
        _ANSWERS,
        "End an answer that has said every word of the truth: its ROUGE recall is 1 whatever "
        "follows. Default: in searches.",
    ),
    RunOption(
        "--reuse/--no-reuse",
        "engine.reuse",
        bool,
        _ENGINE,
        "Compute prompts once and check the unmodified model's answers first. Gives the same "
        "answers, up to rounding.",
    ),
    RunOption(
        "--verify-weights",
        "engine.verify_weights",
        bool,
        _ENGINE,
        "Look at every weight after each trial, whether it is bit for bit what it was.",
    ),
    RunOption(
        "--checks",
        "engine.checks",
        int,
        _ENGINE,
        "Looks at a search's gradient fit while it goes on; one that has lost the retain set ends. "
        "0: none.",
    ),
    RunOption(
        "--memory-budget",
        "engine.memory_budget",
        float | None,
        _ENGINE,
        "GiB of the GPU that weights, streams and batches share. Default: all that is free.",
        metavar="GIB",
    ),
    RunOption(
        "--cache-limit",
        "engine.cache_limit",
        float | None,
        _ENGINE,
        "GiB that activations on disk may take; 0 keeps none there. Default: a quarter of the "
        "disk's free space, at most 100. See python -m lunar_tune.cache.",
        metavar="GIB",
    ),
)
