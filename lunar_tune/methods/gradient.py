"""Unlearning by gradients: one loop, an adapter or all weights, and a loss for each method.

Covers: gradient ascent (ga), gradient difference (gd), ascent with KL (ukl), DPO with refusals, NPO
and SimNPO; what the reference model says, from the one model there is.
Does not cover: the losses themselves (`losses`), making a model trainable (`training.adapting`).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lunar_tune.errors import InputError
from lunar_tune.methods import losses
from lunar_tune.methods.contract import METHODS, FitReport, Method, MethodInfo, Preparation, Subject
from lunar_tune.methods.gradient_settings import SEARCHABLE, TRAINED, GradientSettings
from lunar_tune.training.adapting import (
    Trained,
    all_weights,
    lora_adapter,
    seeded,
    training_mode,
)
from lunar_tune.training.likelihood import AnswerStates, Pair, answer_states, token_log_probs
from lunar_tune.training.loop import LoopSettings, run_loop

__all__ = ["GRADIENT_METHODS", "GradientMethod"]

# Pairs in a forward whose results are kept and need no gradient.
REFERENCE_BATCH = 16


class GradientMethod(Method):
    """A gradient method with its fixed settings.

    Args:
        name: One of `GRADIENT_METHODS`.
        settings: Fixed settings.
    """

    def __init__(self, name: str, settings: GradientSettings | None = None) -> None:
        self._name = name
        self.settings = settings or GradientSettings()

    @property
    def name(self) -> str:
        """Name in the registry."""
        return self._name

    @property
    def variant(self) -> str:
        """What is trained."""
        return self.settings.trained

    @property
    def parameters(self) -> tuple[str, ...]:
        """The learning rate."""
        return ("learning_rate",)

    @property
    def optional_parameters(self) -> tuple[str, ...]:
        """Settings that a space may search as well."""
        return SEARCHABLE

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Check names and values."""
        super().check_parameters(parameters)
        self.resolved(parameters)

    def resolved(self, parameters: Mapping[str, Any]) -> tuple[float, GradientSettings]:
        """Return the learning rate, and the settings with what a trial sets of them.

        Raises:
            InputError: A value is no number, or out of range.
        """
        values: dict[str, Any] = {}
        for name, value in parameters.items():
            try:
                values[name] = float(value)
            except (TypeError, ValueError):
                raise InputError(f"--{name.replace('_', '-')} {value}: a number.") from None
        rate = values.pop("learning_rate")
        if not 0 < rate < math.inf:
            raise InputError(f"--learning-rate {rate}: a positive number.")
        settings = dataclasses.replace(self.settings, **values)
        whole: dict[str, Any] = {
            name: int(getattr(settings, name)) for name in ("epochs", "batch_size", "rank")
        }
        return rate, dataclasses.replace(settings, **whole)

    def prepare(self, subject: Subject) -> GradientPreparation:
        """Check that there is what the loss needs.

        Raises:
            InputError: There are no answers to keep, or no refusals.
        """
        objective = GRADIENT_METHODS[self._name]
        keeps = objective.keeps or self.settings.retain_weight > 0
        if keeps and not subject.retain_pairs:
            raise InputError(f"--method {self._name} needs answers to keep: there are none.")
        return GradientPreparation(self, subject)


