"""From options to a spec: names resolved, files read, sets split, everything checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from rich.console import Console

from lunar_tune.config.fields import check_values
from lunar_tune.config.options import AUTO, NONE, TINY, ModelOptions, RunOptions, read_assignments
from lunar_tune.data.data_catalog import DataKind, kind_of, pairs_kind, resolve_data
from lunar_tune.data.readers import stem_of
from lunar_tune.data.records import Record, read_questions
from lunar_tune.errors import DataError, ModelError, Problems
from lunar_tune.files import is_folder, read_settings
from lunar_tune.finetuning.finetune_job import FinetuneJob, recipe
from lunar_tune.methods.contract import METHODS, Method, configure_method
from lunar_tune.metrics.goal import METRICS, check_metrics
from lunar_tune.metrics.rouge import check_scorable
from lunar_tune.models.catalog import CATALOG, ModelSpec, resolve_model
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.device import check_device_name, check_fits
from lunar_tune.models.fingerprint import Identity, number_format_of
from lunar_tune.models.loading import encoder_on_disk, load_config
from lunar_tune.models.weights import check_weights
from lunar_tune.trial.collecting import Collection, ask_command
from lunar_tune.trial.spec import (
    TAUGHT,
    TAUGHT_TINY,
    TrialSpec,
    own_data,
    read_prompts_of,
    read_records_of,
    read_sets,
    with_own_data,
)

Model = TypeVar("Model", bound=ModelOptions)
Job = TypeVar("Job", TrialSpec, FinetuneJob, Collection)


def assemble(options: RunOptions, answered: Sequence[Record] | None = None) -> TrialSpec:
    """Resolve and check everything that needs neither weights nor torch, or raise an InputError.

    `materialise` builds what has to be built, `check_machine` does the checks that take torch.
    `answered` are as in `read_sets`.
    """
    problems, embedding_model = Problems(), options.embedding_model
    model = _model(options, problems)
    with problems.collect():
        options = with_own_data(options, model)
    with problems.collect():
        chat = ChatFormat.from_option(options.chat_template, options.system_prompt)
    with problems.collect():
        method, _ = configured(options)
        if options.engine == "reference":
            from lunar_tune.trial.worker import check_reference

            check_reference(method)
    check_values(options, problems)
    with problems.collect():
        metrics = check_metrics(options.metrics)
        for name in metrics:
            if "factual" in METRICS[name].sets and options.factual_data == NONE:
                problems.add(f"--metrics {name}: there are no questions with --factual-data none.")
    with problems.collect():
        if embedding_model is not None:
            from lunar_tune.metrics.embedding import check_embedding_model

            embedding_model = check_embedding_model(embedding_model)
    with problems.collect():
        if options.data is not None:
            data = read_sets(options, answered)
    problems.raise_if_any()
    return TrialSpec(
        model=model,
        chat=chat,
        method=method,
        max_new_tokens=options.max_new_tokens,
        rouge_tokenizer=options.rouge_tokenizer,
        seed=options.seed,
        data=data,
        engine=options.engine,
        memory_budget=options.memory_budget,
        cache_limit=options.cache_limit,
        metrics=metrics,
        embedding_model=embedding_model,
        text=options.text,
        reference_check=options.reference_check,
    )


def assemble_finetuning(
    options: RunOptions,
    fixed: Mapping[str, Any] = MappingProxyType({}),
    problems: Problems | None = None,
) -> FinetuneJob:
    """Resolve and check everything that fine-tuning needs but the weights, as `assemble` does.

    What is `fixed` of the settings is not left to the model's recipe; `problems` are known already.
    """
    problems, notes = problems or Problems(), list[str]()
    model = _model(options, problems)
    with problems.collect():
        chat = ChatFormat.from_option(options.chat_template, options.system_prompt)
    with problems.collect():
        settings = recipe(model.name, fixed)
    name = options.data or (TAUGHT_TINY if model.name == TINY else TAUGHT)
    with problems.collect():
        records = read_records_of(name, options.edge, notes.append)
        check_scorable({"true": records}, tokenizer=options.rouge_tokenizer, text=options.text)
    with problems.collect():
        prompts = read_prompts_of(options.reference_prompts or "unverifiable", notes.append)
    with problems.collect():
        refusals = read_prompts_of(options.refusals, notes.append)
    problems.raise_if_any()
    return FinetuneJob(
        model=model,
        chat=chat.of_fit,
        records=records,
        data_name=stem_of(Path(name)),
        notes=tuple(notes),
        reference_prompts=prompts,
        refusals=refusals,
        rouge_tokenizer=options.rouge_tokenizer,
        settings=settings,
        seed=options.seed,
    )


def assemble_collection(
    options: RunOptions, problems: Problems | None = None, **further: Any
) -> Collection:
    """Resolve and check everything that asking a model takes but its weights, as `assemble` does.

    Its questions are the data; `further` are fields of a `Collection`, `problems` known already.
    """
    problems = problems or Problems()
    model = _model(options, problems)
    with problems.collect():
        chat = ChatFormat.from_option(options.chat_template, options.system_prompt)
    with problems.collect():
        name = options.data or own_data(model)
        kind: DataKind = "records" if kind_of(name) == "records" else "questions"
        questions = read_questions(resolve_data(name, kind=kind), default_edge=options.edge)
    with problems.collect():
        refusals = read_prompts_of(options.refusals)
    problems.raise_if_any()
    return Collection(
        model=model,
        chat=chat,
        name=stem_of(Path(name)),
        questions=questions,
        refusals=refusals,
        rouge_tokenizer=options.rouge_tokenizer,
        **further,
    )


def answered(options: RunOptions, spec: TrialSpec) -> TrialSpec:
    """Return the spec with the answers that its model was asked for, or raise an InputError."""
    return assemble(options, kept_answers(options)) if spec.data.unanswered else spec


def redirects_own_answers(options: RunOptions) -> bool:
    """Say whether a model is to decline what it answers by itself, or raise an InputError."""
    if not METHODS[options.method].along_vectors:
        return False
    return pairs_kind(options.data or own_data(_model(options, Problems()))) == "questions"


def in_format_of(options: Model, known: Identity | None) -> Model:
    """Return options with the number format in which a known model was computed, if they have none.

    What it answered then is kept under that format, whatever this machine would choose.
    """
    if known is None or options.dtype != AUTO:
        return options
    return dataclasses.replace(options, dtype=number_format_of(known))


def kept_answers(options: RunOptions) -> tuple[Record, ...]:
    """Return the pairs that a model was asked for, or raise an InputError."""
    job = assemble_collection(options)
    if (records := job.kept()) is None:
        raise DataError(
            f"--data {job.name}: what {job.model.name} answers to these questions is not known, or "
            f"no longer kept. Ask it first: {ask_command(options)}"
        )
    return records


def check_machine(spec: TrialSpec, *, here: bool = True, share: float = 1.0) -> None:
    """Check what takes torch: room in a `share` of the device `here`, the family of a folder."""
    problems, model, budget = Problems(), spec.model, spec.memory_budget
    if here:
        with problems.collect():
            trained = spec.method.variant == "full"
            check_fits(model, trained=trained, share=share, budget_gib=budget)
    with problems.collect():
        if model.checkpoint != TINY and is_folder(Path(model.checkpoint)):
            load_config(model)  # refuses an unsuitable family
    problems.raise_if_any()


def materialise(job: Job, console: Console | None = None) -> Job:
    """Return the job with a model source that can be loaded: `tiny` is built if it is missing."""
    if job.model.source != TINY:
        return job
    from lunar_tune.finetuning.tiny import ensure_tiny

    source = str(ensure_tiny(console=console))
    return dataclasses.replace(job, model=dataclasses.replace(job.model, source=source))


def first_prompts(
    model: ModelSpec, chat: ChatFormat, questions: Mapping[str, str]
) -> dict[str, str]:
    """Return the prompts of a few questions to show, or raise a ModelError if the template fails.

    There is none where the tokenizer is not on this machine or is code of its own.
    """
    if not questions or model.trust_remote_code:
        return {}
    from lunar_tune.finetuning.tiny import on_disk

    encoder = encoder_on_disk(on_disk(model), chat)
    return {} if encoder is None else encoder.shown(questions)


def known_depth(options: RunOptions) -> int | None:
    """Return the number of decoder blocks if it can be known without weights or network."""
    source = resolve_model(options.model).source
    # `tiny` is built elsewhere, and no folder of that name.
    for folder in filter(None, (options.model_path, source.removeprefix(TINY))):
        if depth := _depth_of(Path(folder)):
            return depth
    return _listed_depth(options.model)


def _depth_of(folder: Path) -> int | None:
    """Return the number of decoder blocks of a checkpoint, None where a folder does not say it."""
    try:
        depth = json.loads(read_settings(folder.expanduser() / "config.json"))
        return int(depth["num_hidden_layers"]) or None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _listed_depth(model: str) -> int | None:
    known = model.partition("@")[0]
    return CATALOG[known].n_layers if known in CATALOG else None


def configured(options: RunOptions) -> tuple[Method, dict[str, Any]]:
    """Return the method with its settings, and the fixed ones of its parameters; or say why not."""
    fixed = read_assignments(options.fix)
    return configure_method(options.method, solver=options.solver, fixed=fixed)


def _model(options: ModelOptions, problems: Problems) -> ModelSpec:
    """Return the model as the options want it, and note what is wrong; nameless if it is none."""
    weights, model = None, ModelSpec(name="", source="")
    with problems.collect():
        model = resolve_model(options.model)
    with problems.collect():
        if options.model_path:
            folder = check_weights(options.model_path, "--model-path")
            weights = str(folder)
            has, listed = _depth_of(folder), _listed_depth(options.model)
            if has and listed and has != listed:
                raise ModelError(
                    f"--model-path {options.model_path}: has {has} decoder blocks, --model "
                    f"{options.model} has {listed}, so it was not made from that. Name the model "
                    f"that it was made from with --model, or search it by itself: --model "
                    f"{options.model_path} without --model-path."
                )
    with problems.collect():
        check_device_name(options.device)
    return dataclasses.replace(
        model,
        weights=weights,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
