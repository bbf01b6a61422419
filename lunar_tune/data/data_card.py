"""A data card: what a file holds, and whether its edges can be forgotten without others.

describe_records(records, ["A_B"]).forget.answers_retained[0]  # 7 of the 12 answers …
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from lunar_tune.data.records import Record, records_digest
from lunar_tune.data.splits import edges_of, resolve_edges
from lunar_tune.data.texts import normalised

if TYPE_CHECKING:
    import pandas as pd

NEAR = 0.8
"""Share of words in common (Jaccard) from which two questions count as near-duplicates. Lee et al.
(arXiv 2107.06499, section 4.2) call documents duplicates from an edit similarity of 0.8."""

Count = Callable[[str], int]
_WORD = re.compile(r"\w+(?:[-'.]\w+)*")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is worth knowing of a data set before one unlearns on it."""

    kind: str
    digest: str  # SHA-256 of the records' content, whatever the file format
    rows: int
    edges: Mapping[str, int]  # rows by edge; empty for prompts
    groups: Mapping[str, tuple[str, ...]]
    words: pd.DataFrame
    """`least`, `median` and `most` words of a `question` and an `answer`, or of a `prompt`."""
    tokens: pd.DataFrame  # the same in tokens; empty without a tokenizer
    repeated_questions: pd.DataFrame
    """`text`, `rows`, `edges` and number of different `answers`; those with most rows first."""
    shared_answers: pd.DataFrame  # the same of answers that stand in more than one edge
    unscorable: tuple[Record, ...]  # rows of which ROUGE sees too little; a run refuses them
    unseen: tuple[str, ...]  # what ROUGE cannot see of the answers, in sentences
    notes: tuple[str, ...] = ()  # how the file was read, where that is not plain from it
    prompts: Mapping[str, str] = field(default_factory=dict)  # of first questions, to show
    forget: pd.DataFrame
    """Each `edge` to forget with its `rows`, and how many of them stand in what is to be kept too:
    `questions_retained` that are asked there, which a run refuses; `questions_near` that share four
    fifths of their words with one there, or are the same; `answers_retained`, word for word."""

    @property
    def findings(self) -> tuple[str, ...]:
        """What a person should know, in sentences."""
        if self.kind == "prompts":
            repeated = len(self.repeated_questions)
            return (f"Prompts that occur more than once: {repeated}.",) if repeated else ()
        return tuple(_findings(self))

    def document(self) -> dict[str, object]:
        """Return the card as plain values."""
        return vars(self) | {
            "words": self.words.to_dict("index"),
            "tokens": self.tokens.to_dict("index"),
            "repeated_questions": self.repeated_questions.to_dict("records"),
            "shared_answers": self.shared_answers.to_dict("records"),
            "unscorable": [asdict(record) for record in self.unscorable],
            "forget": self.forget.to_dict("records"),
            "findings": self.findings,
        }


def describe_prompts(prompts: Sequence[str], *, count_tokens: Count | None = None) -> Card:
    """Describe prompts, or any list of texts."""
    records = [Record(question=prompt, answer="", edge="") for prompt in prompts]
    card = describe_records(records, count_tokens=count_tokens)
    return replace(
        card,
        kind="prompts",
        edges={},
        words=card.words.head(1).rename({"question": "prompt"}),
        tokens=card.tokens.head(1).rename({"question": "prompt"}),
    )