class GradientPreparation(Preparation):
    """Encoded pairs, and what the model said of them before unlearning."""

    def __init__(self, method: GradientMethod, subject: Subject) -> None:
        self._method, self._loaded = method, subject.loaded
        self.forget = subject.forget_pairs
        self.retain = subject.retain_pairs
        refusals = subject.refusals
        self.refused = tuple(
            Pair(pair.prompt, refusals[i % len(refusals)]) for i, pair in enumerate(self.forget)
        )
        self._decoder = self._loaded.layout.decoder_of(self._loaded.model)

    @contextmanager
    def unlearned(self, parameters: Mapping[str, Any], *, seed: int) -> Iterator[FitReport]:
        """Return a context in which the model is unlearned; see the contract."""
        self._method.check_parameters(parameters)
        rate, settings = self._method.resolved(parameters)
        _ = self.reference_forget, self.reference_refused  # of the model as it is before
        if settings.trained == "full" and self._method.name == "ukl":
            _ = self.reference_states
        with seeded(seed, self._loaded.device), self._trainable(settings) as trained:
            epochs = self._train(trained, rate, settings, seed)
            trained.finish()
            self._loaded.model.eval()
            yield FitReport(losses=tuple(epochs))

    @contextmanager
    def _trainable(self, settings: GradientSettings) -> Iterator[Trained]:
        with (
            all_weights(self._loaded)
            if settings.trained == "full"
            else lora_adapter(
                self._loaded, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout
            )
        ) as trained:
            yield trained

    def _train(
        self, trained: Trained, rate: float, settings: GradientSettings, seed: int
    ) -> list[float]:
        loss = GRADIENT_METHODS[self._method.name].loss
        order = random.Random(seed)  # noqa: S311  # draws what is kept, keeps no secret
        loop = LoopSettings(
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=rate,
            weight_decay=settings.weight_decay,
            schedule="linear",
            seed=seed,
        )

        def loss_of(batch: Sequence[int]) -> Tensor:
            kept = order.sample(range(len(self.retain)), min(len(batch), len(self.retain)))
            with trained.computing():
                return loss(_Step(self, trained, settings, batch, kept))

        with training_mode(self._loaded, checkpointing=settings.checkpointing):
            return run_loop(trained.parameters, lambda _: range(len(self.forget)), loss_of, loop)

    def said(self, pairs: Sequence[Pair]) -> _Said:
        """Return what the model as it is now says of some answers."""
        states = answer_states(self._loaded.model, self._decoder, pairs)
        return _Said(states, self._loaded.model.get_output_embeddings())

    @cached_property
    def reference_forget(self) -> Float[Tensor, " answers"]:
        """The unmodified model's log π of each answer to forget."""
        return self._sums(self.forget)

    @cached_property
    def reference_refused(self) -> Float[Tensor, " answers"]:
        """The unmodified model's log π of each refusal."""
        return self._sums(self.refused)

    def reference_logits(
        self, trained: Trained, kept: Sequence[int]
    ) -> Float[Tensor, "tokens vocabulary"]:
        """Return the unmodified model's logits for some answers to keep.

        An adapter is left out for one forward; where all weights are trained, final hidden states
        that were kept meet a copy of the head.
        """
        if trained.untrained is None:
            states, head = self.reference_states
            return torch.cat([states[i] for i in kept]) @ head.T
        was_training = self._loaded.model.training
        with torch.no_grad(), trained.untrained():
            self._loaded.model.eval()
            logits = self.said([self.retain[i] for i in kept]).logits
        self._loaded.model.train(was_training)
        return logits

    @cached_property
    def reference_states(self) -> tuple[list[Tensor], Tensor]:
        """The unmodified model's final hidden states of each answer to keep, and its head."""
        states = []
        for batch in _batches(self.retain):
            with torch.no_grad():
                said = answer_states(self._loaded.model, self._decoder, batch)
            states += [said.hidden[said.rows == row] for row in range(len(batch))]
        return states, self._loaded.model.get_output_embeddings().weight.detach().clone()

    def _sums(self, pairs: Sequence[Pair]) -> Float[Tensor, " answers"]:
        with torch.no_grad():
            return torch.cat([self.said(batch).answers for batch in _batches(pairs)])


class _Said:
    """Logits of a few answers' tokens, and what follows from them."""

    def __init__(self, states: AnswerStates, head: Any) -> None:
        self.states = states
        self.logits: Float[Tensor, "tokens vocabulary"] = head(states.hidden)

    @cached_property
    def tokens(self) -> Float[Tensor, " tokens"]:
        """Log π of each token."""
        return token_log_probs(self.logits, self.states.targets)

    @cached_property
    def answers(self) -> Float[Tensor, " answers"]:
        """Log π of each answer."""
        return self.states.sums(self.tokens)


