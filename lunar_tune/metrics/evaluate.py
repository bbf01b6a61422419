"""Scores of a model on the forget, retain and factual sets."""

from __future__ import annotations

import math
import random
from collections import defaultdict, deque
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lunar_tune.engine.answer_rules import AnswerRules
from lunar_tune.metrics.rouge import Recall, RecallStop, rouge_recall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lunar_tune.data.records import Record

__all__ = [
    "JUDGED",
    "AnswerRow",
    "AnswerSource",
    "Evaluation",
    "EvaluationSet",
    "Evaluator",
    "deviation_score",
    "paired",
    "row_means",
]

# Below this, a sum of recalls and the floor may differ by rounding alone.
ROUNDING = 1e-9
# Retain rows in a chunk at least: fewer cost as much.
LEAST_CHUNK = 16
# The sets that decide whether a trial is feasible and good.
JUDGED = ("forget", "retain")


@runtime_checkable
class AnswerRun(Protocol):
    """Answers of one evaluation, in two steps: the first may show that the second is not needed."""

    def open(self, rows: Sequence[int]) -> Mapping[int, list[int]]:
        """Begin to answer some rows; return the answers that are known already."""

    def close(self) -> Mapping[int, list[int]]:
        """Return the tokens of the answers to all rows that were begun."""


@runtime_checkable
class AnswerSource(Protocol):
    """Who answers."""

    def prepare(self) -> None:
        """Compute what is kept of the base model."""

    def begin(self, rules: AnswerRules) -> AnswerRun:
        """Begin an evaluation of the model as it is now."""


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Questions with true answers, encoded once."""

    name: str
    """forget, retain or factual."""
    records: tuple[Record, ...]
    rows: tuple[int, ...]
    """The answerer's row of each record's prompt."""


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
    row: int | None = None
    """Number of the question in its set, the same in every evaluation of a study; None where that
    is not known."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Answers and their means."""

    rows: tuple[AnswerRow, ...]
    scores: Mapping[str, float]
    """`<set>_rouge1`, `<set>_rougeL`, `<set>_rows` for each set, and `deviation_score`; only of
    what was asked."""
    complete: bool = True
    """Whether every question was asked. Where not, the retain floor is missed for certain, and the
    retain scores are means over the rows that were asked."""
    tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Tokens of the answers by the answerer's row."""


def deviation_score(forget_rouge1: float, retain_rouge1: float) -> float:
    """Return 100·sqrt(forget² + (1 − retain)²), in percent; lower is better (LUNAR, 4.1)."""
    return 100.0 * math.hypot(forget_rouge1, 1.0 - retain_rouge1)


