"""Everything that a worker needs for trials, resolved and picklable."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from lunar_tune.config.options import (
    DECLINED,
    NEVER,
    NONE,
    OWN_QUESTIONS,
    PUBLISHED_MAX_NEW_TOKENS,
    TINY,
    RunOptions,
)
from lunar_tune.data.data_catalog import kind_of, pairs_kind, read_data, resolve_data
from lunar_tune.data.readers import OnNote, stem_of, unheard
from lunar_tune.data.records import (
    Record,
    prompts_digest,
    read_prompts,
    read_records,
    records_digest,
)
from lunar_tune.data.splits import (
    Groups,
    Split,
    edges_of,
    halves_by_edge,
    read_groups,
    sample_by_edge,
    split_by_edges,
)
from lunar_tune.data.texts import edge_name, normalised
from lunar_tune.display import Concise
from lunar_tune.errors import DataError, Problems
from lunar_tune.methods.contract import Method
from lunar_tune.metrics.rouge import check_scorable, lost_letters
from lunar_tune.models.catalog import ModelSpec, read_lineage
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.fingerprint import Identity
from lunar_tune.trial.references import References

Options = TypeVar("Options", bound=RunOptions)
VERIFY_VARIABLE = "LUNAR_TUNE_VERIFY_WEIGHTS"


class HeldOut(NamedTuple):
    """Questions that no trial is judged on, and a full evaluation asks instead of the others."""

    forget: tuple[Record, ...]
    retain: tuple[Record, ...]
    factual: tuple[Record, ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class DataSets(Concise):
    """The questions of a study."""

    name: str  # the data set's name or file name, to show
    forget_edges: tuple[str, ...]
    fit_forget: tuple[Record, ...]
    fit_retain: tuple[Record, ...]
    forget: tuple[Record, ...]  # questions on which forgetting is judged
    retain: tuple[Record, ...]  # questions on which keeping is judged in a full evaluation
    retain_sample: tuple[Record, ...]  # the part of `retain` that a trial is judged on
    n_retain: int  # rows of the whole retain set, of which `retain` may be the first
    factual: tuple[Record, ...]  # general knowledge; may be empty
    reference_prompts: tuple[str, ...]
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # how files were read, where that is not plain from them
    own_answers: bool = False  # whether the true answers are what the model itself answers
    unanswered: bool = False  # whether it has not been asked yet: there are questions alone
    held_out: HeldOut | None = None
    """What is reported on instead of `forget`, `retain` and `factual`; None reports on those."""

    def asked(self, *, full: bool) -> dict[str, tuple[Record, ...]]:
        """Return the questions of a trial, or of a full evaluation, by set."""
        if full and self.held_out is not None:
            return self.held_out._asdict()
        retain = self.retain if full else self.retain_sample
        return {"forget": self.forget, "retain": retain, "factual": self.factual}

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of each set, of the reference prompts and of the refusals."""
        sets = {"forget": self.forget, "retain": self.retain, "factual": self.factual}
        prompts = {name: getattr(self, name) for name in ("reference_prompts", "refusals")}
        return {
            **{name: records_digest(records) for name, records in sets.items()},
            **{name: prompts_digest(texts) for name, texts in prompts.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrialSpec(Concise):
    """One model, one split, one method: what all trials of a study share."""

    model: ModelSpec
    chat: ChatFormat
    method: Method
    data: DataSets
    rouge_tokenizer: str
    seed: int
    max_new_tokens: int | None = PUBLISHED_MAX_NEW_TOKENS
    """Token budget of a trial's answers; None is twice the longest true answer, at least 32."""
    engine: str = "fast"
    """fast goes on from kept streams and checks drafts, plain decodes from the first token on,
    reference leaves all to `lunar_tune.reference`, with nothing kept."""
    early_exit: bool = False
    """Whether an answer ends when it has said every word of the truth. Its ROUGE recall is 1 then,
    whatever follows; one that is to be read, or that a metric reads to its end, goes on."""
    retain_floor: float | None = None
    """Least retain ROUGE-1: a trial that has missed it for certain asks no more. None asks all."""
    verify_weights: bool = field(default_factory=lambda: bool(os.environ.get(VERIFY_VARIABLE)))
    """Whether a trial ends with a look at every weight, whether it is what it was before."""
    memory_budget: float | None = None
    cache_limit: float | None = None  # both as in `RunOptions`
    layers: tuple[int, ...] = ()  # the blocks that trials may edit; empty where that is not known
    metrics: tuple[str, ...] = ()  # scores wanted beside ROUGE, by name (`metrics.goal`)
    embedding_model: str | None = None  # sentence-embedding model; None: the model's own states
    text: bool = True  # whether questions and answers may be written down
    known_model: Identity | None = None  # what an earlier process has found; another is refused
    reference_check: str = DECLINED  # as in `RunOptions`
    known_references: References | None = None  # what an earlier process has found, which holds

    @property
    def checks_references(self) -> bool:
        """Whether the base model is asked the reference prompts, of which its method makes use."""
        return self.method.along_vectors and self.reference_check != NEVER

    @property
    def first_questions(self) -> dict[str, str]:
        """The first question of each set, by its name; none where texts are not to be shown."""
        sets = {
            name: [one.question for one in some]
            for name, some in self.data.asked(full=False).items()
        }
        sets["reference"] = list(self.data.reference_prompts)
        return {name: texts[0] for name, texts in sets.items() if texts and self.text}

    @property
    def row_numbers(self) -> dict[tuple[str, Record], int]:
        """The number of each question in its set, the same everywhere; held-out ones come last."""
        numbers: dict[tuple[str, Record], int] = {}
        for name in HeldOut._fields:
            sets = (self.data, self.data.held_out or self.data)
            records = (record for one in sets for record in getattr(one, name))
            for number, record in enumerate(records):
                numbers.setdefault((name, record), number)
        return numbers

    @property
    def lost_letters(self) -> dict[str, str]:
        """What ROUGE cannot see of the true answers, to show; empty where it sees all."""
        records = () if self.data.unanswered else self.row_numbers
        text = lost_letters((record for _, record in records), self.rouge_tokenizer)
        return {"  lost letters": text} if text else {}

    @property
    def tags(self) -> dict[str, str]:
        """What it is about, flat, for a tracking server."""
        return {
            "model": self.model.name,
            "data": self.data.name,
            "forget_edge": ",".join(self.data.forget_edges),
            "method": self.method.name,
            "solver": self.method.variant,
        }


TAUGHT, TAUGHT_TINY = "contracts", "mini"  # data that a model is taught where none are named
# Of PISTOL and of TOFU, as in the published code, and of the shipped questions.
DEFAULT_EDGES = ("A_B", "author_1", "chemical_symbols")


def with_own_data(options: Options, model: ModelSpec) -> Options:
    """Return options in which all data have a name, or raise a DataError.

    Where none are named, they are what the model is taken to know, and what goes with that.
    """
    data = options.data or own_data(model)
    is_asked = pairs_kind(data) == "questions"
    return dataclasses.replace(
        options,
        data=data,
        factual_data=options.factual_data or (NONE if is_asked else "factual"),
        reference_prompts=options.reference_prompts or ("private" if is_asked else "unverifiable"),
    )


def read_sets(options: RunOptions, answered: Sequence[Record] | None = None) -> DataSets:
    """Read and split all sets, which have names (`with_own_data`), or raise a DataError.

    `answered` are the pairs of a question set, as the model has answered it.
    """
    problems, name, notes = Problems(), str(options.data), list[str]()
    own_answers = pairs_kind(name) == "questions"
    unanswered = own_answers and not answered
    factual: tuple[Record, ...] = ()
    other: tuple[Record, ...] | None = None
    read = problems.attempt(
        lambda: read_data(name, default_edge=options.edge, on_note=notes.append)
    )
    with problems.collect():
        if options.factual_data not in {NONE, name}:  # what is forgotten is no general knowledge
            factual = read_records_of(str(options.factual_data), NONE, notes.append)
    with problems.collect():
        if options.retain_data:
            other = read_records_of(options.retain_data, "retain", notes.append)
    with problems.collect():
        prompts = read_prompts_of(str(options.reference_prompts), notes.append)
    with problems.collect():
        refusals = read_prompts_of(options.refusals, notes.append)
    with problems.collect():
        if read is not None:
            path, records = read
            groups = read_groups(path)
            split = _split(options, answered or records, groups, other, notes.append)
    problems.raise_if_any()
    forgotten = {normalised(record.question) for record in split.forget}
    if both := sum(normalised(record.question) in forgotten for record in factual):
        notes.append(f"{both} of the factual questions are to be forgotten")
    kept = split.retain if other is None else other
    with problems.collect():
        Split(forget=split.forget, retain=kept, forget_edges=split.forget_edges)
    # A count below 1 is a mistake that is noted already; what else is wrong is to be found too.
    rows = None if options.evaluation_rows is None else max(1, options.evaluation_rows)
    judged = HeldOut(split.forget[:rows], split.retain[:rows], factual[:rows])
    n_retain, held_out = len(split.retain), None
    with problems.collect():
        evaluated = {"factual": judged.factual}
        if not unanswered:
            evaluated = judged._asdict() | {"forget": split.forget}
        check_scorable(evaluated, tokenizer=options.rouge_tokenizer, text=options.text)
        if options.holdout:
            judged, held_out = _halves(judged, options.seed, notes if own_answers else None)
            # What is kept in the fit would be kept in the report as well.
            reported = {normalised(one.question) for one in (*held_out.retain, *held_out.factual)}
            kept = tuple(one for one in kept if normalised(one.question) not in reported)
            n_retain = len(judged.retain)
    problems.raise_if_any()
    size = n_retain if options.retain_rows is None else max(1, options.retain_rows)
    return DataSets(
        name=stem_of(Path(name)),
        forget_edges=split.forget_edges,
        fit_forget=split.forget,
        fit_retain=kept,
        **judged._asdict(),
        n_retain=n_retain,
        retain_sample=sample_by_edge(judged.retain, size, seed=options.seed),
        reference_prompts=prompts,
        refusals=refusals,
        notes=tuple(dict.fromkeys(notes)),
        own_answers=own_answers,
        unanswered=unanswered,
        held_out=held_out,
    )


def _split(
    options: RunOptions,
    records: Sequence[Record],
    groups: Groups,
    other: tuple[Record, ...] | None,
    on_note: OnNote,
) -> Split:
    """Split the data; what is nothing but to be forgotten is judged on the other retain set."""
    existing = edges_of(records)
    if options.edge is not None and edge_name(options.edge) not in existing:
        on_note(f"--edge {options.edge}: every row has an edge of its own")
    edges = options.forget_edge or _default_edge(existing, groups, options.edge)
    return split_by_edges(records, edges, retain=other, groups=groups)


def _halves(judged: HeldOut, seed: int, notes: list[str] | None) -> tuple[HeldOut, HeldOut]:
    """Return the questions that trials are judged on, and those that are held out.

    With `notes`, of a model's own answers, an edge of one question is judged on alone, and noted.
    """
    seen, lone = dict[str, bool](), None if notes is None else list[str]()
    halves = [halves_by_edge(records, seed=seed, in_first=seen, lone=lone) for records in judged]
    first, second = (HeldOut(*half) for half in zip(*halves, strict=True))
    if notes is not None and lone:
        notes.append(f"one answer each, which is not held out: {', '.join(lone)}")
        if not (second.forget and second.retain):
            empty = "retain" if second.forget else "forget"
            raise DataError(
                f"--holdout: no edge of the {empty} set has two answers of which one could be held "
                "out. Leave --holdout out, or ask more questions with lunar-tune collect."
            )
    return first, second


def read_records_of(
    name: str, default_edge: str | None = None, on_note: OnNote = unheard
) -> tuple[Record, ...]:
    """Return the question-answer pairs of a data set's name or file."""
    path = resolve_data(name, kind="records")
    return read_records(path, default_edge=default_edge, on_note=on_note)


def read_prompts_of(name: str, on_note: OnNote = unheard) -> tuple[str, ...]:
    """Return the prompts of a data set's name or file."""
    return read_prompts(resolve_data(name, kind="prompts"), on_note=on_note)


def own_data(model: ModelSpec) -> str:
    """Return the name of the data that a model is taken to know, or raise a DataError."""
    if model.name == TINY and model.weights is None:
        return TAUGHT_TINY
    lineage = read_lineage(model.checkpoint) if model.source else None
    if lineage is not None and lineage.settings:
        if kind_of(lineage.data) == "records":
            return lineage.data
        raise DataError(
            f"--data is needed: {model.checkpoint} was taught {lineage.data}, which is no shipped "
            "and no published data set. Give its file."
        )
    return TAUGHT if model.weights is not None else OWN_QUESTIONS


def _default_edge(edges: Mapping[str, int], groups: Groups, given: str | None) -> tuple[str, ...]:
    usual = (edge_name(given or ""), *DEFAULT_EDGES)
    default = next((edge for edge in usual if edge in edges or edge in groups), None)
    if default is None:
        among = f" Groups of edges: {', '.join(groups)}." if groups else ""
        raise DataError(
            f"--forget-edge is needed: the data have none of the defaults "
            f"{', '.join(DEFAULT_EDGES)}. There are: {', '.join(list(edges)[:40])}.{among}"
        )
    return (default,)
