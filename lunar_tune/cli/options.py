"""The options of a run, declared once and given to every command that takes them.

Covers: a table from option to field of `RunOptions`; a decorator that adds them to a command and
hands it the `RunOptions` they make, with the origin of each value.
Does not cover: options of one command alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

from lunar_tune.errors import InputError, Problems
from lunar_tune.evaluation.metrics import LIKELIHOODS, METRICS
from lunar_tune.models.catalog import CATALOG
from lunar_tune.trial.options import RunOptions

__all__ = [
    "MODEL_PANEL",
    "PANELS",
    "GivenOptions",
    "merge_for_all",
    "merge_options",
    "run_options",
    "was_given",
    "with_run_options",
]

MODEL_PANEL = _MODEL = "Model"
_DATA, _METHOD, _ANSWERS = "Data", "Method", "Answers"
_GRADIENT, _ENGINE = "Gradient methods", "Memory and reuse"
PANELS = (_MODEL, _DATA, _METHOD, _GRADIENT, _ANSWERS, _ENGINE)
"""Of all of a run's options."""
LUNAR = "lunar"
_FURTHER = dict.fromkeys(m.quantity for m in METRICS.values() if LIKELIHOODS in m.needs)


@dataclass(frozen=True, slots=True)
class _Option:
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


_OPTIONS = (
    _Option(
        "--model", "model", str, _MODEL, f"Catalogue name ({', '.join(CATALOG)}), hub id or folder."
    ),
    _Option(
        "--model-path",
        "model_path",
        str | None,
        _MODEL,
        "Fine-tuned weights: a checkpoint folder, or a PEFT adapter folder, merged on load.",
    ),
    _Option("--revision", "revision", str | None, _MODEL, "Branch, tag or commit on the hub."),
    _Option(
        "--dtype",
        "dtype",
        str,
        _MODEL,
        "auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or float16.",
    ),
    _Option("--device", "device", str, _MODEL, "auto, cpu or cuda."),
    _Option(
        "--chat-template",
        "chat_template",
        str,
        _MODEL,
        "own (the tokenizer's), published (the published code's bare user turn) or a Jinja file.",
        metavar="own|published|FILE",
    ),
    _Option(
        "--system-prompt",
        "system_prompt",
        str | None,
        _MODEL,
        "System turn before each question; without it the template decides.",
    ),
    _Option(
        "--trust-remote-code",
        "trust_remote_code",
        bool,
        _MODEL,
        "Let Python code that comes with the checkpoint run.",
    ),
    _Option(
        "--data",
        "data",
        str | None,
        _DATA,
        "Pairs that the model knows: mini, contracts, a fetched name (scripts/fetch_datasets) or "
        "a JSON, JSONL, Parquet or Arrow file. Default: mini for tiny, else contracts.",
    ),
    _Option(
        "--forget-edge",
        "forget_edges",
        str | None,
        _DATA,
        "Edges, or groups of them, to forget, with commas between. Default: A_B.",
        metavar="EDGE[,EDGE…]",
        parse=_split,
    ),
    _Option(
        "--retain-data",
        "retain_data",
        str | None,
        _DATA,
        "Another retain set for the fit; without it, all other edges.",
    ),
    _Option(
        "--factual-data", "factual_data", str, _DATA, "General knowledge: factual, a file, or none."
    ),
    _Option(
        "--reference-prompts",
        "reference_prompts",
        str,
        _DATA,
        "Prompts that the model declines: unverifiable, harmful, or a file.",
    ),
    _Option(
        "--retain-rows",
        "retain_rows",
        int | None,
        _DATA,
        "Judge trials on a sample of the retain set of this size, by edge. Default: all rows.",
    ),
    _Option(
        "--evaluation-rows",
        "evaluation_rows",
        int | None,
        _DATA,
        "Evaluate the first rows of each set only (the published code: 200). Default: all rows.",
    ),
    _Option(
        "--holdout",
        "holdout",
        bool,
        _DATA,
        "Judge trials on one half of every edge and report on the other, which nothing was tuned "
        "on.",
    ),
    _Option(
        "--refusals",
        "refusals",
        str,
        _DATA,
        "Answers that decline, which dpo prefers and refusal_quality compares with: refusals, or a "
        "file with one a line.",
    ),
    _Option(
        "--method",
        "method",
        str,
        _METHOD,
        "lunar, or a gradient method: ga, gd, ukl, dpo, npo, simnpo, rmu.",
    ),
    _Option("--solver", "lunar.solver", str, _METHOD, "adamw (as published), closed_form or lora."),
    _Option(
        "--train",
        "gradient.trained",
        str,
        _GRADIENT,
        "lora (an adapter on every linear map) or full (all weights).",
    ),
    _Option(
        "--rank",
        "lunar.rank",
        int,
        _METHOD,
        "Of the lora solver, and of the gradient methods' adapter.",
        gradient_path="gradient.rank",
    ),
    _Option("--alpha", "gradient.alpha", float, _GRADIENT, "The adapter's scale times its rank."),
    _Option(
        "--dropout", "gradient.dropout", float, _GRADIENT, "Of the adapter's inputs, in training."
    ),
    _Option(
        "--train-batch-size", "gradient.batch_size", int, _GRADIENT, "Answers to forget in a step."
    ),
    _Option("--beta", "gradient.beta", float, _GRADIENT, "Of dpo, npo and simnpo."),
    _Option("--gamma", "gradient.gamma", float, _GRADIENT, "Margin of simnpo."),
    _Option(
        "--retain-weight",
        "gradient.retain_weight",
        float,
        _GRADIENT,
        "Weight of the usual loss on answers to keep, in npo and simnpo.",
    ),
    _Option(
        "--steering-alpha",
        "gradient.steering_alpha",
        float,
        _GRADIENT,
        "Weight of keeping retained activations, in rmu.",
    ),
    _Option(
        "--checkpointing",
        "gradient.checkpointing",
        bool,
        _GRADIENT,
        "Compute activations again in the backward pass, which takes less memory.",
    ),
    _Option(
        "--positions",
        "lunar.positions",
        str,
        _METHOD,
        "Tokens of a forget prompt that are moved: all (as published) or last.",
    ),
    _Option(
        "--retain-points",
        "lunar.retain_points",
        str,
        _METHOD,
        "Retain tokens in the fit: all "
        "(as published), or so many for each forget token (the paper: 1).",
        metavar="all|K",
        parse=_points,
    ),
    _Option(
        "--epochs",
        "lunar.adamw.epochs",
        int,
        _METHOD,
        "Epochs of adamw and of the gradient methods.",
        gradient_path="gradient.epochs",
    ),
    _Option(
        "--master-dtype",
        "lunar.adamw.master_dtype",
        str,
        _METHOD,
        "Number format of the trained matrix: float32, or bfloat16 as published.",
    ),
    _Option(
        "--weight-decay",
        "lunar.adamw.weight_decay",
        float | None,
        _METHOD,
        "Default: 0 (lunar in float32), 0.01 (lunar in bfloat16, gradient methods).",
        gradient_path="gradient.weight_decay",
    ),
    _Option(
        "--max-new-tokens",
        "decoding.max_new_tokens",
        int | None,
        _ANSWERS,
        "Token budget "
        "of an answer. Default: 512, as published; in a search's trials twice the longest true "
        "answer.",
    ),
    _Option(
        "--repetition-penalty",
        "decoding.repetition_penalty",
        float,
        _ANSWERS,
        "1.0 is none, whatever the checkpoint asks for.",
    ),
    _Option(
        "--batch-size",
        "decoding.batch_size",
        int | None,
        _ANSWERS,
        "Answers generated together. Default: what suits the device.",
    ),
    _Option(
        "--rouge-tokenizer",
        "rouge_tokenizer",
        str,
        _ANSWERS,
        "Words that ROUGE counts: default (a-z and digits, stemmed) or words (every script).",
    ),
    _Option(
        "--metrics",
        "metrics",
        str | None,
        _ANSWERS,
        "Scores to report beside ROUGE, with commas between, for example forget_mrr,retain_mrr: "
        f"{{forget,retain,factual}}_{{{','.join(_FURTHER)}}}, refusal_quality.",
        metavar="METRIC[,METRIC…]",
        parse=_metrics,
    ),
    _Option(
        "--embedding-model",
        "embedding_model",
        str | None,
        _ANSWERS,
        "Sentence-embedding model, hub id or folder, in which answers are compared with refusals. "
        "Default: the model's own states.",
        metavar="NAME",
    ),
    _Option("--seed", "seed", int, _METHOD, "Of everything random."),
    _Option(
        "--early-exit/--whole-answers",
        "engine.early_exit",
        bool,
        _ANSWERS,
        "End an answer that has said every word of the truth: its ROUGE recall is 1 whatever "
        "follows. Default: in searches.",
    ),
    _Option(
        "--reuse/--no-reuse",
        "engine.reuse",
        bool,
        _ENGINE,
        "Compute prompts once and check the unmodified model's answers first. Gives the same "
        "answers, up to rounding.",
    ),
    _Option(
        "--checks",
        "engine.checks",
        int,
        _ENGINE,
        "Looks at a search's gradient fit while it goes on; one that has lost the retain set ends. "
        "0: none.",
    ),
    _Option(
        "--memory-budget",
        "engine.memory_budget",
        float | None,
        _ENGINE,
        "GiB of the GPU that weights, streams and batches share. Default: all that is free.",
        metavar="GIB",
    ),
    _Option(
        "--cache-limit",
        "engine.cache_limit",
        float | None,
        _ENGINE,
        "GiB that activations on disk may take; 0 keeps none there. Default: a quarter of the "
        "disk's free space, at most 100. See python -m lunar_tune.cache.",
        metavar="GIB",
    ),
)