class Evaluator:
    """Asks the questions of a study, evaluation after evaluation.

    Args:
        answers: Who answers.
        tokenizer: Of the model.
        sets: Questions; forget, retain and factual.
        rouge_tokenizer: Which words ROUGE counts.
        early_exit: Whether an answer may end when it has said every word of the truth.
        seed: Of the order in which retain rows are asked.
    """

    def __init__(
        self,
        answers: AnswerSource,
        tokenizer: PreTrainedTokenizerBase,
        sets: Sequence[EvaluationSet],
        *,
        rouge_tokenizer: str = "default",
        early_exit: bool = False,
        seed: int = 0,
    ) -> None:
        self._answers, self._tokenizer, self._sets = answers, tokenizer, tuple(sets)
        self._rouge_tokenizer, self._early_exit, self._seed = rouge_tokenizer, early_exit, seed

    def evaluate(
        self, *, edited_layer: int | None, max_new_tokens: int, floor: float | None = None
    ) -> Evaluation:
        """Ask, greedily, and score the answers.

        Args:
            edited_layer: See `AnswerRules`.
            max_new_tokens: Token budget of an answer.
            floor: Least retain ROUGE-1. Once no answer to the retain rows that are left could lift
                the mean to it, nothing more is asked. None asks everything.
        """
        rules = AnswerRules(
            edited_layer=edited_layer,
            max_new_tokens=max_new_tokens,
            stop=self._stop.done if self._early_exit else None,
        )
        run = self._answers.begin(rules)
        asked = [list(range(len(one.records))) for one in self._sets]
        complete = True
        if floor is None or not self._retain.records:
            run.open(_new([row for one in self._sets for row in one.rows], ()))
        else:
            seen, complete = self._in_chunks(run, floor)
            asked = [
                seen if one.name == "retain" else places
                for one, places in zip(self._sets, asked, strict=True)
            ]
        tokens = run.close()
        scored = self._score(tokens, asked, complete=complete)
        names = [one.name for one in self._sets if complete or one.name in JUDGED]
        return Evaluation(
            rows=scored,
            scores=row_means(scored, names),
            complete=complete,
            tokens={row: tuple(answer) for row, answer in tokens.items()},
        )

    def _in_chunks(self, run: AnswerRun, floor: float) -> tuple[list[int], bool]:
        """Ask the forget set, then retain rows until the floor is missed for certain.

        If what is known of a chunk after the first round holds the floor already, all that is left
        is asked at once; if not, the chunk is decoded to its end before the next one is begun.

        Returns:
            The places of the retain rows that were asked, in their order, and whether everything
            else was asked too.
        """
        retain, total = self._retain, len(self._retain.records)
        allowed = total * (1 - floor)  # recall that may be missing in the whole set
        seen: list[int] = []
        known: dict[int, list[int]] = {}
        begun: list[int] = []
        first = [row for one in self._sets if one.name == "forget" for row in one.rows]
        for chunk in self._chunks(max(LEAST_CHUNK, math.ceil(2 * allowed))):
            rows = _new([*first, *(retain.rows[i] for i in chunk)], begun)
            known |= run.open(rows)
            begun += rows
            seen += chunk
            if self._missing(chunk, known) <= len(chunk) * (1 - floor):
                break
            known |= run.close()
            if self._missing(seen, known) > allowed + ROUNDING * total:
                return sorted(seen), False
        rest = [row for one in self._sets if one.name != "forget" for row in one.rows]
        run.open(_new(rest, begun))
        return list(range(total)), True

    def _chunks(self, size: int) -> Iterator[list[int]]:
        """Yield places of retain rows in a fixed shuffled order."""
        order = list(range(len(self._retain.records)))
        random.Random(self._seed).shuffle(order)  # noqa: S311 an order, not a secret
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _missing(self, places: Sequence[int], tokens: Mapping[int, Sequence[int]]) -> float:
        """Return the recall that some retain rows lack of 1; all of it where there is no answer."""
        known = [i for i in places if self._retain.rows[i] in tokens]
        recalls = self._recalls(
            [self._retain.records[i] for i in known],
            [tokens[self._retain.rows[i]] for i in known],
        )
        return len(places) - math.fsum(recall.rouge1 for recall in recalls)

    def _recalls(self, records: Sequence[Record], tokens: Sequence[Sequence[int]]) -> list[Recall]:
        truths = [record.answer for record in records]
        return rouge_recall(truths, self._texts(tokens), tokenizer=self._rouge_tokenizer)

    def _texts(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        if not tokens:  # `batch_decode` of nothing is one empty text
            return []
        texts: list[str] = self._tokenizer.batch_decode(
            [list(row) for row in tokens], skip_special_tokens=True
        )
        return texts

    def _score(
        self,
        tokens: Mapping[int, Sequence[int]],
        asked: Sequence[Sequence[int]],
        *,
        complete: bool,
    ) -> tuple[AnswerRow, ...]:
        """Return a row for each question that was asked, in the order of the sets."""
        questions = [
            (one.name, one.records[i], one.rows[i])
            for one, places in zip(self._sets, asked, strict=True)
            if complete or one.name in JUDGED
            for i in places
        ]
        texts = self._texts([tokens[row] for _, _, row in questions])
        recalls = rouge_recall(
            [record.answer for _, record, _ in questions], texts, tokenizer=self._rouge_tokenizer
        )
        return tuple(
            AnswerRow(
                set_name=name,
                edge=record.edge,
                question=record.question,
                truth=record.answer,
                answer=text,
                rouge1=recall.rouge1,
                rouge_l=recall.rouge_l,
            )
            for (name, record, _), text, recall in zip(questions, texts, recalls, strict=True)
        )

    @cached_property
    def _retain(self) -> EvaluationSet:
        return next(
            (one for one in self._sets if one.name == "retain"), EvaluationSet("retain", (), ())
        )

    @cached_property
    def _stop(self) -> RecallStop:
        truths: dict[int, list[str]] = {}
        for one in self._sets:
            for record, row in zip(one.records, one.rows, strict=True):
                truths.setdefault(row, []).append(record.answer)
        return RecallStop(self._tokenizer, truths, rouge_tokenizer=self._rouge_tokenizer)


def _new(rows: Sequence[int], begun: Collection[int]) -> list[int]:
    """Return the rows that are not begun yet, each once."""
    return [row for row in dict.fromkeys(rows) if row not in begun]


def row_means(rows: Sequence[AnswerRow], names: Sequence[str]) -> dict[str, float]:
    """Return `Evaluation.scores` of some rows.

    Args:
        rows: Answers.
        names: Of the sets that count.
    """
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


def paired(
    rows: Sequence[AnswerRow], others: Sequence[AnswerRow]
) -> list[tuple[AnswerRow, AnswerRow | None]]:
    """Return each row with the other answer to its question, in the order of the rows.

    Args:
        rows: Answers, with or without texts.
        others: Answers to these questions and to more or fewer; without texts they can only be told
            apart where they have numbers.
    """
    numbered = all(row.row is not None for row in (*rows, *others))

    def key(row: AnswerRow) -> tuple[Hashable, ...]:
        if numbered:
            return row.set_name, row.edge, row.row
        return row.set_name, row.edge, row.question, row.truth

    waiting: defaultdict[tuple[Hashable, ...], deque[AnswerRow]] = defaultdict(deque)
    for other in others:
        waiting[key(other)].append(other)
    return [(row, found.popleft() if (found := waiting[key(row)]) else None) for row in rows]
