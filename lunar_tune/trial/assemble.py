"""From options to a spec: names resolved, files read, sets split, everything checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lunar_tune.config.fields import check_values
from lunar_tune.config.run_options import NONE, TINY, ModelOptions, RunOptions
from lunar_tune.errors import Problems
from lunar_tune.methods.contract import Method
from lunar_tune.methods.method_registry import configure_method
from lunar_tune.metrics.embedding import check_embedding_model
from lunar_tune.metrics.names import check_metrics, find_metric
from lunar_tune.metrics.rouge import check_scorable
from lunar_tune.models.catalog import ModelSpec, check_model_path, resolve_model
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.device import check_fits, resolve_device
from lunar_tune.models.loading import load_config
from lunar_tune.paths import is_folder
from lunar_tune.trial.reference_engine import check_reference
from lunar_tune.trial.sets import read_sets
from lunar_tune.trial.spec import EngineSettings, TrialSpec

__all__ = [
    "assemble",
    "assemble_model",
    "check_family",
    "configured",
    "known_depth",
    "materialise",
    "materialise_model",
    "method_of",
]


def assemble(
    options: RunOptions, *, device_is_here: bool = True, gpu_share: float = 1.0
) -> TrialSpec:
    """Resolve and check everything that needs no weights.

    For `tiny` the spec's model source is its name until `materialise` has built it.

    Args:
        options: What was asked for.
        device_is_here: Whether the model will run on this machine, so that a device that is not
            here is a mistake.
        gpu_share: Of a GPU, for this model.

    Raises:
        InputError: Something is wrong; all of it is said at once.
    """
    problems = Problems()
    method = embedding_model = None
    metrics: tuple[str, ...] = ()
    model, chat = assemble_model(options, problems, device_is_here=device_is_here)
    with problems.collect():
        method = method_of(options)
        if options.engine == "reference":
            check_reference(method)
    with problems.collect():
        check_scorable((), tokenizer=options.rouge_tokenizer)
    check_values(options, problems)
    with problems.collect():
        metrics = _metrics(options)
    with problems.collect():
        if options.embedding_model is not None:
            embedding_model = check_embedding_model(options.embedding_model)
    if model is not None and device_is_here:
        with problems.collect():
            check_fits(
                model,
                trained=method is not None and method.variant == "full",
                share=gpu_share,
                budget_gib=options.memory_budget,
            )
    data = read_sets(options, model, problems)
    problems.raise_if_any()
    if model is None or chat is None or method is None or data is None:
        raise AssertionError("every None above comes with a noted problem")
    spec = TrialSpec(
        model=model,
        chat=chat,
        method=method,
        max_new_tokens=options.max_new_tokens,
        rouge_tokenizer=options.rouge_tokenizer,
        seed=options.seed,
        data=data,
        engine=_engine(options),
        metrics=metrics,
        embedding_model=embedding_model,
        text=options.text,
    )
    check_family(spec.model)
    return spec


def assemble_model(
    options: ModelOptions, problems: Problems, *, device_is_here: bool = True
) -> tuple[ModelSpec | None, ChatFormat | None]:
    """Return the model and the chat format; None where something is wrong, which is then noted.

    Args:
        options: What was asked for.
        problems: Where mistakes are noted.
        device_is_here: See `assemble`.
    """
    reference = model_path = chat = None
    with problems.collect():
        reference = resolve_model(options.model)
    with problems.collect():
        model_path = str(check_model_path(options.model_path)) if options.model_path else None
    with problems.collect():
        resolve_device(options.device if device_is_here else "cpu")
    with problems.collect():
        chat = ChatFormat.from_option(options.chat_template, options.system_prompt)
    if reference is None:
        return None, chat
    model = ModelSpec(
        name=reference.name,
        source=reference.source or TINY,
        weights=model_path,
        revision=reference.revision,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    return model, chat


def check_family(model: ModelSpec) -> None:
    """Refuse an unsuitable family where the configuration is on this machine.

    Raises:
        ModelError: It is unsuitable, or cannot be read.
    """
    if model.checkpoint != TINY and is_folder(Path(model.checkpoint)):
        load_config(model)


def materialise(
    spec: TrialSpec, on_progress: Callable[[int, int], None] | None = None
) -> TrialSpec:
    """Return the spec with a source that can be loaded: `tiny` is built if it does not exist yet.

    Args:
        spec: From `assemble`.
        on_progress: Called with epochs done and epochs in all while `tiny` is being built.
    """
    model = materialise_model(spec.model, on_progress)
    return spec if model is spec.model else dataclasses.replace(spec, model=model)


def materialise_model(
    model: ModelSpec, on_progress: Callable[[int, int], None] | None = None
) -> ModelSpec:
    """Return the model with a source that can be loaded; see `materialise`."""
    if model.source != TINY:
        return model
    from lunar_tune.finetuning.tiny import ensure_tiny

    return dataclasses.replace(model, source=str(ensure_tiny(on_progress=on_progress)))


def known_depth(options: RunOptions) -> int | None:
    """Return the number of decoder blocks if it can be known without weights or network.

    Raises:
        ModelError: The model's name means nothing.
    """
    reference = resolve_model(options.model)
    for folder in (options.model_path, reference.source if reference.is_local else None):
        if folder is not None and (depth := _configured_depth(Path(folder).expanduser())):
            return depth
    return reference.entry.n_layers if reference.entry is not None else None


def _configured_depth(folder: Path) -> int | None:
    """Return what a folder's config.json says; None where there is none that says it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    depth = config.get("num_hidden_layers") if isinstance(config, dict) else None
    return depth if isinstance(depth, int) else None


def method_of(options: RunOptions) -> Method:
    """Return the method that was asked for, with its settings.

    Raises:
        InputError: There is no such method.
    """
    return configured(options)[0]


def configured(options: RunOptions) -> tuple[Method, dict[str, Any]]:
    """Return the method with its settings, and the fixed ones of its parameters."""
    return configure_method(options.method, solver=options.solver, fixed=options.fixed)


def _metrics(options: RunOptions) -> tuple[str, ...]:
    """Return the further scores that are wanted, after checking that they can be had."""
    names, problems = check_metrics(options.metrics), Problems()
    for metric in map(find_metric, names):
        if "factual" in metric.sets and options.factual_data == NONE:
            problems.add(
                f"--metrics {metric.name}: there are no questions with --factual-data none."
            )
    problems.raise_if_any()
    return names


def _engine(options: RunOptions) -> EngineSettings:
    """Return what a trial keeps and skips, as far as options say."""
    return EngineSettings(
        reuse=options.engine == "fast",
        reference=options.engine == "reference",
        memory_budget=options.memory_budget,
        cache_limit=options.cache_limit,
    )
