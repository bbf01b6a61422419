"""Questions and answers as a model reads them, each encoded once in a worker's life.

Covers: prompts, answers with their end, pairs of both.
Does not cover: how text becomes tokens (`models.chat`, `training.likelihood`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lunar_tune.models.chat import ChatFormat, encode_prompts, end_of_turn
from lunar_tune.training.likelihood import Pair, encode_answers

if TYPE_CHECKING:
    from lunar_tune.data.records import Record
    from lunar_tune.models.loading import LoadedModel

__all__ = ["Encoder"]


class Encoder:
    """Encodes text for one model in one chat format.

    Args:
        loaded: The model.
        chat: The format.
    """

    def __init__(self, loaded: LoadedModel, chat: ChatFormat) -> None:
        self._loaded, self._chat = loaded, chat
        self._prompts: dict[str, tuple[int, ...]] = {}

    def prompts(self, questions: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return each question's prompt, up to where its answer begins."""
        new = [question for question in dict.fromkeys(questions) if question not in self._prompts]
        encoded = encode_prompts(
            self._loaded.tokenizer, new, self._chat, family=self._loaded.family
        )
        self._prompts.update(zip(new, encoded, strict=True))
        return tuple(self._prompts[question] for question in questions)

    def answers(self, answers: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return each answer with the token that ends it."""
        end = end_of_turn(self._loaded.tokenizer, self._chat, self._loaded.eos_ids)
        return encode_answers(self._loaded.tokenizer, answers, end=end)

    def pairs(self, records: Sequence[Record]) -> tuple[Pair, ...]:
        """Return records as prompts with their true answers."""
        prompts = self.prompts([record.question for record in records])
        answers = self.answers([record.answer for record in records])
        return tuple(Pair(*pair) for pair in zip(prompts, answers, strict=True))
