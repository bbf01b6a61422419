"""Scores of a model on the forget, retain and factual sets."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from lunar_tune.display import Concise
from lunar_tune.metrics.means import mean_scores
from lunar_tune.metrics.rouge import Recall, RecallStop, rouge_recall
from lunar_tune.metrics.settling import Settling

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from lunar_tune.data.records import Record
    from lunar_tune.engine.answering import Answerer, AnsweringRun
    from lunar_tune.engine.decoding import PlainAnswerer

ROUNDING = 1e-9  # by which a sum of recalls and the floor may differ by rounding alone
LEAST_CHUNK = 16  # retain rows in a chunk at least: fewer cost as much
JUDGED = ("forget", "retain")  # the sets that decide whether a trial is feasible and good


Stop = Callable[[Sequence[int], Sequence[Sequence[int]]], list[bool]]  # see `AnswerRules`


class Question(NamedTuple):
    """One question of a set, encoded."""

    record: Record
    row: int  # the answerer's row of its prompt
    number: int | None = None  # see `AnswerRow.row`


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AnswerRow(Concise):
    """One question, its true answer, and what the model says."""

    set_name: str
    edge: str
    question: str
    truth: str
    answer: str
    rouge1: float
    rouge_l: float
    row: int | None = None  # number of the question in its set, in all evaluations, if known
    ended: bool | None = None
    """Whether the model ended the answer, not the token budget nor its repeating itself; None where
    that is not known, as of an answer that may have been left once it had said the truth."""
    typicality: float | None = None  # `AnswerLikelihood.typicality` to the base model, if known
    refused: bool | None = None
    degenerate: bool | None = None
    """What `metrics.declining` makes of the answer; None where nobody asked."""


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation(Concise):
    """Answers and their means."""

    rows: tuple[AnswerRow, ...]
    scores: Mapping[str, float]  # see `row_means`; of what was asked alone
    complete: bool = True
    """Whether every question was asked. Where not, the retain floor is missed for certain, and the
    retain scores are means over the rows that were asked."""
    tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # by the answerer's row
    repeating: Mapping[str, int] = field(default_factory=dict)
    """Answers that were ended since they only repeated themselves, by set; see `Evaluator`."""
    whole_cost: float = 1.0
    """How many times as many tokens all answers had if those went on to the token budget."""


def deviation_score(forget_rouge1: float, retain_rouge1: float) -> float:
    """Return 100·sqrt(forget² + (1 − retain)²), in percent; lower is better (LUNAR, 4.1)."""
    return 100.0 * math.hypot(forget_rouge1, 1.0 - retain_rouge1)


class Evaluator:
    """Asks the questions of a study, evaluation after evaluation.

    In the sets of `early_exit` an answer may end when it has said every word of the truth. With
    `settle`, which takes their place, an answer ends where it only repeats itself and its ROUGE
    would change no more (`metrics.settling`). The order in which retain rows are asked follows
    `seed`.
    """

    def __init__(
        self,
        answers: Answerer | PlainAnswerer,
        tokenizer: PreTrainedTokenizerBase,
        sets: Mapping[str, Sequence[Question]],
        *,
        rouge_tokenizer: str = "default",
        early_exit: Collection[str] = (),
        settle: bool = False,
        seed: int = 0,
    ) -> None:
        self._answers, self._tokenizer, self._sets = answers, tokenizer, dict(sets)
        self._rouge_tokenizer, self._seed, self._early = rouge_tokenizer, seed, early_exit
        self._stop, self._settle = None, settle
        self._truths: defaultdict[int, list[str]] = defaultdict(list)
        for one in chain.from_iterable(sets.values()):
            self._truths[one.row].append(one.record.answer)
        # Where a set asks the same whose answers go on, this one's goes on.
        whole = {one.row for name in sets if name not in early_exit for one in sets[name]}
        truths = {row: texts for row, texts in self._truths.items() if row not in whole}
        if truths:
            self._stop = RecallStop(tokenizer, truths, rouge_tokenizer=rouge_tokenizer).done

    def evaluate(
        self,
        *,
        edited_layer: int | None,
        max_new_tokens: int,
        longer: Mapping[str, int] | None = None,
        floor: float | None = None,
    ) -> Evaluation:
        """Ask, greedily, and score the answers; see `AnswerRules`.

        `longer` are the token budgets of sets whose answers have more than `max_new_tokens`.
        `floor` is the least retain ROUGE-1: once no answer to the retain rows that are left could
        lift the mean to it, nothing more is asked. None asks everything.
        """
        from lunar_tune.engine.decoding import AnswerRules  # loads torch

        self._budgets = dict.fromkeys(self._sets, max_new_tokens) | dict(longer or {})
        limits: dict[int, int] = {}
        for name, some in self._sets.items():
            limits |= {one.row: max(limits.get(one.row, 0), self._budgets[name]) for one in some}
        most = max(limits.values(), default=max_new_tokens)
        settling = Settling(
            self._tokenizer, self._truths, rouge_tokenizer=self._rouge_tokenizer, budget=most
        )
        stop = settling.done if self._settle else self._stop
        if not {*limits.values()} <= {most}:
            stop = partial(_is_done, limits, stop)
        run = self._answers.begin(
            AnswerRules(edited_layer=edited_layer, max_new_tokens=most, stop=stop)
        )
        asked, complete = self._sets, True
        if floor is not None and asked.get("retain"):
            retain, complete = self._in_chunks(run, floor)
            if not complete:
                judged = {name: self._sets[name] for name in self._sets if name in JUDGED}
                asked = judged | {"retain": retain}
        else:
            run.open(_new(chain.from_iterable(asked.values()), ()))
        said = dict(run.close())
        settled = settling.cut(said) if self._settle else {}
        said |= settled
        left = sum(most - len(own) for own in settled.values())
        questions = [(name, one) for name, some in asked.items() for one in some]
        tokens = [said[one.row][: self._budgets[name]] for name, one in questions]
        answers = self._scored(
            [(one, own) for (_, one), own in zip(questions, tokens, strict=True)]
        )
        rows = tuple(
            AnswerRow(
                set_name=name,
                edge=one.record.edge,
                question=one.record.question,
                truth=one.record.answer,
                answer=text,
                rouge1=recall.rouge1,
                rouge_l=recall.rouge_l,
                row=one.number,
                ended=len(own) < self._budgets[name] and one.row not in settled
                if name not in self._early or recall.rouge_l < 1
                else None,
            )
            for (name, one), own, (text, recall) in zip(questions, tokens, answers, strict=True)
        )
        return Evaluation(
            rows=rows,
            scores=row_means(rows, tuple(asked)),
            complete=complete,
            tokens={row: tuple(answer[: limits[row]]) for row, answer in said.items()},
            repeating=Counter(name for name, one in questions if one.row in settled),
            whole_cost=1 + left / max(1, sum(map(len, said.values()))),
        )

    def _in_chunks(
        self, run: AnsweringRun | PlainAnswerer, floor: float
    ) -> tuple[list[Question], bool]:
        """Ask the forget set, then retain rows until the floor is missed for certain.

        As soon as what is known holds the floor, of a chunk after its first round or of all chunks
        that were decoded to their end, all that is left is asked at once.
        Return the retain rows that were asked, and whether everything was.
        """
        retain = self._sets["retain"]
        total = len(retain)
        allowed = total * (1 - floor)  # recall that may be missing in the whole set
        size = max(LEAST_CHUNK, math.ceil(2 * allowed))
        order = list(range(total))
        random.Random(self._seed).shuffle(order)  # noqa: S311 an order, not a secret
        known: dict[int, list[int]] = {}
        begun: list[int] = []
        for end in range(size, total + size, size):
            chunk = [retain[i] for i in order[end - size : end]]
            rows = _new([*self._sets.get("forget", ()), *chunk], begun)
            known |= run.open(rows)
            begun += rows
            if self._missing(chunk, known) <= len(chunk) * (1 - floor):
                break
            known |= run.close()
            asked = [retain[i] for i in sorted(order[:end])]
            missing = self._missing(asked, known)
            if missing > allowed + ROUNDING * total:
                return asked, False
            if missing <= len(asked) * (1 - floor):
                break
        run.open(_new(chain.from_iterable(self._sets.values()), begun))
        return list(retain), True

    def _missing(self, asked: Sequence[Question], tokens: Mapping[int, Sequence[int]]) -> float:
        """Return the recall that some rows lack of 1; all of it where there is no answer."""
        budget = self._budgets["retain"]
        scored = self._scored(
            [(one, tokens[one.row][:budget]) for one in asked if one.row in tokens]
        )
        return len(asked) - math.fsum(recall.rouge1 for _, recall in scored)

    def _scored(
        self, answers: Sequence[tuple[Question, Sequence[int]]]
    ) -> list[tuple[str, Recall]]:
        """Return the text of each answer, and its recall of the true one."""
        if not answers:  # `batch_decode` of nothing is one empty text
            return []
        texts: list[str] = self._tokenizer.batch_decode(
            [list(tokens) for _, tokens in answers], skip_special_tokens=True
        )
        return [
            (text, rouge_recall(one.record.answer, text, self._rouge_tokenizer))
            for text, (one, _) in zip(texts, answers, strict=True)
        ]


def _is_done(
    limits: Mapping[int, int],
    stop: Stop | None,
    rows: Sequence[int],
    tokens: Sequence[Sequence[int]],
) -> list[bool]:
    """Say of each row whether it need not go on, for what or for how much it has said."""
    done = [False] * len(rows) if stop is None else stop(rows, tokens)
    said = zip(rows, tokens, done, strict=True)
    return [early or len(own) >= limits[row] for row, own, early in said]


def _new(questions: Iterable[Question], begun: Collection[int]) -> list[int]:
    """Return the questions' rows that are not begun yet, each once."""
    return [row for row in dict.fromkeys(one.row for one in questions) if row not in begun]


