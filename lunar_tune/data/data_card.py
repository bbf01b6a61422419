"""A data card: what a file holds, and whether its edges can be forgotten without others.

describe_records(records, ["A_B"]).forget[0].answers_retained   # 7 of the 12 answers …
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from lunar_tune.data.records import Record, records_digest
from lunar_tune.data.splits import edges_of, normalised, resolve_edges

__all__ = [
    "NEAR",
    "Card",
    "ForgetOverlap",
    "Lengths",
    "Repeated",
    "describe_prompts",
    "describe_records",
]

NEAR = 0.8
"""Share of words in common (Jaccard) from which two questions count as near-duplicates. Lee et al.
(arXiv 2107.06499, section 4.2) call documents duplicates from an edit similarity of 0.8."""

Count = Callable[[str], int]
_WORD = re.compile(r"\w+(?:[-'.]\w+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths of some texts."""

    least: int
    median: float
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """A text that stands in several rows."""

    text: str
    rows: int
    edges: tuple[str, ...]
    answers: int
    """How many different answers, where the text is a question; 1 where it is an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetOverlap:
    """What of one edge to forget also stands in what is to be kept."""

    edge: str
    rows: int
    questions_retained: int
    """Rows whose question is asked there too; a run refuses such a split."""
    questions_near: int
    """Rows whose question shares four fifths of its words with one there, or is the same."""
    answers_retained: int
    """Rows whose whole answer is an answer there too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is worth knowing of a data set before one unlearns on it."""

    kind: str
    digest: str
    """SHA-256 of the records' content, whatever the file format; of the texts, for prompts."""
    rows: int
    edges: Mapping[str, int] = field(default_factory=dict)
    """Rows by edge; empty for prompts."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    words: Mapping[str, Lengths]
    """By field: `question` and `answer`, or `prompt`."""
    tokens: Mapping[str, Lengths]
    """The same in tokens; empty without a tokenizer."""
    repeated_questions: tuple[Repeated, ...]
    shared_answers: tuple[Repeated, ...] = ()
    """Answers of more than one edge, those with most rows first."""
    unscorable: tuple[Record, ...] = ()
    """Rows in whose answer ROUGE finds no word; a run refuses them."""
    forget: tuple[ForgetOverlap, ...] = ()
    findings: tuple[str, ...]
    """What a person should know, in sentences."""


def describe_prompts(prompts: Sequence[str], *, count_tokens: Count | None = None) -> Card:
    """Describe prompts, or any list of texts."""
    records = [Record(question=prompt, answer="", edge="") for prompt in prompts]
    repeated = _repeated(records, "question")
    return Card(
        kind="prompts",
        digest=records_digest(records),
        rows=len(prompts),
        words=_lengths({"prompt": prompts}, _n_words),
        tokens=_lengths({"prompt": prompts}, count_tokens),
        repeated_questions=repeated,
        findings=(f"{len(repeated)} prompts stand there more than once.",) if repeated else (),
    )


def describe_records(
    records: Sequence[Record],
    forget_edges: Sequence[str] = (),
    *,
    groups: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    is_scorable: Callable[[str], bool] = bool,
    count_tokens: Count | None = None,
) -> Card:
    """Describe question-answer pairs.

    Args:
        records: At least one.
        forget_edges: Edges or groups that are to be forgotten together; none leaves `forget` empty.
        groups: Edges by the name of a group.
        is_scorable: Whether ROUGE finds a word in an answer.
        count_tokens: Counts a model's tokens.

    Raises:
        DataError: A forget edge does not exist, or nothing is left to retain.
    """
    edges = edges_of(records)
    chosen = resolve_edges(forget_edges, edges, groups) if forget_edges else ()
    overlaps = _overlaps(records, chosen)
    repeated = _repeated(records, "question")
    unscorable = tuple(record for record in records if not is_scorable(record.answer))
    fields = {"question": [r.question for r in records], "answer": [r.answer for r in records]}
    return Card(
        kind="records",
        digest=records_digest(records),
        rows=len(records),
        edges=edges,
        groups=dict(groups),
        words=_lengths(fields, _n_words),
        tokens=_lengths(fields, count_tokens),
        repeated_questions=repeated,
        shared_answers=tuple(one for one in _repeated(records, "answer") if len(one.edges) > 1),
        unscorable=unscorable,
        forget=overlaps,
        findings=tuple(_findings(edges, repeated, unscorable, overlaps)),
    )


def _n_words(text: str) -> int:
    return len(text.split())


def _lengths(fields: Mapping[str, Sequence[str]], count: Count | None) -> dict[str, Lengths]:
    counts = {name: list(map(count, texts)) for name, texts in fields.items() if count is not None}
    return {
        name: Lengths(least=min(n), median=statistics.median(n), most=max(n))
        for name, n in counts.items()
    }


def _repeated(records: Sequence[Record], column: str) -> tuple[Repeated, ...]:
    """Return the questions or answers that stand in several records, those of most rows first."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[normalised(getattr(record, column))].append(record)
    repeated = [
        Repeated(
            text=getattr(same[0], column),
            rows=len(same),
            edges=tuple(edges_of(same)),
            answers=len({normalised(record.answer) for record in same}),
        )
        for same in found.values()
        if len(same) > 1
    ]
    return tuple(sorted(repeated, key=lambda text: -text.rows))


def _overlaps(records: Sequence[Record], chosen: Sequence[str]) -> tuple[ForgetOverlap, ...]:
    kept = [record for record in records if record.edge not in chosen]
    kept_questions = {normalised(record.question) for record in kept}
    kept_answers = {normalised(record.answer) for record in kept}
    kept_words = set(map(_word_set, kept_questions))
    overlaps = []
    for edge in chosen:
        rows = [record for record in records if record.edge == edge]
        questions = [normalised(record.question) for record in rows]
        overlaps.append(
            ForgetOverlap(
                edge=edge,
                rows=len(rows),
                questions_retained=sum(question in kept_questions for question in questions),
                questions_near=sum(_is_near(_word_set(q), kept_words) for q in questions),
                answers_retained=sum(normalised(row.answer) in kept_answers for row in rows),
            )
        )
    return tuple(overlaps)


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


def _findings(
    edges: Mapping[str, int],
    repeated: Sequence[Repeated],
    unscorable: Sequence[Record],
    overlaps: Sequence[ForgetOverlap],
) -> Iterable[str]:
    if len(edges) == 1:
        yield (
            "There is one edge only: forgetting it leaves nothing to keep. Give another retain set "
            "(--retain-data), or divide the rows into edges."
        )
    if unscorable:
        yield (
            f"{len(unscorable)} answers have no word that ROUGE counts. A run refuses them unless "
            "--rouge-tokenizer words finds words in them."
        )
    both = sum(overlap.questions_retained for overlap in overlaps)
    if both:
        yield (
            f"{both} questions to forget are also asked in what is to be kept. A run refuses such "
            "a split: nothing can be both. Forget those edges together, or remove the rows."
        )
    different = [question for question in repeated if question.answers > 1]
    if different:
        yield (
            f"{len(different)} questions have several answers. A model can give only one, so the "
            "others can never be scored as known."
        )
    for overlap in overlaps:
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
