"""What is to be exported, and what came of it, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lunar_tune.errors import Problems
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.models.catalog import is_adapter
from lunar_tune.study.rows import HEADLINE_SCORES, score_cells
from lunar_tune.training.checkpoints import check_save_folder, package_versions
from lunar_tune.trial.spec import TrialSpec

__all__ = ["Comparison", "ExportJob", "ExportRun", "Exported", "Reported", "check_form"]

FORMS = ("checkpoint", "adapter")
_TOLERANCE = 0.01  # of a mean ROUGE, where another rounding is at work
_OF_RETAIN = {"retain_rouge1", "deviation_score"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What a search says of the trial that is exported."""

    search: str
    trial: int
    goal: str
    """What the search was after, in words."""
    scores: Mapping[str, float]
    rows: Sequence[AnswerRow]
    """The answers from which the scores come; not all questions where the trial was stopped."""
    max_new_tokens: int
    baseline: Mapping[str, float]
    missed: str = ""
    """The bounds that are not kept, in words; empty where the trial is feasible."""
    n_retain: int
    """Questions to keep of which the scores might be."""
    held_out: bool = False
    """Whether the search holds questions out of its trials."""
    full: bool = True
    """Whether these are the scores of a full evaluation, which asks what is held out."""

    @property
    def on_held_out(self) -> bool:
        """Whether the scores are on questions on which no trial was judged."""
        return self.held_out and self.full

    @property
    def retain_rows(self) -> int:
        """Questions to keep that were asked."""
        return sum(row.set_name == "retain" for row in self.rows)

    @property
    def retain_exact(self) -> bool:
        """Whether these are all."""
        return self.retain_rows >= self.n_retain

    def cells(self, scores: Mapping[str, float]) -> list[str]:
        """Return scores on the same questions as cells of a table, marked where they estimate."""
        return [
            f"≈ {cell}" if name in _OF_RETAIN and cell != "-" and not self.retain_exact else cell
            for name, cell in zip(HEADLINE_SCORES, score_cells(scores), strict=True)
        ]

    @property
    def remarks(self) -> list[str]:
        """What has to be known of the scores, in words."""
        remarks = [f"feasible: no, it misses {self.missed}" if self.missed else "feasible: yes"]
        if not self.retain_exact:
            asked = f"{self.retain_rows} of {self.n_retain} questions"
            remarks.append(f"≈: an estimate, mean of {asked} to keep")
        if self.on_held_out:
            remarks.append("scores are on held-out questions, on which no trial was judged")
        elif self.held_out:
            remarks.append("scores are on the questions of the trials, not on held-out questions")
        return remarks


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """One trial to be carried away in one form."""

    spec: TrialSpec
    """What the trial ran on; its model's source need not exist yet if it is `tiny`."""
    parameters: Mapping[str, Any]
    form: str
    folder: Path
    reported: Reported
    rank: int | None = None
    """Rank of an approximate adapter; None lets its error decide."""


