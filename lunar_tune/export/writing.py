"""One trial of a search, run again, written in a form that needs no lunar-tune, and proved.

    exported = export(job)
    exported.failures        # empty: it gives what the search reported

The study keeps no weights; seed, data and setting decide them. One model is in memory at a time:
the one that was unlearned is let go before the written form is loaded from the disk.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lunar_tune.errors import InputError
from lunar_tune.export.adapter import nearest_factors, write_adapter
from lunar_tune.export.export_job import EXPORT_FILE, Exported, ExportJob, package_versions
from lunar_tune.export.model_card import write_card
from lunar_tune.export.proof import Comparison, ask, compare, weight_digest
from lunar_tune.export.reading import Base, read_form
from lunar_tune.files import write_atomically
from lunar_tune.models.device import resolve_device
from lunar_tune.models.lineage import Lineage, fingerprint, read_lineage, write_lineage
from lunar_tune.models.loading import LoadedModel, as_loaded
from lunar_tune.training.adapting import Factors
from lunar_tune.training.saving import save_checkpoint
from lunar_tune.trial.assemble import materialise
from lunar_tune.trial.worker import Worker

if TYPE_CHECKING:
    from lunar_tune.methods.contract import Change
    from lunar_tune.metrics.evaluate import AnswerRow

__all__ = ["export"]


@dataclass(slots=True, kw_only=True)
class _Run:
    """What is known of the run that a form is written from; factors are in host memory."""

    base: Base
    dtype: torch.dtype
    answers: tuple[AnswerRow, ...] = ()
    """The unlearned model's, decoded plainly."""
    digests: dict[str, str] = field(default_factory=dict)
    """Digests of the new weights."""
    merged: bool = False
    """See `Change`."""
    factors: dict[str, Factors] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def export(
    job: ExportJob,
    *,
    on_build: Callable[[int, int], None] | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write a trial's unlearned model and prove that what was written gives what was reported.

    Also where it does not, the folder is kept, and `export.json` in it says so.

    Args:
        job: What is wanted.
        on_build: Called with epochs done and in all while `tiny` is being built.
        on_step: Called with what is being done now.

    Raises:
        InputError: The model or the folder cannot be used.
        LunarTuneError: The trial failed, or the form cannot be written.
    """
    spec = materialise(job.spec, on_build)
    job = dataclasses.replace(job, spec=spec)
    on_step("running the trial again")
    run = _run_again(job)
    gc.collect()  # a worker is full of references in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    on_step(f"asking the {job.form} as it is loaded from {job.folder}")
    exported = _proved(job, run)
    document = exported.document()
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_atomically(job.folder / EXPORT_FILE, text.encode(errors="surrogatepass"))
    write_card(exported)
    if job.form == "checkpoint":
        write_lineage(job.folder, _lineage(job, run.base, exported.comparison))
    return exported


def _run_again(job: ExportJob) -> _Run:
    """Run the trial and write the form; no weight of the model is referred to afterwards."""
    worker = Worker(job.spec)
    model = worker.loaded.model
    run = _Run(base=_base(job, worker.loaded), dtype=model.dtype)
    weights: dict[str, Tensor] = {}  # those of which an adapter has to be made

    def take(loaded: LoadedModel, change: Change) -> None:
        new = change.weights()
        run.digests = {name: weight_digest(weight) for name, weight in new.items()}
        run.merged = change.merged
        run.answers = ask(loaded, job.spec, full=job.full)
        if job.form == "checkpoint":
            data = job.spec.data
            questions = [record.question for record in (*data.forget, *data.retain)]
            save_checkpoint(loaded, job.folder, texts=questions, option="--output")
        elif change.factors is not None:
            run.factors = {name: _copied(one) for name, one in change.factors().items()}
        else:
            weights.update({name: weight.to("cpu", copy=True) for name, weight in new.items()})

    worker.run(job.parameters, full=job.full, bounded=not job.full, on_change=take)
    if job.form == "adapter":
        _write_adapter(job, run, model, weights)
    return run


def _write_adapter(job: ExportJob, run: _Run, model: Any, weights: Mapping[str, Tensor]) -> None:
    """Write the method's own factors, or those nearest to what became of each matrix."""
    for name, weight in weights.items():
        old = model.get_parameter(name).detach()
        change = weight.to(old.device).double() - old.double()
        path = name.removesuffix(".weight")
        run.factors[path], run.errors[path] = nearest_factors(change, rank=job.rank)
    base, revision = run.base.source, run.base.revision
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_adapter(job.folder, run.factors, base=base, revision=revision)
    except OSError as error:
        raise InputError(f"--output {job.folder}: cannot be written ({error}).") from error


def _proved(job: ExportJob, run: _Run) -> Exported:
    """Load what was written and ask it."""
    model, tokenizer = read_form(job.form, job.folder, run.base, dtype=run.dtype)
    changed = job.form != "adapter" and any(
        weight_digest(model.get_parameter(name)) != digest for name, digest in run.digests.items()
    )
    device: Any = resolve_device(job.spec.model.device)
    found = ask(as_loaded(model.to(device), tokenizer, job.spec.model), job.spec, full=job.full)
    reported, of_run = compare(found, job.reported.rows), compare(found, run.answers)
    failures = []
    if changed:
        failures.append("the weights that were loaded are not bit for bit those of the run")
    if job.form != "adapter" and not run.merged:
        if of_run.differing:
            failures.append(f"compared with the run that it was written from, {of_run.text}")
        # In 16 bits, batches of other shapes round to another word now and then.
        if run.dtype == torch.float32 and reported.differing:
            failures.append(f"compared with what the search reported, {reported.text}")
    if not failures and not reported.is_close:
        failures.append(f"compared with what the search reported, {reported.text}")
    return Exported(
        job=job,
        base=run.base,
        dtype=str(run.dtype).removeprefix("torch."),
        comparison=reported,
        against_run=of_run,
        relative_errors=run.errors,
        ranks={name: one.rank for name, one in run.factors.items()},
        failures=tuple(failures),
    )


def _base(job: ExportJob, loaded: LoadedModel) -> Base:
    """Return what the trial's model was before it."""
    spec = job.spec.model
    own = spec.weights is not None and (Path(spec.weights) / "tokenizer_config.json").is_file()
    source = spec.checkpoint
    commit = getattr(loaded.model.config, "_commit_hash", None) or spec.revision
    return Base(
        name=spec.name,
        source=source,
        tokenizer=str(spec.weights) if own else spec.source,
        revision=None if Path(source).is_dir() else commit,
        fingerprint=fingerprint(loaded),
        trust_remote_code=spec.trust_remote_code,
    )


def _lineage(job: ExportJob, base: Base, found: Comparison) -> Lineage:
    """Return where the checkpoint comes from, with what its model had come from."""
    data, model = job.spec.data, job.spec.model
    unlearned: Mapping[str, Any] = {
        "data": data.name,
        "data_digest": job.digests.get("forget", ""),
        "forget_edges": list(data.forget_edges),
        "method": job.spec.method.name,
        "variant": job.spec.method.variant,
        "parameters": dict(job.parameters),
        "seed": job.spec.seed,
        "search": job.reported.search,
        "trial": job.reported.trial,
        "scores": dict(found.scores),
    }
    before = read_lineage(model.checkpoint)
    if before is not None:
        return dataclasses.replace(before, unlearned=unlearned)
    return Lineage(
        base=model.name,
        source=model.source,
        weights=model.weights,
        revision=base.revision,
        fingerprint=base.fingerprint,
        data=data.name,
        data_digest=job.digests.get("retain", ""),
        settings={},
        versions=package_versions(),
        unlearned=unlearned,
    )


def _copied(factors: Factors) -> Factors:
    """Return factors in host memory that nothing else will change."""
    first, second = (factor.to("cpu", copy=True) for factor in (factors.first, factors.second))
    return dataclasses.replace(factors, first=first, second=second)
