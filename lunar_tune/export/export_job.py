"""One trial that is to be exported, and the run that it is written from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lunar_tune.errors import InputError, Problems
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.models.catalog import is_adapter
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.trial.spec import TrialSpec

__all__ = ["ExportJob", "ExportRun", "check_adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """One trial of a search, to be carried away in one form."""

    search: StoredSearch
    row: TrialRow
    answers: Sequence[AnswerRow]
    """The search's, from which its scores come; not all questions where the trial was stopped."""
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


@dataclass(slots=True, kw_only=True)
class ExportRun:
    """The run that a form is written from; nothing here refers to its model."""

    base: str
    """Hub id or folder of the base model, which an adapter belongs on."""
    revision: str | None
    """Commit on the hub; None for a folder."""
    fingerprint: str
    tokenizer: str
    """Hub id or folder."""
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
