"""Questions and answers as a model reads them, each encoded once in a worker's life."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lunar_tune.errors import DataError
from lunar_tune.models.chat import ChatFormat, encode_prompts, end_of_turn
from lunar_tune.training.answer_loss import Pair, encode_answers

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
        self._check_lengths(new, encoded)
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
        self._check_lengths(
            [record.question + record.answer for record in records],
            [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        )
        return tuple(Pair(*pair) for pair in zip(prompts, answers, strict=True))

    def _check_lengths(self, texts: Sequence[str], encoded: Sequence[tuple[int, ...]]) -> None:
        """Refuse what is longer than the model's context; the message shows none of the text."""
        most = getattr(self._loaded.model.config, "max_position_embeddings", None)
        lengths = sorted(((len(ids), len(text)) for ids, text in zip(encoded, texts, strict=True)))
        if most is None or not lengths or lengths[-1][0] <= most:
            return
        tokens, characters = lengths[-1]
        raise DataError(
            f"{sum(length > most for length, _ in lengths)} rows are longer than the context of "
            f"{self._loaded.spec.name}, {most} tokens; the longest has {tokens} in its chat "
            f"template ({characters} characters of text). Shorten or remove them."
        )