@dataclass(slots=True, kw_only=True)
class ExportRun:
    """The run that a form is written from; nothing here refers to its model."""

    base: str
    """Hub id or folder of the base model, which an adapter belongs on."""
    revision: str | None
    """Commit on the hub; None for a folder."""
    fingerprint: str
    """Fingerprint of the base model (`models.fingerprint`)."""
    tokenizer: str
    """Hub id or folder of the tokenizer."""
    dtype: str
    answers: tuple[AnswerRow, ...] = ()
    """The unlearned model's, decoded from the first token on."""
    digests: dict[str, str] = field(default_factory=dict)
    """Digests of the new weights."""
    merged: bool = False
    """See `methods.contract.Edit`."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks of an adapter, by linear map."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative errors of an approximate adapter, by linear map."""

    @property
    def relative_error(self) -> float:
        """The largest of them; 0 where the form is exact."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A form's answers beside others to the same questions."""

    scores: Mapping[str, float]
    """The form's, on these questions."""
    expected: Mapping[str, float]
    """The others'."""
    n_rows: int
    differing: int
    """Rows with another answer, or without texts with another score."""
    by_text: bool
    """Whether answers were compared; else the scores of each row, for the others kept no texts."""

    @property
    def differences(self) -> str:
        """How many rows differ, in words."""
        if self.by_text:
            return f"{self.differing} of {self.n_rows} answers differ"
        return (
            f"{self.differing} of {self.n_rows} rows differ in ROUGE-1 or ROUGE-L (the search kept "
            "no texts)"
        )

    @property
    def gaps(self) -> Mapping[str, float]:
        """By how much mean ROUGE differs, by score."""
        names = [name for name in self.scores if "_rouge" in name]
        return {name: abs(self.scores[name] - self.expected[name]) for name in names}

    @property
    def is_close(self) -> bool:
        """Whether no mean ROUGE differs by more than rounding may do."""
        return max(self.gaps.values()) <= _TOLERANCE

    @property
    def text(self) -> str:
        """What is different, in words."""
        worst = max(self.gaps, key=self.gaps.__getitem__)
        return (
            f"{self.differences}, {worst} is "
            f"{self.scores[worst]:.4f} instead of {self.expected[worst]:.4f}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A written form with what its proof found."""

    job: ExportJob
    run: ExportRun
    comparison: Comparison
    """Its answers beside what the search reported."""
    against_run: Comparison
    """Its answers beside those of the run that it was written from, decoded alike."""
    failures: tuple[str, ...]
    """Why it is not proven; empty where it is."""

    def document(self) -> dict[str, Any]:
        """Return what `export.json` says."""
        job, run, reported, found = self.job, self.run, self.job.reported, self.comparison
        spec = job.spec
        return {
            "format": job.form,
            "proven": not self.failures,
            "failures": list(self.failures),
            "search": reported.search,
            "trial": reported.trial,
            "model": spec.model.name,
            "base": run.base,
            "base_revision": run.revision,
            "base_fingerprint": run.fingerprint,
            "dtype": run.dtype,
            "method": spec.method.name,
            "variant": spec.method.variant,
            "parameters": dict(job.parameters),
            "seed": spec.seed,
            "data": spec.data.name,
            "forget_edges": list(spec.data.forget_edges),
            "data_digests": dict(spec.data.digests()),
            "max_new_tokens": reported.max_new_tokens,
            "feasible": not reported.missed,
            "missed": reported.missed,
            "retain_rows": reported.retain_rows,
            "n_retain": reported.n_retain,
            "retain_exact": reported.retain_exact,
            "on_held_out": reported.on_held_out,
            "scores": dict(found.scores),
            "reported_scores": dict(reported.scores),
            "baseline_scores": dict(reported.baseline),
            "n_rows": found.n_rows,
            "compared": "answers" if found.by_text else "ROUGE-1 and ROUGE-L of each row",
            "differing_rows": found.differing,
            "differing_rows_of_the_run": self.against_run.differing,
            "relative_error": run.relative_error,
            "ranks": dict(run.ranks),
            "versions": package_versions(),
        }


def check_form(form: str, folder: Path, rank: int | None, spec: TrialSpec | None) -> None:
    """Check that a trial, if it is known, can be had in a form, before anything is computed.

    Raises:
        InputError: It cannot be; all that is wrong is said at once.
    """
    problems = Problems()
    if form not in FORMS:
        problems.add(f"--format {form}: there are {', '.join(FORMS)}.")
    with problems.collect():
        check_save_folder(folder)
    if form == "adapter" and spec is not None:
        method, model = spec.method, spec.model
        name = f"--method {method.name} ({method.variant})"
        if method.adapter == "none":
            problems.add(
                f"--format adapter: {name} trains whole weights, which no adapter of low rank "
                "holds; --format checkpoint does."
            )
        if rank is not None and method.adapter == "exact":
            problems.add(
                f"--format adapter:{rank}: the adapter of {name} is exact, with a rank of its own."
            )
        if model.weights and is_adapter(Path(model.weights)):
            problems.add(
                f"--format adapter: the search's model is {model.source} with the adapter "
                f"{model.weights} merged, which public libraries do not load as one base model; "
                "use --format checkpoint."
            )
    problems.raise_if_any()
