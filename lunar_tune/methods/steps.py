"""What one step of a gradient method may ask the model, and no more of it than is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lunar_tune.methods.gradient_settings import GradientSettings
from lunar_tune.training.adapting import Trained
from lunar_tune.training.answer_loss import AnswerStates, Pair, token_log_probs

__all__ = ["Said", "Source", "Step"]


class Said:
    """Logits of a few answers' tokens, and what follows from them."""

    def __init__(self, states: AnswerStates, head: Any) -> None:
        self._states = states
        self.logits: Float[Tensor, "tokens vocabulary"] = head(states.hidden)

    @cached_property
    def tokens(self) -> Float[Tensor, " tokens"]:
        """Log π of each token."""
        return token_log_probs(self.logits, self._states.targets)

    @cached_property
    def answers(self) -> Float[Tensor, " answers"]:
        """Log π of each answer."""
        return self._states.sums(self.tokens)

    @property
    def lengths(self) -> Float[Tensor, " answers"]:
        """Tokens of each answer."""
        return self._states.lengths


class Source(ABC):
    """Pairs, the model as it is now, and what it was.

    Args:
        forget: Answers to forget.
        refused: The same questions, refused; empty where there are no refusals.
        retain: Answers to keep.
    """

    def __init__(
        self, forget: Sequence[Pair], refused: Sequence[Pair], retain: Sequence[Pair]
    ) -> None:
        self.forget, self.refused, self.retain = forget, refused, retain

    @abstractmethod
    def said(self, pairs: Sequence[Pair]) -> Said:
        """Return what the model as it is now says of some answers."""

    @cached_property
    @abstractmethod
    def reference_forget(self) -> Float[Tensor, " answers"]:
        """The base model's log π of each answer to forget."""

    @cached_property
    @abstractmethod
    def reference_refused(self) -> Float[Tensor, " answers"]:
        """The base model's log π of each refusal."""

    @abstractmethod
    def reference_logits(
        self, trained: Trained, kept: Sequence[int]
    ) -> Float[Tensor, "tokens vocabulary"]:
        """Return the base model's logits for some answers to keep."""


class Step:
    """What a loss may ask for in one step.

    Args:
        source: Where it comes from.
        trained: What is trained.
        settings: Of the fit.
        batch: Places of the answers to forget.
        kept: Places of the answers to keep.
    """

    def __init__(
        self,
        source: Source,
        trained: Trained,
        settings: GradientSettings,
        batch: list[int],
        kept: list[int],
    ) -> None:
        self._source, self._trained, self.settings = source, trained, settings
        self._batch, self._kept = batch, kept

    def beta(self, usual: float) -> float:
        """Return β: the settings' own, or a method's usual one."""
        return usual if self.settings.beta is None else self.settings.beta

    @property
    def kept(self) -> Tensor | float:
        """The usual loss on answers to keep, as far as the settings weigh it."""
        weight = self.settings.retain_weight
        return -weight * self.retain.tokens.mean() if weight else 0.0

    @cached_property
    def forget(self) -> Said:
        """Answers to forget."""
        return self._source.said([self._source.forget[i] for i in self._batch])

    @cached_property
    def refused(self) -> Said:
        """The same questions, refused."""
        return self._source.said([self._source.refused[i] for i in self._batch])

    @cached_property
    def retain(self) -> Said:
        """Answers to keep."""
        return self._source.said([self._source.retain[i] for i in self._kept])

    @property
    def reference_forget(self) -> Float[Tensor, " answers"]:
        """Log π of the answers to forget, before unlearning."""
        return self._source.reference_forget[self._batch]

    @property
    def reference_refused(self) -> Float[Tensor, " answers"]:
        """Log π of the refusals, before unlearning."""
        return self._source.reference_refused[self._batch]

    @property
    def reference_retain_logits(self) -> Float[Tensor, "tokens vocabulary"]:
        """Logits of the answers to keep, before unlearning."""
        return self._source.reference_logits(self._trained, self._kept)
