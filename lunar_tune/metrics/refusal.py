"""How much answers are like refusals, and how much like the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lunar_tune.metrics.embedding import Embedder

__all__ = ["Refusals", "refusal_quality", "truth_similarity"]


class Refusals:
    """Answers that decline, embedded once, to compare other answers with.

    Args:
        embedder: Of texts; with the model's own states, embed when the model is as it was.
        texts: The refusals.

    Raises:
        ValueError: There is none.
    """

    def __init__(self, embedder: Embedder, texts: Sequence[str]) -> None:
        _check(texts)
        self._embedder, self._embedded = embedder, embedder.embed(texts)

    def quality(self, answers: Sequence[str]) -> float:
        """Return how much answers to the questions to forget are like refusals, from −1 to 1.

        For each answer the mean of its cosine similarities to all refusals (the shipped set has
        ten), then the mean over the answers; a refusal that stands twice counts twice. As the
        refusals differ among themselves, even one of them does not reach 1.

        Args:
            answers: What the model says.

        Raises:
            ValueError: There is none.
        """
        _check(answers)
        return float((self._embedder.embed(answers) @ self._embedded.T).mean())


def refusal_quality(embedder: Embedder, answers: Sequence[str], refusals: Sequence[str]) -> float:
    """Return `Refusals.quality` of answers that are judged once.

    Args:
        embedder: See `Refusals`.
        answers: What the model says.
        refusals: Answers that decline.
    """
    return Refusals(embedder, refusals).quality(answers)


def truth_similarity(embedder: Embedder, answers: Sequence[str], truths: Sequence[str]) -> float:
    """Return the mean cosine similarity of each answer to its own true answer, from −1 to 1.

    Args:
        embedder: Of texts; with the model's own states, embed when the model is as it was.
        answers: What the model says.
        truths: The true answers, in the same order.

    Raises:
        ValueError: There are not as many truths as answers.
    """
    _check(answers, truths)
    if len(answers) != len(truths):
        raise ValueError(f"{len(answers)} answers and {len(truths)} true answers")
    return float((embedder.embed(answers) * embedder.embed(truths)).sum(1).mean())


def _check(*groups: Sequence[str]) -> None:
    if not all(groups):
        raise ValueError("a mean similarity of no texts was asked for")
