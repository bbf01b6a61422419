"""One trial that is to be exported, and the run that it is written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lunar_tune.errors import InputError, Problems
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.metrics.goal import in_words
from lunar_tune.models.catalog import is_adapter
from lunar_tune.study.rows import HEADLINE_SCORES, TrialRow, score_cells
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.trial.spec import TrialSpec

__all__ = ["ExportJob", "ExportRun", "check_adapter"]

_OF_RETAIN = {"retain_rouge1", "deviation_score"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """One trial of a search, to be carried away in one form."""

    search: StoredSearch
    row: TrialRow
    answers: Sequence[AnswerRow]
    """The search's, from which the scores come; not all questions where the trial was stopped."""
    spec: TrialSpec
    """What the trial ran on; its model's source need not exist yet if it is `tiny`."""
    form: str
    folder: Path
    rank: int | None = None
    """Rank of an approximate adapter; None lets its error decide."""

    @property
    def full(self) -> bool:
        """Whether the scores are those of a full evaluation, which asks what is held out."""
        return self.row == self.search.best

    @property
    def scores(self) -> Mapping[str, float]:
        """What the search reported."""
        return (self.search.confirmed if self.full else None) or self.row.scores

    @property
    def baseline(self) -> Mapping[str, float]:
        """The base model's scores on the same questions."""
        return self.search.baseline_in_full if self.full else self.search.baseline

    @property
    def max_new_tokens(self) -> int:
        """Token budget of the answers."""
        notes = self.search.study.notes
        budget = notes["confirmed"]["max_new_tokens"] if self.full else self.row.max_new_tokens
        return int(budget or 0)

    @property
    def missed(self) -> str:
        """The bounds that are not kept, in words; empty where the trial is feasible."""
        return in_words(self.search.goal.missed(self.scores))

    @property
    def on_held_out(self) -> bool:
        """Whether the scores are on questions on which no trial was judged."""
        return self.full and self.spec.data.held_out is not None

    @property
    def retain_rows(self) -> int:
        """Questions to keep that were asked."""
        return sum(row.set_name == "retain" for row in self.answers)

    @property
    def n_retain(self) -> int:
        """Questions to keep in all."""
        held = self.spec.data.held_out
        return len(held.retain) if held is not None and self.full else self.spec.data.n_retain

    @property
    def retain_exact(self) -> bool:
        """Whether all questions to keep were asked."""
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
        elif self.spec.data.held_out is not None:
            remarks.append("scores are on the questions of the trials, not on held-out questions")
        return remarks


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


def check_adapter(spec: TrialSpec, rank: str) -> None:
    """Check that a trial can be had as an adapter, of a rank where one is named.

    Raises:
        InputError: It cannot be; all that is wrong is said at once.
    """
    problems, method, model = Problems(), spec.method, spec.model
    name = f"--method {method.name} ({method.variant})"
    if method.adapter == "none":
        problems.add(
            f"--format adapter: {name} trains whole weights, which no adapter of low rank holds; "
            "--format checkpoint does."
        )
    if rank and method.adapter == "exact":
        problems.add(
            f"--format adapter:{rank}: the adapter of {name} is exact, with a rank of its own."
        )
    if model.weights and is_adapter(Path(model.weights)):
        problems.add(
            f"--format adapter: the search's model is {model.source} with the adapter "
            f"{model.weights} merged, which public libraries do not load as one base model; use "
            "--format checkpoint."
        )
    problems.raise_if_any(InputError)