def row_means(rows: Sequence[AnswerRow], names: Sequence[str]) -> dict[str, float]:
    """Return `<set>_rouge1`, `<set>_rougeL`, `<set>_rows` of each set, and `deviation_score`.

    Beside the means are their standard errors, `<set>_rouge1_se`, `<set>_rougeL_se`.
    """
    scores: dict[str, float] = {}
    for name in names:
        mine = [row for row in rows if row.set_name == name]
        scores |= mean_scores(f"{name}_rouge1", [row.rouge1 for row in mine])
        scores |= mean_scores(f"{name}_rougeL", [row.rouge_l for row in mine])
        scores[f"{name}_rows"] = len(mine)
    if "forget_rouge1" in scores and "retain_rouge1" in scores:
        scores["deviation_score"] = deviation_score(
            scores["forget_rouge1"], scores["retain_rouge1"]
        )
    return scores


def paired(
    rows: Sequence[AnswerRow], others: Sequence[AnswerRow]
) -> list[tuple[AnswerRow, AnswerRow | None]]:
    """Return each row with the other answer to its question, in the order of the rows."""
    # Without texts, questions can only be told apart where they have numbers.
    numbered = all(row.row is not None for row in (*rows, *others))

    def key(row: AnswerRow) -> tuple[Hashable, ...]:
        if numbered:
            return row.set_name, row.edge, row.row
        return row.set_name, row.edge, row.question, row.truth

    waiting: defaultdict[tuple[Hashable, ...], deque[AnswerRow]] = defaultdict(deque)
    for other in others:
        waiting[key(other)].append(other)
    return [(row, found.popleft() if (found := waiting[key(row)]) else None) for row in rows]


def answers_beside(before: Sequence[AnswerRow], after: Sequence[AnswerRow]) -> pd.DataFrame:
    """Return a trial's answers, each beside the base model's to the same question.

    Texts that were not kept are empty; what the base model was not asked is missing.
    """
    import pandas as pd

    others = [other for _, other in paired(after, before)]
    columns = {
        "set": [row.set_name for row in after],
        "edge": [row.edge for row in after],
        "row": [row.row for row in after],
        "question": [row.question for row in after],
        "true_answer": [row.truth for row in after],
        "base_model": [other.answer if other is not None else None for other in others],
        "unlearned": [row.answer for row in after],
        "rouge1_before": [other.rouge1 if other is not None else math.nan for other in others],
        "rouge1": [row.rouge1 for row in after],
        "rouge_l": [row.rouge_l for row in after],
        "ended": [row.ended for row in after],
        "refused": [row.refused for row in after],
        "degenerate": [row.degenerate for row in after],
    }
    return pd.DataFrame(columns).astype({"row": "Int64"})