class _Step:
    """What a loss may ask for in one step; only what it asks for is computed."""

    def __init__(
        self,
        made: GradientPreparation,
        trained: Trained,
        settings: GradientSettings,
        batch: Sequence[int],
        kept: Sequence[int],
    ) -> None:
        self._made, self._trained, self.settings = made, trained, settings
        self._batch, self._kept = list(batch), list(kept)

    @cached_property
    def forget(self) -> _Said:
        """Answers to forget."""
        return self._made.said([self._made.forget[i] for i in self._batch])

    @cached_property
    def refused(self) -> _Said:
        """The same questions, refused."""
        return self._made.said([self._made.refused[i] for i in self._batch])

    @cached_property
    def retain(self) -> _Said:
        """Answers to keep."""
        return self._made.said([self._made.retain[i] for i in self._kept])

    @property
    def reference_forget(self) -> Float[Tensor, " answers"]:
        """Log π of the answers to forget, before unlearning."""
        return self._made.reference_forget[self._batch]

    @property
    def reference_refused(self) -> Float[Tensor, " answers"]:
        """Log π of the refusals, before unlearning."""
        return self._made.reference_refused[self._batch]

    @property
    def reference_retain_logits(self) -> Float[Tensor, "tokens vocabulary"]:
        """Logits of the answers to keep, before unlearning."""
        return self._made.reference_logits(self._trained, self._kept)


def _ga(step: _Step) -> Tensor:
    return losses.gradient_ascent(step.forget.tokens)


def _gd(step: _Step) -> Tensor:
    return losses.gradient_difference(step.forget.tokens, step.retain.tokens)


def _ukl(step: _Step) -> Tensor:
    kept = losses.kl_to_reference(step.reference_retain_logits, step.retain.logits)
    return losses.gradient_ascent(step.forget.tokens) + kept


def _dpo(step: _Step) -> Tensor:
    return losses.dpo(
        step.refused.answers,
        step.forget.answers,
        step.reference_refused,
        step.reference_forget,
        beta=step.settings.beta,
    )


def _npo(step: _Step) -> Tensor:
    forgotten = losses.npo(step.forget.answers, step.reference_forget, beta=step.settings.beta)
    return forgotten + _kept(step)


def _simnpo(step: _Step) -> Tensor:
    forgotten = losses.simnpo(
        step.forget.answers,
        step.forget.states.lengths,
        beta=step.settings.beta,
        gamma=step.settings.gamma,
    )
    return forgotten + _kept(step)


def _kept(step: _Step) -> Tensor | float:
    weight = step.settings.retain_weight
    return -weight * step.retain.tokens.mean() if weight else 0.0


@dataclass(frozen=True, slots=True)
class _Objective:
    """A gradient method's loss."""

    summary: str
    loss: Callable[[_Step], Tensor]
    keeps: bool = False
    """Whether it needs answers to keep."""


GRADIENT_METHODS: Mapping[str, _Objective] = {
    "ga": _Objective("gradient ascent on the answers to forget", _ga),
    "gd": _Objective("gradient difference: ascent, and descent on answers to keep", _gd, True),
    "ukl": _Objective("gradient ascent with KL to the original on answers to keep", _ukl, True),
    "dpo": _Objective("direct preference optimisation of refusals over the answers", _dpo),
    "npo": _Objective("negative preference optimisation", _npo),
    "simnpo": _Objective("negative preference optimisation without a reference", _simnpo),
}
for _name, _objective in GRADIENT_METHODS.items():
    METHODS.register(_name, MethodInfo(summary=_objective.summary, variants=TRAINED))


def _batches(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    return [pairs[i : i + REFERENCE_BATCH] for i in range(0, len(pairs), REFERENCE_BATCH)]
