"""What is to be exported, and what came of it, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lunar_tune
from lunar_tune.errors import InputError, Problems
from lunar_tune.export.reading import FORMS, Base
from lunar_tune.study.rows import HEADLINE_SCORES, score_cells
from lunar_tune.training.saving import check_save_folder

if TYPE_CHECKING:
    from lunar_tune.export.proof import Comparison
    from lunar_tune.metrics.evaluate import AnswerRow
    from lunar_tune.trial.spec import TrialSpec

__all__ = ["EXPORT_FILE", "ExportJob", "Exported", "Reported", "check_form", "package_versions"]

EXPORT_FILE = "export.json"
_OF_RETAIN = {"retain_rouge1", "deviation_score"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What a search says of the trial that is exported."""

    search: str
    """Its name."""
    trial: int
    goal: str
    """What the search was after, in words."""
    scores: Mapping[str, float]
    rows: Sequence[AnswerRow]
    """The answers from which the scores come; not all questions where the trial was stopped."""
    max_new_tokens: int
    """Token budget of the answers."""
    vanilla: Mapping[str, float]
    """The base model's scores."""
    feasible: bool
    """Whether every bound is kept."""
    missed: str = ""
    """The bounds that are not, in words."""
    n_retain: int
    """Questions to keep of which the scores might be."""
    held_out: bool = False
    """Whether the search holds questions out of its trials."""
    full: bool = True
    """Whether these are the scores of a full evaluation, which asks what is held out."""

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
        remarks = [f"feasible: {'yes' if self.feasible else f'no, it misses {self.missed}'}"]
        if not self.retain_exact:
            asked = f"{self.retain_rows} of {self.n_retain} questions"
            remarks.append(f"≈: an estimate, mean of {asked} to keep")
        if self.held_out and self.full:
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
    full: bool
    """Whether what was reported is a full evaluation."""
    form: str
    """checkpoint or adapter."""
    folder: Path
    reported: Reported
    rank: int | None = None
    """Rank of an approximate adapter; None lets its error decide."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Digests of the questions, by set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A written form with what its proof found."""

    job: ExportJob
    base: Base
    dtype: str
    """Number format in which it was asked."""
    comparison: Comparison
    """Its answers beside what the search reported."""
    against_run: Comparison
    """Its answers beside those of the run that it was written from, decoded alike."""
    relative_errors: Mapping[str, float]
    """Errors of an approximate adapter, by weight."""
    ranks: Mapping[str, int]
    """Ranks of an adapter, by weight."""
    failures: tuple[str, ...]
    """Why it is not proven; empty where it is."""

    def document(self) -> dict[str, Any]:
        """Return what `export.json` says."""
        job, reported, found = self.job, self.job.reported, self.comparison
        return {
            "format": job.form,
            "proven": not self.failures,
            "failures": list(self.failures),
            "search": reported.search,
            "trial": reported.trial,
            "model": job.spec.model.name,
            "base": self.base.source,
            "base_revision": self.base.revision,
            "base_fingerprint": self.base.fingerprint,
            "dtype": self.dtype,
            "method": job.spec.method.name,
            "variant": job.spec.method.variant,
            "parameters": dict(job.parameters),
            "seed": job.spec.seed,
            "data": job.spec.data.name,
            "forget_edges": list(job.spec.data.forget_edges),
            "data_digests": dict(job.digests),
            "max_new_tokens": reported.max_new_tokens,
            "feasible": reported.feasible,
            "missed": reported.missed,
            "retain_rows": reported.retain_rows,
            "n_retain": reported.n_retain,
            "retain_exact": reported.retain_exact,
            "on_held_out": reported.held_out and reported.full,
            "scores": dict(found.scores),
            "reported_scores": dict(reported.scores),
            "vanilla_scores": dict(reported.vanilla),
            "n_rows": found.n_rows,
            "compared": found.compared,
            "differing_rows": found.differing,
            "differing_rows_of_the_run": self.against_run.differing,
            "relative_error": max(self.relative_errors.values(), default=0.0),
            "ranks": dict(self.ranks),
            "versions": package_versions(),
        }


def check_form(job_form: str, folder: Path, rank: int | None, spec: TrialSpec | None) -> None:
    """Check that a trial can be had in a form, before anything is computed.

    Args:
        job_form: As it was asked for.
        folder: Where it is to be written.
        rank: As it was asked for.
        spec: Of the trial; None where that is not known.

    Raises:
        InputError: It cannot be; all that is wrong is said at once.
    """
    problems = Problems()
    if job_form not in FORMS:
        problems.add(f"--format {job_form}: there are {', '.join(FORMS)}.")
    with problems.collect():
        check_save_folder(folder, "--save")
    if spec is not None and job_form in FORMS:
        with problems.collect():
            _check_suits(job_form, rank, spec)
    problems.raise_if_any()


def _check_suits(form: str, rank: int | None, spec: TrialSpec) -> None:
    """Check a form against method and model."""
    from lunar_tune.models.catalog import is_adapter

    problems, method = Problems(), spec.method
    name = f"--method {method.name} ({method.variant})"
    if form == "adapter" and method.adapter == "none":
        problems.add(
            f"--format adapter: {name} trains whole weights, which no adapter of low rank holds; "
            "--format checkpoint does."
        )
    if rank is not None and form == "adapter" and method.adapter == "exact":
        problems.add(
            f"--format adapter:{rank}: the adapter of {name} is exact, with a rank of its own."
        )
    if form != "checkpoint" and spec.model.weights and is_adapter(Path(spec.model.weights)):
        problems.add(
            f"--format {form}: the search's model is {spec.model.source} with the adapter "
            f"{spec.model.weights} merged, which public libraries do not load as one base model; "
            "use --format checkpoint."
        )
    problems.raise_if_any(InputError)


def package_versions() -> dict[str, str]:
    """Return the versions of what an export depends on."""
    names = ("torch", "transformers", "peft", "safetensors")
    return {"lunar-tune": lunar_tune.__version__, **{name: version(name) for name in names}}
