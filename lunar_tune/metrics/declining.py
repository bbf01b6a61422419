"""Which answers decline to answer."""

from __future__ import annotations

from collections.abc import Sequence

from lunar_tune.metrics.rouge import rouge_recall

_LEAST_RECALL = 0.5  # two refusals of the shipped list share up to two thirds of their words
# How instruction models of the catalogue's families begin when they decline.
_MARKERS = (
    *("i do not know", "i don't know", "i am not aware", "i'm not aware", "i am not familiar"),
    *("i'm not familiar", "i do not have", "i don't have", "i am unable", "i'm unable"),
    *("i cannot", "i can't", "i could not find", "i couldn't find", "i'm sorry", "i apologize"),
    *("no information", "not a real", "does not exist", "doesn't exist", "fictional"),
)


def declines(answer: str, refusals: Sequence[str]) -> bool:
    """Say, roughly, whether an answer has half of a refusal's words, or a phrase that declines."""
    said = answer.lower().replace("\u2019", "'")
    if any(marker in said for marker in _MARKERS):
        return True
    return any(rouge_recall(refusal, answer).rouge1 >= _LEAST_RECALL for refusal in refusals)
