"""From options to a spec: names resolved, files read, sets split, everything checked.

Covers: all that can be known without weights; every mistake in one message; making `tiny` exist.
Does not cover: loading the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from lunar_tune.data.bundled import resolve_data
from lunar_tune.data.readers import read_prompts, read_records
from lunar_tune.data.records import Record
from lunar_tune.data.splits import Split, edges_of, sample_by_edge, split_by_edges
from lunar_tune.errors import DataError, Problems
from lunar_tune.evaluation.rouge import check_scorable
from lunar_tune.methods.contract import METHODS, Method
from lunar_tune.methods.gradient import GradientMethod
from lunar_tune.methods.lunar import LunarMethod
from lunar_tune.methods.objectives import OBJECTIVES
from lunar_tune.methods.rmu import RmuMethod
from lunar_tune.models.catalog import TINY, resolve_model
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.loading import ModelSpec, check_model_path, load_config
from lunar_tune.runtime import resolve_device, resolve_dtype
from lunar_tune.trial.options import NONE, RunOptions
from lunar_tune.trial.spec import DataSets, TrialSpec

__all__ = [
    "assemble",
    "assemble_model",
    "check_family",
    "known_depth",
    "materialise",
    "materialise_model",
    "method_of",
    "own_data",
    "read_set",
]

DEFAULT_EDGE = "A_B"


def assemble(options: RunOptions, *, device_is_here: bool = True) -> TrialSpec:
    """Resolve and check everything that needs no weights.

    For `tiny` the spec's model source is its name until `materialise` has built it.

    Args:
        options: What was asked for.
        device_is_here: Whether the model will run on this machine, so that a device that is not
            here is a mistake.

    Raises:
        InputError: Something is wrong; all of it is said at once.
    """
    problems = Problems()
    method = None
    model, chat = assemble_model(options, problems, device_is_here=device_is_here)
    with problems.collect():
        method = method_of(options)
    with problems.collect():
        check_scorable((), tokenizer=options.rouge_tokenizer)
    _check_counts(options, problems)
    data = _read_data(options, model, problems)
    problems.raise_if_any()
    if model is None or chat is None or method is None or data is None:
        raise AssertionError("every None above comes with a noted problem")
    spec = TrialSpec(
        model=model,
        chat=chat,
        method=method,
        decoding=options.decoding,
        rouge_tokenizer=options.rouge_tokenizer,
        seed=options.seed,
        data=data,
        engine=options.engine,
    )
    check_family(spec.model)
    return spec


def assemble_model(
    options: RunOptions, problems: Problems, *, device_is_here: bool = True
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
        resolve_dtype(options.dtype, resolve_device("cpu"))
    with problems.collect():
        chat = ChatFormat.from_option(options.chat_template, options.system_prompt)
    if reference is None:
        return None, chat
    model = ModelSpec(
        name=reference.name,
        source=reference.source or TINY,
        weights=model_path,
        revision=options.revision,
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
    if model.checkpoint != TINY and Path(model.checkpoint).is_dir():
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
    METHODS[options.method]
    if options.method in OBJECTIVES:
        return GradientMethod(options.method, options.gradient)
    return RmuMethod(options.gradient) if options.method == "rmu" else LunarMethod(options.lunar)


def _check_counts(options: RunOptions, problems: Problems) -> None:
    for name, value in (
        ("--retain-rows", options.retain_rows),
        ("--evaluation-rows", options.evaluation_rows),
    ):
        if value is not None and value < 1:
            problems.add(f"{name} {value}: at least 1.")


def _read_data(options: RunOptions, model: ModelSpec | None, problems: Problems) -> DataSets | None:
    """Read and split all sets; None where something is wrong, which is then noted."""
    name = options.data or own_data(model)
    records = read_set(name, problems)
    factual = () if options.factual_data == NONE else read_set(options.factual_data, problems, NONE)
    other = read_set(options.retain_data, problems, "retain") if options.retain_data else None
    prompts = refusals = None
    with problems.collect():
        prompts = read_prompts(resolve_data(options.reference_prompts, kind="prompts"))
    with problems.collect():
        refusals = read_prompts(resolve_data(options.refusals, kind="prompts"))
    split = None
    if records is not None:
        with problems.collect():
            edges = options.forget_edges or _default_edge(records)
            # A file of nothing but what is to be forgotten is judged on the other retain set.
            nothing_left = other is not None and set(edges) >= set(edges_of(records))
            split = split_by_edges(records, edges, retain=other if nothing_left else None)
    if split is None or factual is None or prompts is None or refusals is None:
        return None
    if other is not None:
        with problems.collect():
            Split(forget=split.forget, retain=other, forget_edges=split.forget_edges)
    sets = None
    with problems.collect():
        sets = _evaluated(options, name, split, factual)
    if sets is None:
        return None
    fit_retain = split.retain if other is None else other
    return dataclasses.replace(
        sets, fit_retain=fit_retain, reference_prompts=prompts, refusals=refusals
    )


def _evaluated(
    options: RunOptions,
    name: str,
    split: Split,
    factual: tuple[Record, ...],
) -> DataSets:
    """Cut the sets to what is evaluated, and check that it can be scored."""
    # A count below 1 is a mistake that is noted already; what else is wrong is to be found too.
    rows = None if options.evaluation_rows is None else max(1, options.evaluation_rows)
    retain = split.retain[:rows]
    size = len(retain) if options.retain_rows is None else max(1, options.retain_rows)
    sample = sample_by_edge(retain, size, seed=options.seed)
    check_scorable((*split.forget, *retain, *factual[:rows]), tokenizer=options.rouge_tokenizer)
    return DataSets(
        name=Path(name).stem,
        forget_edges=split.forget_edges,
        forget=split.forget[:rows],
        fit_forget=split.forget,
        fit_retain=split.retain,
        retain=retain,
        n_retain=len(split.retain),
        retain_sample=sample,
        factual=factual[:rows],
        reference_prompts=(),
    )


def read_set(
    name: str, problems: Problems, default_edge: str | None = None
) -> tuple[Record, ...] | None:
    """Return the pairs of a shipped name or file; None where something is wrong, and noted."""
    with problems.collect():
        return read_records(resolve_data(name, kind="records"), default_edge=default_edge)
    return None


def own_data(model: ModelSpec | None) -> str:
    """Return the data that a model is asked about where none are named."""
    return "mini" if model is not None and model.name == TINY else "contracts"


def _default_edge(records: tuple[Record, ...]) -> tuple[str, ...]:
    edges = edges_of(records)
    if DEFAULT_EDGE not in edges:
        raise DataError(
            f"--forget-edge is needed: the data have no edge {DEFAULT_EDGE!r}, the default. "
            f"There are: {', '.join(list(edges)[:40])}."
        )
    return (DEFAULT_EDGE,)
