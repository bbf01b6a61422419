"""Whether a written form says what the search reported.

It is loaded from the disk by transformers and peft alone, and asked what the trial was asked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lunar_tune.errors import LunarTuneError
from lunar_tune.export.export_job import Comparison, Exported, ExportJob, ExportRun
from lunar_tune.metrics.evaluate import AnswerRow, paired, row_means
from lunar_tune.models.device import resolve_device
from lunar_tune.models.loading import LoadedModel, as_loaded
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

__all__ = ["ask", "compare", "prove", "weight_digest"]


def prove(job: ExportJob, run: ExportRun) -> Exported:
    """Load what was written and ask it.

    Raises:
        LunarTuneError: The search asked what is not asked now.
    """
    loaded = _read(job, run)
    whole = job.form == "checkpoint"
    changed = whole and any(
        weight_digest(loaded.model.get_parameter(name)) != digest
        for name, digest in run.digests.items()
    )
    found = ask(loaded, job.spec, full=job.reported.full)
    reported, of_run = compare(found, job.reported.rows), compare(found, run.answers)
    failures = []
    if changed:
        failures.append("the weights that were loaded are not bit for bit those of the run")
    if whole and not run.merged and of_run.differing:
        failures.append(f"compared with the run that it was written from, {of_run.text}")
    # In 16 bits, batches of other shapes round to another word now and then.
    exact = whole and not run.merged and run.dtype == "float32"
    if (exact and reported.differing) or not (failures or reported.is_close):
        failures.append(f"compared with what the search reported, {reported.text}")
    return Exported(
        job=job, run=run, comparison=reported, against_run=of_run, failures=tuple(failures)
    )


def _read(job: ExportJob, run: ExportRun) -> LoadedModel:
    """Load a written form as anybody would; an adapter's base is on this machine."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, words = run.base, run.tokenizer
    if job.form == "checkpoint":
        source = words = str(job.folder)

    def load(factory: Any, place: str, **options: Any) -> Any:
        return factory.from_pretrained(
            place,
            revision=None if Path(place).is_dir() else run.revision,
            trust_remote_code=job.spec.model.trust_remote_code,
            local_files_only=True,
            **options,
        )

    tokenizer = load(AutoTokenizer, words)
    dtype = getattr(torch, run.dtype)
    model = load(AutoModelForCausalLM, source, dtype=dtype, use_safetensors=True)
    if job.form == "adapter":
        from peft import PeftModel

        with warnings.catch_warnings():
            # peft 0.21 reads a name that transformers 5.23 deprecates
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = PeftModel.from_pretrained(model, str(job.folder))
        model = adapted.get_base_model()  # left unmerged
    model = model.eval().requires_grad_(requires_grad=False)
    return as_loaded(model.to(resolve_device(job.spec.model.device)), tokenizer, job.spec.model)


def ask(loaded: LoadedModel, spec: TrialSpec, *, full: bool) -> tuple[AnswerRow, ...]:
    """Return a model's answers, decoded from the first token on; nothing is kept of other models.

    For `full` see `Worker.run`.
    """
    engine = dataclasses.replace(spec.engine, kind="plain", cache_limit=0)
    plain = dataclasses.replace(spec, engine=engine, metrics=(), embedding_model=None)
    evaluation, _ = Worker(plain, loaded).judge.evaluate(None, full=full, bounded=False)
    return evaluation.rows


def compare(found: Sequence[AnswerRow], expected: Sequence[AnswerRow]) -> Comparison:
    """Compare a form's answers with others, to all questions or to some, perhaps without texts.

    Raises:
        LunarTuneError: A question of `expected` was not asked.
    """
    matched = []
    for row, other in paired(expected, found):
        if other is None:
            asked = repr(row.question) if row.question else f"row {row.row}"
            raise LunarTuneError(
                f"the search asked {asked} ({row.set_name}), which is not asked now: its "
                "configuration and its answers do not belong together."
            )
        matched.append(other)
    by_text = any(row.question for row in expected)
    same = _same if by_text else _scored_alike
    names = list(dict.fromkeys(row.set_name for row in expected))
    return Comparison(
        scores=row_means(matched, names),
        expected=row_means(expected, names),
        n_rows=len(expected),
        differing=sum(not same(*pair) for pair in zip(matched, expected, strict=True)),
        by_text=by_text,
    )


def _scored_alike(one: AnswerRow, other: AnswerRow) -> bool:
    return (one.rouge1, one.rouge_l) == (other.rouge1, other.rouge_l)


def _same(one: AnswerRow, other: AnswerRow) -> bool:
    """Say whether two answers are one.

    An answer may end as soon as it has said every word of the truth (`EngineSettings.early_exit`):
    it is then the beginning of the whole one, perhaps in the middle of a character.
    """
    if one.answer == other.answer:
        return True
    whole = (text.rstrip("\N{REPLACEMENT CHARACTER}") for text in (one.answer, other.answer))
    short, long = sorted(whole, key=len)
    return one.rouge_l == other.rouge_l == 1.0 and long.startswith(short)


def weight_digest(weight: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    content = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()
