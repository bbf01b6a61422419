"""Questions and answers as tokens, and how likely a model finds an answer, with gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lunar_tune.data.records import Record
from lunar_tune.errors import DataError
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.chat_encoder import ChatEncoder
from lunar_tune.models.layout import context_of
from lunar_tune.models.loading import LoadedModel

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_REFERENCE_BATCH = 16


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and an answer as token ids."""

    prompt: tuple[int, ...]  # up to where the answer begins
    answer: tuple[int, ...]  # with the token that ends it

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class AnswerStates:
    """What a model says of a batch's answers: where each token is chosen, pair after pair.

    What is not asked for is not computed.
    """

    hidden: Float[Tensor, "tokens d_model"]  # the last block's output after the final norm
    targets: Int[Tensor, " tokens"]  # the answers' tokens
    rows: Int[Tensor, " tokens"]  # which pair of the batch each belongs to
    head: nn.Module

    @cached_property
    def logits(self) -> Float[Tensor, "tokens vocabulary"]:
        """Logits of all tokens that could be chosen there."""
        logits: Tensor = self.head(self.hidden)
        return logits

    @cached_property
    def tokens(self) -> Float[Tensor, " tokens"]:
        """Log π of each token of the answers."""
        return token_log_probs(self.logits, self.targets)

    @property
    def answers(self) -> Float[Tensor, " answers"]:
        """Log π of each answer."""
        zeros = self.tokens.new_zeros(int(self.rows[-1]) + 1)
        return zeros.index_add(0, self.rows, self.tokens)

    @property
    def lengths(self) -> Float[Tensor, " answers"]:
        """Tokens of each answer."""
        return self.rows.bincount().float()


class Encoder:
    """Questions and answers as a model reads them in one chat format, each encoded once."""

    def __init__(self, loaded: LoadedModel, chat: ChatFormat) -> None:
        self.loaded, tokenizer = loaded, loaded.tokenizer
        self._encoder = ChatEncoder(tokenizer, chat, family=loaded.model.config.model_type)
        ends = (self._encoder.end, tokenizer.eos_token_id, *loaded.eos_ids)
        self.end = next(end for end in ends if end in loaded.eos_ids)
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._answers: dict[str, tuple[int, ...]] = {}

    def prompts(self, questions: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return each question's prompt, up to where its answer begins."""
        new = [one for one in dict.fromkeys(questions) if one not in self._prompts]
        if new:
            encoded = self._encoder.prompts(new)
            self.loaded.check_tokens(encoded)
            self._prompts.update(zip(new, encoded, strict=True))
        prompts = tuple(self._prompts[one] for one in questions)
        self._check_lengths(list(map(len, prompts)), questions)
        return prompts

    def texts(self, texts: Iterable[str]) -> list[tuple[int, ...]]:
        """Return each text as an answer, without the token that ends it."""
        encoded = [self._encoder.answer(text) for text in texts]
        self.loaded.check_tokens(encoded)
        return encoded

    def answers(self, answers: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return each answer with the token that ends it."""
        new = [one for one in dict.fromkeys(answers) if one not in self._answers]
        ended = ((*ids, self.end) for ids in self.texts(new))
        self._answers.update(zip(new, ended, strict=True))
        return tuple(self._answers[one] for one in answers)

    def pairs(self, records: Sequence[Record]) -> tuple[Pair, ...]:
        """Return records as prompts with their true answers."""
        prompts = self.prompts([record.question for record in records])
        pairs = tuple(map(Pair, prompts, self.answers([record.answer for record in records])))
        texts = [record.question + record.answer for record in records]
        self._check_lengths(list(map(len, pairs)), texts)
        return pairs

    def _check_lengths(self, lengths: Sequence[int], texts: Sequence[str]) -> None:
        """Refuse what is longer than the model's context; the message shows none of the text."""
        most = context_of(self.loaded.model.config)
        known = dict(zip(texts, lengths, strict=True))  # a question may be in several sets
        longest, characters = max(((known[one], len(one)) for one in known), default=(0, 0))
        if most is not None and longest > most:
            too_long = sum(length > most for length in known.values())
            raise DataError(
                f"{too_long} rows are longer than the context of "
                f"{self.loaded.spec.name}, {most} tokens; the longest has {longest} in its chat "
                f"template ({characters} characters of text). Shorten or remove them."
            )


def reference_batches(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    """Return pairs in batches for a forward whose results are kept and need no gradient."""
    return [pairs[i : i + _REFERENCE_BATCH] for i in range(0, len(pairs), _REFERENCE_BATCH)]


def padded_ids(pairs: Sequence[Pair], device: torch.device) -> Int[Tensor, "batch seq"]:
    """Return questions with their answers as rows of token ids.

    Padding stands on the right, where no causal position sees it: no mask is needed.
    """
    import torch

    width = max(map(len, pairs))
    rows = [[*p.prompt, *p.answer, *[0] * (width - len(p))] for p in pairs]
    return torch.tensor(rows, device=device)


def answer_states(model: PreTrainedModel, decoder: Any, pairs: Sequence[Pair]) -> AnswerStates:
    """Run the decoder stack of a causal language model on at least one pair."""
    import torch

    ids = padded_ids(pairs, model.device)
    places = [
        (row, len(p.prompt) - 1 + i) for row, p in enumerate(pairs) for i in range(len(p.answer))
    ]
    rows, positions = torch.tensor(places, device=model.device).unbind(1)
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    head: Any = model.get_output_embeddings()
    return AnswerStates(hidden[rows, positions], ids[rows, positions + 1], rows, head)


def token_log_probs(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Return log π of each token, in float32."""
    from torch.nn.functional import cross_entropy

    return -cross_entropy(logits.float(), targets, reduction="none")