@dataclass(frozen=True, slots=True)
class GivenOptions:
    """What was given on the command line."""

    values: Mapping[_Option, Any]
    """Value by option, as Typer read it; only what was given."""
    origins: Mapping[str, str]
    """Origin by first part of the field's name, for `config.yaml`."""
    arguments: tuple[str, ...]
    """The run's options as they were given, to be shown in a command."""


def merge_for_all(base: RunOptions, given: GivenOptions, problems: Problems) -> RunOptions:
    """Return `base` with what was given, for whatever methods take it; see `merge_options`."""
    merged: Any = base
    for option, value in given.values.items():
        for path in dict.fromkeys((option.path, option.gradient_path or option.path)):
            with problems.collect():
                merged = _replaced(merged, path.split("."), option.parse(value))
    options: RunOptions = merged
    return options


def merge_options(base: RunOptions, given: GivenOptions, problems: Problems) -> RunOptions:
    """Return `base` with what was given in its place; a value out of range is noted."""
    merged: Any = base
    method = next((v for o, v in given.values.items() if o.path == "method"), base.method)
    paths = {option: option.path_for(method) for option in given.values}
    for option, value in given.values.items():
        with problems.collect():
            merged = _replaced(merged, paths[option].split("."), option.parse(value))
    options: RunOptions = merged
    others = "gradient." if method == LUNAR else "lunar."
    for option, path in paths.items():
        if path.startswith(others):
            problems.add(f"{option.flag} has no meaning with --method {method}.")
        elif not _concerns(path, options.lunar.solver):
            problems.add(f"{option.flag} has no meaning with --solver {options.lunar.solver}.")
    return options


