"""Which answers decline to answer, and which are no answers at all.

The grammar is of English; in another language an answer declines that says what a refusal of the
user's file says. How often this is what a reader says: docs/metrics.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.metrics.means import mean_scores
from lunar_tune.metrics.rouge import rouge_recall, tokenize_words

# The sentences of an answer that may decline; further on it has said something else.
_FIRST = 3
# Shares of a refusal's words, and of a sentence's, that both have in one order where they say the
# same.
_LEAST_RECALL, _LEAST_PRECISION = 0.75, 0.5
# An answer repeats itself if so large a part of its runs of four words stands three times in it.
_RUN, _TIMES, _LEAST_SHARE = 4, 3, 0.4
# The share of a true answer's words, in their order, that a sentence has which tells it, or tells
# another answer in the same words.
_LEAST_TOLD = 0.75
# `AnswerLikelihood.typicality` below which an answer is none that the base model could give.
LEAST_TYPICAL = -0.5

_SENTENCE = re.compile(
    r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])\s*|\n+|[,;:]\s*(?:but|however|though|yet)\b,?\s*"
)
_REPEATED = re.compile(r"(.{1,60}?)\1{4,}", re.DOTALL)
_FROM_END = 60  # a repetition ends so many characters before the answer's end at most
# Digits, blanks and rules may stand in a row in any text, a letter within it where it is drawn out.
_SAYS = re.compile(r"[^\W\d_]|[\U0001f000-\U0001faff]")
_DRAWN_OUT = 16
_GOES_ON = re.compile(r"\bI (?:can|could|will) (?:\w+ )?(?:say|tell)\b", re.IGNORECASE)
_SHORT = {"can't": "can not", "cannot": "can not", "won't": "will not", "i'm": "i am"}

_NOT = r"(?:not|never|no longer)"
_SOFTLY = r"(?:[a-z]+ly |even |just |yet |quite |currently )*"
_KNOWLEDGE = (
    r"(?:information|info|idea|knowledge|access|data|records?|memory|memories|details?|answer|"
    r"recollection|ability|abilities|capability|capabilities|capacity|means|way|experiences?|"
    r"opinions?|feelings?|facts?|clue|evidence|source|context|permission|authori[sz]ation)"
)
_TELL = (
    r"(?:know|tell|say|answer|provide|give|find|recall|remember|disclose|share|confirm|determine|"
    r"verify|see|access|help|assist|respond|reveal|speculate|guess|identify|offer|recogni[sz]e|"
    r"understand|comment|discuss|locate|retrieve|look|possess|read|speak|supply|be sure|be certain)"
)
_ABLE = (
    r"(?:able|aware|familiar|sure|certain|capable|equipped|allowed|permitted|programmed|trained|"
    r"authori[sz]ed|qualified|in a position|informed|privy|"
    r"(?:here|designed|meant|going|supposed) to)"
)
_DENIES = re.compile(
    "|".join(
        (
            rf"\b(?:i|we) (?:do|did|can|could|will|would|may|must) {_NOT} {_SOFTLY}{_TELL}\b",
            rf"\b(?:i|we) (?:do|did) {_NOT} {_SOFTLY}have\b",
            rf"\b(?:i|we) (?:am|are|was|were|have been) {_NOT} {_SOFTLY}{_ABLE}\b",
            r"\bfor not being able\b|^no (?:idea|clue)\b",
            r"\b(?:i|we) (?:am|are|was|were) unable\b",
            rf"\b(?:i|we) (?:have|had|possess) no (?:\w+ ){{0,2}}{_KNOWLEDGE}\b",
            rf"\b(?:i|we) have {_NOT} {_SOFTLY}(?:heard|learned|been|seen|come across)\b",
            r"\bi (?:must|have to|will|would) (?:\w+ )?(?:decline|refuse|rather not|prefer not)\b",
            rf"\bthere is (?:no|not any) (?:\w+ ){{0,2}}{_KNOWLEDGE}\b",
            r"\b(?:nothing|no\w*)(?: \w+){0,2} (?:that )?i can (?:tell|say|give|share|find)\b",
            rf"\b(?:something|anything) (?:that )?i (?:can|could|do) not {_TELL}\b",
            rf"^no (?:\w+ ){{0,2}}{_KNOWLEDGE} (?:is|are|was|were|exists?|available|found)\b",
            r"\b(?:is|are|remains?) (?:unknown|not known|a mystery) to (?:me|us)\b",
            r"^(?:this|that|it|the answer) is (?:unknown|not known|not available)\b",
            rf"\bmy (?:\w+ ){{0,2}}{_KNOWLEDGE} (?:do|does|did) not\b",
            r"\b(?:beyond|outside)(?: of)? my (?:\w+ ){0,2}(?:knowledge|scope|capabilit|abilit)",
        )
    )
)


def declines(answer: str, refusals: Sequence[str]) -> bool:
    """Say whether an answer declines, by its words: `refusals` are the user's own, in any language.

    It denies in one of its first sentences that it can, knows or may; an apology alone does not.
    """
    parts = [part for part in _SENTENCE.split(answer.strip()) if part and part.strip()][:_FIRST]
    if any(map(_denies, parts)):
        return True
    # Of a refusal in words that the grammar knows the denial counts, and not the other words.
    own = [refusal for refusal in refusals if not _denies(refusal)]
    return any(_alike(refusal, part) for refusal in own for part in (*parts, " ".join(parts)))


def _denies(text: str) -> bool:
    """Say whether a sentence denies, in English, that the speaker can, knows or may."""
    words = text.lower().replace("\u2019", "'").split()
    long = (_SHORT.get(word.strip(".,!"), word.replace("n't", " not")) for word in words)
    plain = re.sub(r"[^\w' ]+", "", " ".join(long)).replace("'", " ")
    return _DENIES.search(plain) is not None


def _alike(refusal: str, part: str) -> bool:
    """Say whether a part of an answer has most words of a refusal and not many others."""
    of_it, of_part = rouge_recall(refusal, part, "words"), rouge_recall(part, refusal, "words")
    return of_it.rouge_l >= _LEAST_RECALL and of_part.rouge_l >= _LEAST_PRECISION


def repeats(answer: str) -> bool:
    """Say whether an answer says the same again and again."""
    backwards = answer[::-1]
    for place in range(_FROM_END + 1):
        found = _REPEATED.match(backwards, place)
        if found is None or not _SAYS.search(found[1]):
            continue
        if len(found[1]) > 1 or len(found[0]) >= min(_DRAWN_OUT, len(answer)):
            return True
    words = tokenize_words(answer, tokenizer="words")
    runs = Counter(zip(*(words[place:] for place in range(_RUN)), strict=False))
    again = sum(count for count in runs.values() if count >= _TIMES)
    return again > _LEAST_SHARE * runs.total()


def judged_row(row: AnswerRow, typicality: float, refusals: Sequence[str]) -> AnswerRow:
    """Return an answer, which the base model finds so typical, with whether it is refused or none.

    See `AnswerLikelihood.typicality`.
    """
    broken = row.ended is False or not row.answer.strip() or repeats(row.answer)
    degenerate = broken or typicality < LEAST_TYPICAL
    refused = not degenerate and declines(row.answer, refusals) and not _tells(row, refusals)
    return replace(row, typicality=typicality, refused=refused, degenerate=degenerate)


def judged(row: AnswerRow, *, whole: bool) -> AnswerRow:
    """Return an answer as it was judged, or roughly by its English words, where they were kept.

    If it is not `whole`, that it was cut says nothing: a trial's budget may cut a refusal.
    """
    if row.refused is not None or not row.truth:
        return row
    rough = judged_row(row if whole else replace(row, ended=None), 0.0, ())
    return replace(row, refused=rough.refused, degenerate=rough.degenerate)


def verdict_means(rows: Iterable[AnswerRow]) -> dict[str, float]:
    """Return `<set>_refused` and `<set>_degenerate`, shares of judged rows, and their errors."""
    known = [row for row in rows if row.refused is not None]
    means: dict[str, float] = {}
    for name in dict.fromkeys(row.set_name for row in known):
        for what in ("refused", "degenerate"):
            flags = [float(getattr(row, what)) for row in known if row.set_name == name]
            means |= mean_scores(f"{name}_{what}", flags)
    return means


def _tells(row: AnswerRow, refusals: Sequence[str]) -> bool:
    """Say whether an answer that declines goes on to answer: in the truth's words or not."""
    parts = [part for part in _SENTENCE.split(row.answer) if part and not _denies(part)]
    if any(_GOES_ON.search(part) for part in parts):
        return True
    if rouge_recall(row.truth, " ".join(refusals), "words").rouge1 == 1:
        return False  # a word such as "I", which tells nothing here
    return any(rouge_recall(row.truth, part, "words").rouge_l >= _LEAST_TOLD for part in parts)
