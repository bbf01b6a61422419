"""Everything that a worker needs for trials, resolved and picklable."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from lunar_tune.config.run_options import PUBLISHED_MAX_NEW_TOKENS
from lunar_tune.data.records import Record, records_digest
from lunar_tune.methods.contract import Method
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.chat import ChatFormat

__all__ = ["DataSets", "EngineSettings", "HeldOut", "TrialSpec"]

VERIFY_VARIABLE = "LUNAR_TUNE_VERIFY_WEIGHTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a trial keeps from others and what it skips; none of it changes a feasible score."""

    reuse: bool = True
    """Whether prompts go on from kept streams and drafts are checked; False decodes plainly."""
    reference: bool = False
    """Whether `lunar_tune.reference` does all of it, with nothing kept."""
    early_exit: bool = False
    """Whether an answer ends when it has said every word of the truth. Its ROUGE recall is 1 then,
    whatever follows; an answer that is to be read should go on."""
    retain_floor: float | None = None
    """Least retain ROUGE-1: a trial that has missed it for certain asks no more. None asks all."""
    verify_weights: bool = field(default_factory=lambda: bool(os.environ.get(VERIFY_VARIABLE)))
    """Whether a trial ends with a look at every weight, whether it is what it was before; the
    environment variable `LUNAR_TUNE_VERIFY_WEIGHTS` switches it on."""
    memory_budget: float | None = None
    """GiB of a GPU that weights, streams and batches share; None takes all that is free."""
    cache_limit: float | None = None
    """GiB that activations on disk may take; 0 keeps none there, None is a quarter of the disk's
    free space, at most 100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Questions that no trial is judged on, and a full evaluation asks instead of the others."""

    forget: tuple[Record, ...]
    retain: tuple[Record, ...]
    factual: tuple[Record, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSets:
    """The questions of a study."""

    name: str
    """The data set's name or file name, to show."""
    forget_edges: tuple[str, ...]
    fit_forget: tuple[Record, ...]
    """Questions to forget."""
    fit_retain: tuple[Record, ...]
    """Questions that the fit keeps where they are."""
    forget: tuple[Record, ...]
    """Questions on which forgetting is judged."""
    retain: tuple[Record, ...]
    """Questions on which keeping is judged in a full evaluation."""
    retain_sample: tuple[Record, ...]
    """The part of `retain` that a trial is judged on."""
    n_retain: int
    """Rows of the whole retain set, of which `retain` may be the first."""
    factual: tuple[Record, ...]
    """General knowledge; may be empty."""
    reference_prompts: tuple[str, ...]
    """Prompts that the model declines."""
    refusals: tuple[str, ...] = ()
    """Answers that decline."""
    held_out: HeldOut | None = None
    """What is reported on instead of `forget`, `retain` and `factual`; None reports on those."""

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of each set, of the reference prompts and of the refusals."""
        prompts = {"reference_prompts": self.reference_prompts, "refusals": self.refusals}
        as_records = {
            name: [Record(question=text, answer="", edge="") for text in texts]
            for name, texts in prompts.items()
        }
        sets = {"forget": self.forget, "retain": self.retain, "factual": self.factual}
        return {name: records_digest(one) for name, one in (sets | as_records).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """One model, one split, one method: what all trials of a study share."""

    model: ModelSpec
    chat: ChatFormat
    method: Method
    data: DataSets
    rouge_tokenizer: str
    seed: int
    max_new_tokens: int | None = PUBLISHED_MAX_NEW_TOKENS
    """Token budget of a trial's answers; None is twice the longest true answer, at least 32."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """What is kept and skipped."""
    layers: tuple[int, ...] = ()
    """The blocks that trials may edit; empty where that is not known."""
    metrics: tuple[str, ...] = ()
    """Scores that are wanted beside ROUGE, by name (`metrics.names`)."""
    embedding_model: str | None = None
    """Hub id or folder of the sentence-embedding model for the scores that need one; None takes
    the model's own states."""
    text: bool = True
    """Whether questions and answers may be written down."""

    @property
    def row_numbers(self) -> dict[tuple[str, str, str, str], int]:
        """The number of each question in its set, which stands for it where texts are left out.

        The key is set, edge, question and truth. Questions that no trial is judged on are counted
        after the others, so that a number means the same in every file.
        """
        numbers: dict[tuple[str, str, str, str], int] = {}
        for name in ("forget", "retain", "factual"):
            reported = getattr(self.data.held_out, name) if self.data.held_out is not None else ()
            for number, one in enumerate((*getattr(self.data, name), *reported)):
                numbers.setdefault((name, one.edge, one.question, one.answer), number)
        return numbers

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