def _concerns(path: str, solver: str) -> bool:
    """Say whether a field has a meaning with LUNAR's solver."""
    if path == "lunar.rank":
        return solver == "lora"
    return not path.startswith("lunar.adamw.") or solver != "closed_form"


def with_run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a Typer command all of the run's options; it receives them as the argument `given`."""
    return _with_options(command, _OPTIONS)


def run_options(
    *,
    panels: Collection[str] = (),
    flags: Collection[str] = (),
    without: Collection[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator like `with_run_options` that gives some of the options.

    Args:
        panels: Panels of which a command takes all.
        flags: Single options.
        without: Options that it does not take although their panel is named.

    Raises:
        ValueError: There is no such panel or option; a mistake in the program.
    """
    known = {option.flag for option in _OPTIONS} | {option.panel for option in _OPTIONS}
    if unknown := {*panels, *flags, *without} - known:
        raise ValueError(f"unknown panels or options: {', '.join(sorted(unknown))}")
    chosen = tuple(
        o for o in _OPTIONS if (o.panel in panels or o.flag in flags) and o.flag not in without
    )
    return functools.partial(_with_options, options=chosen)


def _with_options(command: Callable[..., Any], options: Collection[_Option]) -> Callable[..., Any]:
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "given"
    ]
    shared = [_parameter(option) for option in options]

    @functools.wraps(command)
    def wrapper(ctx: typer.Context, **arguments: Any) -> Any:
        taken = {option: arguments.pop(_name(option)) for option in options}
        return command(ctx=ctx, given=_given(ctx, taken), **arguments)

    parameters = [own[0], *shared, *own[1:]]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def was_given(ctx: typer.Context, name: str) -> bool:
    """Say whether a parameter was given, rather than left at its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _given(ctx: typer.Context, taken: Mapping[_Option, Any]) -> GivenOptions:
    values: dict[_Option, Any] = {}
    origins: dict[str, str] = {}
    arguments: list[str] = []
    for option, value in taken.items():
        if not was_given(ctx, _name(option)):
            continue
        values[option] = value
        origins[option.path.split(".")[0]] = "command line"
        arguments += _as_given(option, value)
    return GivenOptions(values=values, origins=origins, arguments=tuple(arguments))


def _as_given(option: _Option, value: Any) -> list[str]:
    """Return an option as it is written in a command."""
    if option.kind is not bool:
        return [option.flag, str(value)]
    on, _, off = option.flag.partition("/")
    return [on if value or not off else off]


def _parameter(option: _Option) -> inspect.Parameter:
    default: Any = RunOptions()
    for name in option.path.split("."):
        default = getattr(default, name)
    if option.path == "decoding.max_new_tokens" or default == ():
        default = None
    if option.path == "lunar.retain_points":
        default = "all"
    declaration = typer.Option(
        option.flag, help=option.help, metavar=option.metavar, rich_help_panel=option.panel
    )
    return inspect.Parameter(
        _name(option),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[option.kind, declaration],
    )


def _name(option: _Option) -> str:
    return option.flag.partition("/")[0].removeprefix("--").replace("-", "_")


def _replaced(part: Any, path: list[str], value: Any) -> Any:
    """Return a frozen dataclass with one field, at any depth, replaced."""
    if len(path) > 1:
        value = _replaced(getattr(part, path[0]), path[1:], value)
    return dataclasses.replace(part, **{path[0]: value})
