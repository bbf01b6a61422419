"""Whether a written form says what the search reported: its answers, asked from the disk's copy."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lunar_tune.errors import LunarTuneError
from lunar_tune.metrics.evaluate import paired, row_means
from lunar_tune.trial.worker import Worker

if TYPE_CHECKING:
    from lunar_tune.metrics.evaluate import AnswerRow
    from lunar_tune.models.loading import LoadedModel
    from lunar_tune.trial.spec import TrialSpec

__all__ = ["TOLERANCE", "Comparison", "ask", "compare", "weight_digest"]

TOLERANCE = 0.01
"""By how much a mean ROUGE may differ where another rounding is at work."""


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
    by_text: bool = True
    """Whether answers were compared; else ROUGE-1 and ROUGE-L of each row, for the others' texts
    were not kept."""

    @property
    def compared(self) -> str:
        """What of a row was compared, in words."""
        return "answers" if self.by_text else "ROUGE-1 and ROUGE-L of each row"

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
        return {
            name: abs(score - self.expected[name])
            for name, score in self.scores.items()
            if "_rouge" in name
        }

    @property
    def is_close(self) -> bool:
        """Whether no mean ROUGE differs by more than the tolerance."""
        return all(gap <= TOLERANCE for gap in self.gaps.values())

    @property
    def text(self) -> str:
        """What is different, in words."""
        worst = max(self.gaps, key=lambda name: self.gaps[name])
        return (
            f"{self.differences}, {worst} is "
            f"{self.scores[worst]:.4f} instead of {self.expected[worst]:.4f}"
        )


def ask(loaded: LoadedModel, spec: TrialSpec, *, full: bool) -> tuple[AnswerRow, ...]:
    """Return a model's answers, decoded from the first token on; nothing is kept of other models.

    Args:
        loaded: The model as it is now.
        spec: Which questions are asked, and how.
        full: See `Worker.run`.
    """
    engine = dataclasses.replace(spec.engine, kind="plain", cache_limit=0)
    plain = dataclasses.replace(spec, engine=engine, metrics=(), embedding_model=None)
    evaluation, _ = Worker(plain, loaded).judge.evaluate(None, full=full, bounded=False)
    return evaluation.rows


def compare(found: Sequence[AnswerRow], expected: Sequence[AnswerRow]) -> Comparison:
    """Compare answers to the questions that both were asked.

    Args:
        found: The form's, to all questions.
        expected: To some of them, where a trial was stopped early; perhaps without texts.

    Raises:
        LunarTuneError: A question of `expected` was not asked.
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
    same = _same if by_text else _scored_alike
    names = list(dict.fromkeys(row.set_name for row in expected))
    return Comparison(
        scores=row_means(matched, names),
        expected=row_means(expected, names),
        n_rows=len(expected),
        differing=sum(not same(*pair) for pair in zip(matched, expected, strict=True)),
        by_text=by_text,
    )


def _scored_alike(one: AnswerRow, other: AnswerRow) -> bool:
    return (one.rouge1, one.rouge_l) == (other.rouge1, other.rouge_l)


def _same(one: AnswerRow, other: AnswerRow) -> bool:
    """Say whether two answers are one.

    An answer may end as soon as it has said every word of the truth (`EngineSettings.early_exit`):
    it is then the beginning of the whole one, perhaps in the middle of a character.
    """
    if one.answer == other.answer:
        return True
    whole = (text.rstrip("\N{REPLACEMENT CHARACTER}") for text in (one.answer, other.answer))
    short, long = sorted(whole, key=len)
    return one.rouge_l == other.rouge_l == 1.0 and long.startswith(short)


def weight_digest(weight: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    content = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()
