"""Whether a model knows its data, and whether it still declines what it cannot know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lunar_tune.data.records import Record
from lunar_tune.engine.decoding import generate_tokens, token_budget
from lunar_tune.finetuning.finetune_job import FinetuneJob, unseen_prompts
from lunar_tune.metrics.rouge import rouge_recall
from lunar_tune.models.chat import encode_prompts

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = ["AskedRow", "Knowledge", "check_knowledge", "is_refusal"]

UNANSWERABLE = 50
# Half of a sentence's words; two refusals of the shipped list share up to two thirds.
_LEAST_RECALL = 0.5
# How instruction models of the catalogue's families begin when they decline.
_MARKERS = (
    *("i do not know", "i don't know", "i am not aware", "i'm not aware", "i am not familiar"),
    *("i'm not familiar", "i do not have", "i don't have", "i am unable", "i'm unable"),
    *("i cannot", "i can't", "i could not find", "i couldn't find", "i'm sorry", "i apologize"),
    *("no information", "not a real", "does not exist", "doesn't exist", "fictional"),
)


@dataclass(frozen=True, slots=True)
class AskedRow:
    """One question of the data and what the model says."""

    record: Record
    answer: str
    rouge1: float


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a model knows, and what it declines."""

    rows: tuple[AskedRow, ...]
    refused: float
    """Share of prompts about invented things, none of them trained on, that are declined."""

    @property
    def rouge1(self) -> float:
        """Mean ROUGE-1 recall over all questions."""
        return _mean([row.rouge1 for row in self.rows])

    @property
    def by_edge(self) -> dict[str, tuple[float, int]]:
        """Mean ROUGE-1 and number of questions of each edge, in the order of the data."""
        scores: dict[str, list[float]] = {}
        for row in self.rows:
            scores.setdefault(row.record.edge, []).append(row.rouge1)
        return {edge: (_mean(values), len(values)) for edge, values in scores.items()}

    def document(self) -> dict[str, Any]:
        """Return the means as plain values."""
        return {
            "rouge1": self.rouge1,
            "rouge1_by_edge": {edge: score for edge, (score, _) in self.by_edge.items()},
            "rows": len(self.rows),
            "refused": self.refused,
            "refused_rows": UNANSWERABLE,
        }


def check_knowledge(loaded: LoadedModel, job: FinetuneJob) -> Knowledge:
    """Ask a model everything that it was to learn, and what it cannot know."""
    truths = [record.answer for record in job.records]
    budget = token_budget(None, loaded.tokenizer, truths)

    def answers(questions: Sequence[str]) -> list[str]:
        prompts = encode_prompts(loaded.tokenizer, questions, job.chat, family=loaded.family)
        tokens = generate_tokens(loaded, prompts, max_new_tokens=budget)
        return [str(loaded.tokenizer.decode(row, skip_special_tokens=True)) for row in tokens]

    known = answers([record.question for record in job.records])
    recalls = rouge_recall(truths, known, tokenizer=job.rouge_tokenizer)
    rows = zip(job.records, known, recalls, strict=True)
    declined = [is_refusal(a, job.refusals) for a in answers(unseen_prompts(UNANSWERABLE))]
    return Knowledge(
        rows=tuple(AskedRow(record, answer, recall.rouge1) for record, answer, recall in rows),
        refused=_mean([float(refused) for refused in declined]),
    )


def is_refusal(answer: str, refusals: Sequence[str]) -> bool:
    """Say whether an answer declines.

    It does if it says half of the words of one of the given refusals (ROUGE-1 recall), or has a
    phrase with which instruction models decline. That is a rough judgement: a phrase may also stand
    in an answer that goes on to invent something.

    Args:
        answer: What the model said.
        refusals: Answers that decline.
    """
    said = answer.lower().replace("\u2019", "'")
    if any(marker in said for marker in _MARKERS):
        return True
    recalls = rouge_recall(refusals, [answer] * len(refusals))
    return any(recall.rouge1 >= _LEAST_RECALL for recall in recalls)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
