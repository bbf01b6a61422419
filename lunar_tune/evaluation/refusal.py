"""How much answers are like refusals, and how much like the truth.

Covers: refusal quality, s1 of LUNAR's layer choice (arXiv 2502.07218, section 3), and its s2.
Does not cover: embeddings (`embedding`); whether a refusal is well written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lunar_tune.evaluation.embedding import Embedder

__all__ = ["refusal_quality", "truth_similarity"]


def refusal_quality(embedder: Embedder, answers: Sequence[str], refusals: Sequence[str]) -> float:
    """Return how much answers to the questions to forget are like refusals, from −1 to 1.

    For each answer the mean of its cosine similarities to all refusals (the shipped set has ten),
    then the mean over the answers; a refusal that stands twice counts twice. As the refusals differ
    among themselves, even one of them does not reach 1.

    Args:
        embedder: Of texts; with the model's own states, embed when the model is as it was.
        answers: What the model says.
        refusals: Answers that decline.
    """
    _check(answers, refusals)
    return float((embedder.embed(answers) @ embedder.embed(refusals).T).mean())


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


def _check(answers: Sequence[str], others: Sequence[str]) -> None:
    if not answers or not others:
        raise ValueError("a mean similarity of no texts was asked for")