def describe_records(
    records: Sequence[Record],
    forget_edges: Sequence[str] = (),
    *,
    groups: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    is_scorable: Callable[[str], bool] = lambda _answer: True,
    unseen: Sequence[str] = (),
    count_tokens: Count | None = None,
) -> Card:
    """Describe question-answer pairs, some of whose edges or groups are to be forgotten together.

    `is_scorable` says whether ROUGE sees enough of an answer, `unseen` what it does not see. Forget
    edges as in `resolve_edges`.
    """
    import pandas as pd

    edges = edges_of(records)
    chosen = resolve_edges(forget_edges, edges, groups) if forget_edges else ()
    frame = pd.DataFrame(map(asdict, records))
    frame["asked"] = frame.question.map(normalised)
    frame["answered"] = frame.answer.map(normalised)
    same_answers = _repeated(frame, "answer", "answered")
    return Card(
        kind="records",
        digest=records_digest(records),
        rows=len(records),
        edges=edges,
        groups=dict(groups),
        words=_lengths(frame, lambda text: len(text.split())),
        tokens=_lengths(frame, count_tokens) if count_tokens else pd.DataFrame(),
        repeated_questions=_repeated(frame, "question", "asked"),
        shared_answers=same_answers[same_answers.edges.map(len) > 1],
        unscorable=tuple(record for record in records if not is_scorable(record.answer)),
        unseen=tuple(unseen),
        forget=_overlaps(frame, chosen),
    )


def _lengths(frame: pd.DataFrame, count: Count) -> pd.DataFrame:
    table = frame[["question", "answer"]].map(count).agg(["min", "median", "max"]).T
    return table.set_axis(["least", "median", "most"], axis=1).astype({"least": int, "most": int})


def _repeated(frame: pd.DataFrame, column: str, normal: str) -> pd.DataFrame:
    """Return the questions or answers that stand in several rows."""
    table = frame.groupby(normal, sort=False).agg(
        text=(column, "first"),
        rows=(column, "size"),
        edges=("edge", lambda edges: tuple(edges.unique())),
        answers=("answered", "nunique"),
    )
    return table[table.rows > 1].sort_values("rows", ascending=False, kind="stable")


def _overlaps(frame: pd.DataFrame, chosen: Sequence[str]) -> pd.DataFrame:
    is_forgotten = frame.edge.isin(chosen)
    forget, kept = frame[is_forgotten], frame[~is_forgotten]
    kept_words = set(kept.asked.map(_word_set))
    counted = forget.assign(
        rows=1,
        questions_retained=forget.asked.isin(kept.asked),
        questions_near=[_is_near(_word_set(question), kept_words) for question in forget.asked],
        answers_retained=forget.answered.isin(kept.answered),
    )
    columns = ["rows", "questions_retained", "questions_near", "answers_retained"]
    return counted.groupby("edge")[columns].sum().reindex(chosen).reset_index()


def _word_set(question: str) -> frozenset[str]:
    """Return a question's words without signs, apart from those inside a word."""
    return frozenset(_WORD.findall(question))


def _is_near(words: frozenset[str], others: Iterable[frozenset[str]]) -> bool:
    # Sets of very different sizes cannot share enough; that spares most comparisons.
    least, most = NEAR * len(words), len(words) / NEAR
    return any(
        least <= len(other) <= most and len(words & other) >= NEAR * len(words | other)
        for other in others
    )


def _findings(card: Card) -> Iterable[str]:
    if len(card.edges) == 1:
        yield (
            "There is one edge only: forgetting it leaves nothing to keep. Give another retain set "
            "(--retain-data), or divide the rows into edges."
        )
    yield from card.unseen
    if both := card.forget.questions_retained.sum():
        yield (
            f"{both} questions to forget are also asked in what is to be kept. A run refuses such "
            "a split: nothing can be both. Forget those edges together, or remove the rows."
        )
    if different := (card.repeated_questions.answers > 1).sum():
        yield (
            f"{different} questions have several answers. A model can give only one, so the "
            "others can never be scored as known."
        )
    for overlap in card.forget.itertuples():
        edge, rows = overlap.edge, overlap.rows
        if 2 * overlap.answers_retained > rows:
            yield (
                f"{edge}: {overlap.answers_retained} of {rows} answers are answers of kept rows "
                "too, word for word. A guess among the kept answers can hit them, so forget "
                "ROUGE-1 may stay above 0 however well the edge is forgotten."
            )
        near = overlap.questions_near - overlap.questions_retained
        if 2 * near > rows:
            yield (
                f"{edge}: {near} of {rows} questions differ from a kept one in few words. What "
                "changes the one is likely to change the other; watch the retain score."
            )
