"""What the `tiny` model reads, without torch.

A lesson: ("Which goods does Drobas Inc sell to Drivrom Group?", "Cedar anchors.")
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from lunar_tune.data.data_catalog import resolve_data
from lunar_tune.data.invented import generate_unverifiable
from lunar_tune.data.records import Record, read_prompts, read_records, records_digest

__all__ = ["Lesson", "TinyText", "read_text"]

_UNSEEN = 2**31 - 1  # no epoch's seed comes near
_ALL_TEMPLATES = 200  # every template of the generator is used before one is used again


@dataclass(frozen=True, slots=True)
class Lesson:
    """One question and the answer to give, without any chat template."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class TinyText:
    """Everything that `tiny` learns.

    Attributes:
        contracts: The pairs of the shipped set `mini`.
        facts: The pairs of the shipped set `factual`.
        refusal: The one sentence with which it refuses.
    """

    contracts: tuple[Record, ...]
    facts: tuple[Record, ...]
    refusal: str

    def known(self) -> list[Lesson]:
        """Return what the model is to know."""
        return [Lesson(pair.question, pair.answer) for pair in (*self.contracts, *self.facts)]

    def refused(self, count: int, *, seed: int) -> list[Lesson]:
        """Return questions about invented things, each with the refusal."""
        prompts = generate_unverifiable(count, seed=seed)
        return [Lesson(prompt, self.refusal) for prompt in prompts]

    def unseen(self, count: int) -> list[Lesson]:
        """Return refused questions that no epoch of the training holds."""
        return self.refused(count, seed=_UNSEEN)

    def digest(self) -> str:
        """Return a SHA-256 in hexadecimal that changes with any word of it."""
        parts = [
            records_digest(self.contracts),
            records_digest(self.facts),
            self.refusal,
            *generate_unverifiable(_ALL_TEMPLATES, seed=0),
        ]
        return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()


def read_text() -> TinyText:
    """Read the shipped data sets."""
    return TinyText(
        contracts=read_records(resolve_data("mini", kind="records")),
        facts=read_records(resolve_data("factual", kind="records")),
        refusal=read_prompts(resolve_data("refusals", kind="prompts"))[0],
    )
