"""One trial that is to be exported, and the run that it is written from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lunar_tune.data.data_catalog import DataKind, resolve_data
from lunar_tune.errors import DataError, InputError, Problems
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.metrics.goal import METRICS, VERDICTS
from lunar_tune.models.weights import is_adapter
from lunar_tune.study.folder import RUNS
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.training.checkpoints import check_save_folder
from lunar_tune.trial.assemble import answered, assemble, check_machine, in_format_of
from lunar_tune.trial.spec import TrialSpec, with_own_data

_PROMPTS = ("reference_prompts", "refusals")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """One trial of a search, to be carried away in one form."""

    search: StoredSearch
    row: TrialRow
    answers: Sequence[AnswerRow]
    """The search's, from which its scores come; not all questions where the trial was stopped."""
    spec: TrialSpec  # what the trial ran on; its model's source need not exist yet if it is `tiny`
    form: str
    folder: Path
    rank: int | None = None  # rank of an approximate adapter; None lets its error decide

    @property
    def full(self) -> bool:
        """Whether the scores are those of a full evaluation, which asks what is held out."""
        return self.row == self.search.best

    @classmethod
    def plan(
        cls,
        search: str | Path,
        folder: Path,
        *,
        runs: str | Path = RUNS,
        number: int | None = None,
        form: str = "checkpoint",
        device: str | None = None,
        trust_remote_code: bool | None = None,
        problems: Problems | None = None,
    ) -> ExportJob:
        """Check what is to be exported, the best trial or one by number, or raise an InputError."""
        problems = problems or Problems()
        kind, _, rank = form.partition(":")
        if not re.fullmatch("checkpoint|adapter(:[1-9][0-9]*)?", form):
            problems.add(
                f"--format {form}: must be checkpoint, adapter or adapter:RANK, RANK at least 1."
            )
        with problems.collect():
            check_save_folder(folder)
        with problems.collect():
            found = StoredSearch.read(search, runs=runs)
            with problems.collect():
                row = found.trial(number)
                answers = found.answer_rows(row.number, full=row == found.best)
            with problems.collect():
                spec = assemble_again(
                    found, problems, device=device, trust_remote_code=trust_remote_code
                )
                if kind == "adapter":
                    check_adapter(spec, rank)
        problems.raise_if_any()
        return cls(
            search=found,
            row=row,
            answers=answers,
            spec=spec,
            form=kind,
            folder=folder,
            rank=int(rank) if rank else None,
        )


@dataclass(slots=True, kw_only=True)
class ExportRun:
    """The run that a form is written from; nothing here refers to its model."""

    base: str  # hub id or folder of the base model, which an adapter belongs on
    revision: str | None  # commit on the hub; None for a folder
    fingerprint: str
    tokenizer: str  # hub id or folder
    dtype: str
    attention: str  # sdpa or eager
    answers: tuple[AnswerRow, ...] = ()  # the unlearned model's, decoded from the first token on
    digests: dict[str, str] = field(default_factory=dict)  # digests of the new weights
    merged: bool = False  # see `methods.contract.Edit`
    ranks: dict[str, int] = field(default_factory=dict)  # ranks of an adapter, by linear map
    errors: dict[str, float] = field(default_factory=dict)  # relative, of an approximate one


def check_adapter(spec: TrialSpec, rank: str) -> None:
    """Check that a trial can be had as an adapter, of that rank if any, or raise an InputError."""
    problems, method, model = Problems(), spec.method, spec.model
    name = f"--method {method.name} ({method.variant})"
    if method.adapter == "none":
        problems.add(
            f"--format adapter: {name} trains whole weights, which no adapter of low rank holds; "
            "use --format checkpoint."
        )
    if rank and method.adapter == "exact":
        problems.add(
            f"--format adapter:{rank}: the adapter of {name} is exact, with a rank of its own; use "
            "--format adapter."
        )
    if model.weights and is_adapter(Path(model.weights)):
        problems.add(
            f"--format adapter: the search's model is {model.source} with the adapter "
            f"{model.weights} merged, which public libraries do not load as one base model; use "
            "--format checkpoint."
        )
    problems.raise_if_any(InputError)


def assemble_again(
    search: StoredSearch,
    problems: Problems,
    *,
    device: str | None = None,
    trust_remote_code: bool | None = None,
) -> TrialSpec:
    """Return what a search's trials shared, to have one's answers again, or raise an InputError.

    In `problems` is noted which file of data has changed. No device is the search's; code of its
    model is trusted by nobody but who runs this.
    """
    options, then = search.config.trial_options, search.config.resolved.get("digests") or {}
    wanted = dict.fromkeys((*options.metrics, *search.goal.metrics))
    search.config.check_permitted({"trust_remote_code": trust_remote_code})
    options = dataclasses.replace(
        options,
        device=device or options.device,
        trust_remote_code=bool(trust_remote_code),
        # With these, answers are asked for longer.
        metrics=tuple(name for name in wanted if VERDICTS in METRICS[name].needs),
        embedding_model=None,
    )
    known, references = search.study.notes.get("model"), search.study.references
    options = in_format_of(options, known)
    spec = answered(options, assemble(options))
    spec = dataclasses.replace(spec, known_model=known, known_references=references)
    named = with_own_data(options, spec.model)
    sources = {"factual": named.factual_data, **{n: getattr(named, n) for n in _PROMPTS}}
    changed: dict[str, list[str]] = {}
    for name, digest in spec.data.digests().items():
        if then.get(name, digest) != digest:
            source = sources.get(name) or str(named.data)
            changed.setdefault(source, []).append(name)
    for source, names in changed.items():
        kind: DataKind = "prompts" if set(names) <= set(_PROMPTS) else "records"
        sets, place = " and ".join(names).replace("_", " "), source
        with suppress(DataError):  # no file: factual data that are switched off now
            place = str(resolve_data(source, kind=kind))
        problems.add(
            f"{place}: the data have changed since the search: the {sets} "
            f"{'set is another one' if kind == 'records' else 'are others'}. The search's trials "
            "cannot be run again; put the file back, or search again."
        )
    if not problems.messages:
        check_machine(spec)
    return spec
