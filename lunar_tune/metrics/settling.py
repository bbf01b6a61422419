"""Where an answer only repeats itself and its ROUGE recall would change no more.

Recall is that of the answer that goes on repeating itself to the end of its token budget. A model
that would have left the repetition before that is the one thing that is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from lunar_tune.engine.repetition import first_repetition, period_of
from lunar_tune.metrics.rouge import rouge_recall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A repetition has at most so many tokens, and so many in a row must repeat: see docs/benchmarks.md.
LONGEST_PERIOD: Final = 32
LEAST_REPEATED: Final = 64


class Settling:
    """Says where the answers of an evaluation are settled, by row and tokens alone.

    `truths` are the true answers by row; `budget` is the most tokens of an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        truths: Mapping[int, Sequence[str]],
        *,
        rouge_tokenizer: str,
        budget: int,
    ) -> None:
        self._tokenizer, self._truths = tokenizer, truths
        self._rouge_tokenizer, self._budget = rouge_tokenizer, budget
        self._settled = lru_cache(maxsize=None)(self._settled_of)

    def done(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[bool]:
        """Say of each row whether its tokens so far are settled."""
        return [
            period_of(said, longest=LONGEST_PERIOD, least=LEAST_REPEATED) > 0
            and self.length(row, said) is not None
            for row, said in zip(rows, tokens, strict=True)
        ]

    def cut(self, answers: Mapping[int, list[int]]) -> dict[int, list[int]]:
        """Return those answers that were settled, without what they said after that."""
        lengths = {row: self.length(row, said) for row, said in answers.items()}
        return {row: answers[row][:length] for row, length in lengths.items() if length is not None}

    def length(self, row: int, said: Sequence[int]) -> int | None:
        """Return after how many tokens an answer was settled; None where it was not.

        More tokens of an answer change nothing of where it was settled.
        """
        found = first_repetition(said, longest=LONGEST_PERIOD, least=LEAST_REPEATED)
        if found is None:
            return None
        length, period = found
        settled, whole = self._settled(row, tuple(said[:length]), period)
        is_there = len(said) >= settled and tuple(said[:settled]) == whole[:settled]
        return settled if is_there and settled < self._budget else None

    def _settled_of(
        self, row: int, said: tuple[int, ...], period: int
    ) -> tuple[int, tuple[int, ...]]:
        """Return where the answer that goes on in its repetition is settled, and that answer."""
        left = self._budget - len(said)
        whole = said + (said[-period:] * (left // period + 1))[:left]
        final = self._recalls(row, whole)
        lengths = range(len(said), len(whole))
        return next(
            (n for n in lengths if self._recalls(row, whole[:n]) == final), len(whole)
        ), whole

    def _recalls(self, row: int, said: Sequence[int]) -> list[object]:
        text = self._tokenizer.decode(list(said), skip_special_tokens=True)
        return [rouge_recall(truth, text, self._rouge_tokenizer) for truth in self._truths[row]]
