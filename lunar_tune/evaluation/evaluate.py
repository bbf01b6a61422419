"""Scores of a model on the forget, retain and factual sets.

Covers: which questions are asked, their answers row by row, ROUGE means, the deviation score.
Does not cover: unlearning; the model is judged as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lunar_tune.evaluation.decoding import generate_answers
from lunar_tune.evaluation.rouge import rouge_recall
from lunar_tune.evaluation.settings import DecodingSettings

if TYPE_CHECKING:
    from lunar_tune.data.records import Record
    from lunar_tune.models.loading import LoadedModel

__all__ = ["AnswerRow", "Evaluation", "EvaluationSet", "deviation_score", "evaluate"]


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Questions with true answers, encoded once."""

    name: str
    """forget, retain or factual."""
    records: tuple[Record, ...]
    prompts: tuple[tuple[int, ...], ...]
    """Token ids of each record's prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow:
    """One question, its true answer, and what the model says."""

    set_name: str
    edge: str
    question: str
    truth: str
    answer: str
    rouge1: float
    rouge_l: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Answers and their means."""

    rows: tuple[AnswerRow, ...]
    scores: Mapping[str, float]
    """`<set>_rouge1`, `<set>_rougeL`, `<set>_rows` for each set, and `deviation_score`."""


def deviation_score(forget_rouge1: float, retain_rouge1: float) -> float:
    """Return 100·sqrt(forget² + (1 − retain)²), in percent; lower is better (LUNAR, 4.1)."""
    return 100.0 * math.hypot(forget_rouge1, 1.0 - retain_rouge1)


def evaluate(
    loaded: LoadedModel,
    sets: Sequence[EvaluationSet],
    settings: DecodingSettings,
    *,
    max_new_tokens: int,
    rouge_tokenizer: str = "default",
) -> Evaluation:
    """Ask all questions, greedily, and score the answers.

    The sets share batches: a row's answer does not depend on its neighbours.
    """
    questions = [(one.name, record) for one in sets for record in one.records]
    prompts = [prompt for one in sets for prompt in one.prompts]
    answers = generate_answers(loaded, prompts, settings, max_new_tokens=max_new_tokens)
    recalls = rouge_recall(
        [record.answer for _, record in questions], answers, tokenizer=rouge_tokenizer
    )
    rows = tuple(
        AnswerRow(
            set_name=name,
            edge=record.edge,
            question=record.question,
            truth=record.answer,
            answer=answer,
            rouge1=recall.rouge1,
            rouge_l=recall.rouge_l,
        )
        for (name, record), answer, recall in zip(questions, answers, recalls, strict=True)
    )
    return Evaluation(rows=rows, scores=_means(rows, [one.name for one in sets]))


def _means(rows: Sequence[AnswerRow], names: Sequence[str]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name in names:
        mine = [row for row in rows if row.set_name == name]
        scores[f"{name}_rouge1"] = _mean([row.rouge1 for row in mine])
        scores[f"{name}_rougeL"] = _mean([row.rouge_l for row in mine])
        scores[f"{name}_rows"] = len(mine)
    if "forget_rouge1" in scores and "retain_rouge1" in scores:
        scores["deviation_score"] = deviation_score(
            scores["forget_rouge1"], scores["retain_rouge1"]
        )
    return scores


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
