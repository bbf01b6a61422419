"""From options to a fine-tuning job: names resolved, files read, everything checked."""

from __future__ import annotations

from pathlib import Path

from lunar_tune.config.run_options import RunOptions
from lunar_tune.data.data_catalog import resolve_data
from lunar_tune.data.records import read_prompts
from lunar_tune.errors import Problems
from lunar_tune.finetuning.finetune_job import FinetuneJob
from lunar_tune.finetuning.finetune_settings import FinetuneSettings
from lunar_tune.metrics.rouge import check_scorable
from lunar_tune.trial.assemble import assemble_model, check_family
from lunar_tune.trial.sets import own_data, read_set

__all__ = ["assemble_finetuning"]


def assemble_finetuning(
    options: RunOptions,
    settings: FinetuneSettings | None = None,
    problems: Problems | None = None,
) -> FinetuneJob:
    """Resolve and check everything that needs no weights.

    For `tiny` the model's source is its name until `materialise_model` has built it.

    Args:
        options: Model, data, prompts, seed; what concerns unlearning is not looked at.
        settings: Of the training.
        problems: What is known to be wrong already.

    Raises:
        InputError: Something is wrong; all of it is said at once.
    """
    problems = problems or Problems()
    model, chat = assemble_model(options, problems)
    name = options.data or own_data(model)
    records = read_set(name, problems)
    prompts = refusals = None
    with problems.collect():
        check_scorable(records or (), tokenizer=options.rouge_tokenizer, text=options.text)
    with problems.collect():
        prompts = read_prompts(resolve_data(options.reference_prompts, kind="prompts"))
    with problems.collect():
        refusals = read_prompts(resolve_data(options.refusals, kind="prompts"))
    if model is not None:
        with problems.collect():
            check_family(model)
    problems.raise_if_any()
    if model is None or chat is None or records is None or prompts is None or refusals is None:
        raise AssertionError("every None above comes with a noted problem")
    return FinetuneJob(
        model=model,
        chat=chat,
        records=records,
        data_name=Path(name).stem,
        reference_prompts=prompts,
        refusals=refusals,
        rouge_tokenizer=options.rouge_tokenizer,
        settings=settings or FinetuneSettings(),
        seed=options.seed,
    )
