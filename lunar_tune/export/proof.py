"""Whether a form, loaded by transformers and peft alone, says what the search reported."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lunar_tune.display import Summary
from lunar_tune.errors import LunarTuneError
from lunar_tune.export.export_job import ExportJob, ExportRun
from lunar_tune.metrics.evaluate import AnswerRow, paired, row_means
from lunar_tune.metrics.goal import METRICS, in_words, score_label
from lunar_tune.metrics.means import errors_of
from lunar_tune.models.device import resolve_device
from lunar_tune.models.loading import LoadedModel, as_loaded
from lunar_tune.study.rows import ERROR, HEADLINE_SCORES, score_cells
from lunar_tune.training.checkpoints import package_versions
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

_OF_RETAIN = {"retain_rouge1", "deviation_score"}
_TOLERANCE = 0.01  # of a mean ROUGE, where another rounding is at work


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A form's answers beside others to the same questions."""

    scores: Mapping[str, float]  # the form's, on these questions
    differing: int  # rows with another answer, or without texts with another score
    what: str  # what was compared; the scores of each row where the others kept no texts
    is_close: bool  # whether no mean ROUGE differs by more than rounding may do
    differences: str  # how many rows differ, in words
    text: str  # the same, with the mean ROUGE that differs most, if one does


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Exported(Summary):
    """A written form with what its proof found."""

    folder: Path
    document: Mapping[str, Any]  # what `export.json` says
    remarks: Sequence[str]  # what has to be known of the scores, in words
    differences: str  # how many answers differ from the search's, and of an adapter its rank

    @property
    def rows(self) -> dict[str, list[str]]:
        """The form's scores beside those that the search reported, as cells of a table."""
        said = self.document
        return {
            "base model": score_cells(said["baseline_scores"]),
            f"trial {said['trial']}, as reported": self.cells(said["reported_scores"]),
            f"the {said['format']}, as loaded": self.cells(said["scores"]),
            ERROR: score_cells(errors_of(said["scores"])),
        }

    def summary(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Return where it is and whether it is proven, and the scores; see `Summary`."""
        proof = "not proven" if self.document["failures"] else "proven"
        lines = [f"{self.document['format']}, {proof}: {self.folder}", *self.remarks]
        table = [(name, *cells) for name, cells in self.rows.items()]
        return [*lines, self.differences], [("", *map(score_label, HEADLINE_SCORES)), *table]

    def raise_if_unproven(self) -> None:
        """Raise a LunarTuneError if what was written does not give what the search reported."""
        said, form = self.document, self.document["format"]
        if said["failures"]:
            larger = " --format adapter:RANK with a larger rank comes nearer."
            raise LunarTuneError(
                f"the {form} does not give what {said['search']} reported of trial "
                f"{said['trial']}: {'; '.join(said['failures'])}."
                f"{larger if said['relative_error'] else ''} {self.folder} is kept; its "
                "export.json says that it is not proven. A trial gives the same scores "
                "only with the machine, the libraries and the model of the search."
            )

    def cells(self, scores: Mapping[str, float]) -> list[str]:
        """Return scores on the same questions as cells of a table, marked where they estimate."""
        estimated = set() if self.document["retain_exact"] else _OF_RETAIN
        return [
            f"≈ {cell}" if name in estimated and cell != "-" else cell
            for name, cell in zip(HEADLINE_SCORES, score_cells(scores), strict=True)
        ]


def prove(job: ExportJob, run: ExportRun) -> Exported:
    """Load what was written and ask it."""
    loaded = _read(job, run)
    whole = job.form == "checkpoint"
    changed = whole and any(
        weight_digest(loaded.model.get_parameter(name)) != digest
        for name, digest in run.digests.items()
    )
    found = ask(loaded, job.spec, full=job.full)
    reported, of_run = compare(found, job.answers), compare(found, run.answers)
    failures = []
    if changed:
        failures.append("the weights that were loaded are not bit for bit those of the run")
    if whole and not run.merged and of_run.differing:
        failures.append(f"compared with the run that it was written from, {of_run.text}")
    # In 16 bits, batches of other shapes round to another word now and then.
    exact = whole and not run.merged and run.dtype == "float32"
    if (exact and reported.differing) or not (failures or reported.is_close):
        failures.append(f"compared with what the search reported, {reported.text}")
    document = _document(job, run, reported, of_run, failures)
    remarks = _remarks(document, held_out=job.spec.data.held_out is not None)
    differences = reported.differences
    if document["relative_error"]:
        rank, error = max(document["ranks"].values()), document["relative_error"]
        differences += f"; rank {rank}, relative error {error:.2g} (Frobenius)"
    return Exported(folder=job.folder, document=document, remarks=remarks, differences=differences)


def _document(
    job: ExportJob,
    run: ExportRun,
    reported: Comparison,
    of_run: Comparison,
    failures: Sequence[str],
) -> dict[str, Any]:
    search, row, spec, held = job.search, job.row, job.spec, job.spec.data.held_out
    confirmed = search.study.notes["confirmed"] if job.full else {}
    scores = confirmed.get("scores", row.scores)
    missed = in_words(search.goal.missed(scores))
    retain_rows = sum(one.set_name == "retain" for one in job.answers)
    n_retain = len(held.retain) if held is not None and job.full else spec.data.n_retain
    return {
        "format": job.form,
        "proven": not failures,
        "failures": list(failures),
        "search": search.folder.name,
        "trial": row.number,
        "model": spec.model.name,
        "base": run.base,
        "base_revision": run.revision,
        "base_fingerprint": run.fingerprint,
        "dtype": run.dtype,
        "method": spec.method.name,
        "variant": spec.method.variant,
        "parameters": dict(row.parameters),
        "seed": spec.seed,
        "data": spec.data.name,
        "forget_edges": list(spec.data.forget_edges),
        "data_digests": dict(spec.data.digests()),
        "max_new_tokens": int(confirmed.get("max_new_tokens", row.max_new_tokens) or 0),
        "feasible": not missed,
        "missed": missed,
        "retain_rows": retain_rows,
        "n_retain": n_retain,
        "retain_exact": retain_rows >= n_retain,
        "on_held_out": held is not None and job.full,
        "scores": dict(reported.scores),
        "reported_scores": dict(scores),
        "baseline_scores": dict(search.baseline_in_full if job.full else search.baseline),
        "n_rows": len(job.answers),
        "compared": reported.what,
        "differing_rows": reported.differing,
        "differing_rows_of_the_run": of_run.differing,
        "relative_error": max(run.errors.values(), default=0.0),
        "ranks": dict(run.ranks),
        "versions": package_versions(),
    }


def _remarks(document: Mapping[str, Any], *, held_out: bool) -> list[str]:
    missed = document["missed"]
    remarks = [f"feasible: no, it misses {missed}" if missed else "feasible: yes"]
    if not document["retain_exact"]:
        asked = f"{document['retain_rows']} of {document['n_retain']} questions"
        remarks.append(f"≈: an estimate, mean of {asked} to keep")
    if document["on_held_out"]:
        remarks.append("scores are on held-out questions, on which no trial was judged")
    elif held_out:
        remarks.append("scores are on the questions of the trials, not on held-out questions")
    return remarks


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
    options = {"dtype": dtype, "attn_implementation": run.attention}
    model = load(AutoModelForCausalLM, source, use_safetensors=True, **options)
    if job.form == "adapter":
        from peft import PeftModel

        with warnings.catch_warnings():
            # peft 0.21 reads a name that transformers 5.23 deprecates
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = PeftModel.from_pretrained(model, str(job.folder))
        model = adapted.get_base_model()  # left unmerged
    model = model.eval().requires_grad_(requires_grad=False)
    model, spec = model.to(resolve_device(job.spec.model.device)), job.spec
    return as_loaded(model, tokenizer, spec.model, spec.chat)


def ask(loaded: LoadedModel, spec: TrialSpec, *, full: bool) -> tuple[AnswerRow, ...]:
    """Return a model's answers, decoded from the first token on; for `full` see `Worker.run`."""
    plain = dataclasses.replace(spec, engine="plain", cache_limit=0, known_model=None)
    evaluation, _ = Worker(plain, loaded).judge.evaluate(None, full=full, bounded=False)
    return evaluation.rows


def compare(found: Sequence[AnswerRow], expected: Sequence[AnswerRow]) -> Comparison:
    """Compare a form's answers with others, to all questions or to some, perhaps without texts.

    A question of `expected` that was not asked is a LunarTuneError.
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
    key = attrgetter("rouge1", "rouge_l")
    differing = sum(
        not _same(one, other) if by_text else key(one) != key(other)
        for one, other in zip(matched, expected, strict=True)
    )
    names = list(dict.fromkeys(row.set_name for row in expected))
    scores, others = row_means(matched, names), row_means(expected, names)
    gaps = {
        name: abs(scores[name] - others[name])
        for name in scores
        if name in METRICS and "_rouge" in name
    }
    worst = max(gaps, key=gaps.__getitem__)
    what = "answers differ"
    if not by_text:
        what = "rows differ in ROUGE-1 or ROUGE-L (the search kept no texts)"
    differences = f"{differing} of {len(expected)} {what}"
    here, there = f"{scores[worst]:.4f}", f"{others[worst]:.4f}"
    means = f"{worst} is {here} instead of {there}"
    if here == there:
        means = "every mean ROUGE is the same to four digits"
    return Comparison(
        scores=scores,
        differing=differing,
        what="answers" if by_text else "ROUGE-1 and ROUGE-L of each row",
        is_close=gaps[worst] <= _TOLERANCE,
        differences=differences,
        text=f"{differences}, {means}",
    )


def _same(one: AnswerRow, other: AnswerRow) -> bool:
    """Say whether two answers are one.

    One may begin the other where it was ended for having said the truth, or repeating itself.
    """
    if one.answer == other.answer:
        return True
    # One may end in the middle of a character.
    whole = (text.rstrip("\N{REPLACEMENT CHARACTER}") for text in (one.answer, other.answer))
    short, long = sorted(whole, key=len)
    recalls = (one.rouge1, one.rouge_l)
    is_over = recalls == (other.rouge1, other.rouge_l) and (
        one.rouge_l == 1.0 or one.ended is other.ended is False
    )
    return is_over and long.startswith(short)


def weight_digest(weight: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    content = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()
