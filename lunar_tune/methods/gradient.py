"""Unlearning by gradients: an adapter or all weights, and a loss for each method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lunar_tune.errors import InputError
from lunar_tune.methods.contract import Fit, MethodEntry, Preparation, Subject, with_settings
from lunar_tune.methods.gradient_fit import TrainedMethod, gradient_fit, numbers_of
from lunar_tune.methods.gradient_settings import TRAINED, GradientSettings
from lunar_tune.methods.steps import Said, Source, Step
from lunar_tune.training.adapting import Trained
from lunar_tune.training.answer_loss import Pair, answer_states, reference_batches

__all__ = ["GradientMethod", "Objective", "gradient_entry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is special about a gradient method."""

    name: str
    summary: str
    loss: Callable[[Step], Tensor]
    """The loss of a step, which is minimised. A function of a module, so that it can be pickled."""
    keeps: bool = False
    """Whether it needs answers to keep."""
    refuses: bool = False
    """Whether it needs refusals, and the base model's log π of them."""
    asks_forget: bool = False
    """Whether it compares with the base model's log π of the answers to forget."""
    asks_states: bool = False
    """Whether it compares with the base model's logits on answers to keep."""


class GradientMethod(TrainedMethod):
    """A gradient method with its fixed settings.

    Args:
        objective: Its loss, and what that needs.
        settings: Fixed settings.
    """

    def __init__(self, objective: Objective, settings: GradientSettings | None = None) -> None:
        super().__init__(settings)
        self.objective = objective

    @property
    def name(self) -> str:
        """Name in the registry."""
        return self.objective.name

    @property
    def parameters(self) -> tuple[str, ...]:
        """The learning rate."""
        return ("learning_rate",)

    def resolved(self, parameters: Mapping[str, Any]) -> tuple[float, GradientSettings]:
        """Return the learning rate, and the settings with what a trial sets of them.

        Raises:
            InputError: A value is no number, or out of range.
        """
        numbers = numbers_of(parameters)
        rate = numbers.pop("learning_rate")
        return rate, with_settings(self.settings, numbers)

    def prepare(self, subject: Subject) -> GradientPreparation:
        """Check that there is what the loss needs.

        Raises:
            InputError: There are no answers to keep, or no refusals.
        """
        objective = self.objective
        keeps = objective.keeps or self.settings.retain_weight > 0
        if keeps and not subject.retain_pairs:
            raise InputError(f"--method {self.name} needs answers to keep: there are none.")
        if objective.refuses and not subject.refusals:
            raise InputError(f"--method {self.name} needs --refusals: there are none.")
        return GradientPreparation(self, subject)


class GradientPreparation(Preparation, Source):
    """Encoded pairs, and what the model said of them before unlearning."""

    def __init__(self, method: GradientMethod, subject: Subject) -> None:
        forget, refusals = subject.forget_pairs, subject.refusals
        refused = [
            Pair(pair.prompt, refusals[i % len(refusals)])
            for i, pair in enumerate(forget if refusals else ())
        ]
        super().__init__(forget, refused, subject.retain_pairs)
        self._method, self._loaded = method, subject.loaded
        self._decoder = self._loaded.layout.decoder_of(self._loaded.model)

    @contextmanager
    def unlearning(self, parameters: Mapping[str, Any], *, seed: int) -> Iterator[Fit]:
        """Return a context in which the model is trained; see the contract."""
        self._method.check_parameters(parameters)
        rate, settings = self._method.resolved(parameters)
        objective = self._method.objective
        self._ask_reference(objective, settings)

        def loss(trained: Trained, batch: list[int], kept: list[int]) -> Tensor:
            return objective.loss(Step(self, trained, settings, batch, kept))

        with gradient_fit(
            self._loaded,
            settings,
            loss,
            n_forget=len(self.forget),
            n_retain=len(self.retain),
            learning_rate=rate,
            seed=seed,
        ) as fit:
            yield fit

    def _ask_reference(self, objective: Objective, settings: GradientSettings) -> None:
        """Compute, while the model is what it was, what the loss compares with."""
        if objective.asks_forget:
            _ = self.reference_forget
        if objective.refuses:
            _ = self.reference_refused
        if objective.asks_states and settings.trained == "full":
            _ = self.reference_states

    def said(self, pairs: Sequence[Pair]) -> Said:
        """Return what the model as it is now says of some answers."""
        states = answer_states(self._loaded.model, self._decoder, pairs)
        return Said(states, self._loaded.model.get_output_embeddings())

    @cached_property
    def reference_forget(self) -> Float[Tensor, " answers"]:
        """The base model's log π of each answer to forget."""
        return self._sums(self.forget)

    @cached_property
    def reference_refused(self) -> Float[Tensor, " answers"]:
        """The base model's log π of each refusal."""
        return self._sums(self.refused)

    def reference_logits(
        self, trained: Trained, kept: Sequence[int]
    ) -> Float[Tensor, "tokens vocabulary"]:
        """Return the base model's logits for some answers to keep.

        An adapter is left out for one forward; where all weights are trained, final hidden states
        that were kept meet a copy of the head.
        """
        if trained.untrained is None:
            states, head = self.reference_states
            return torch.cat([states[i] for i in kept]).to(head.device) @ head.T
        was_training = self._loaded.model.training
        with torch.no_grad(), trained.untrained():
            self._loaded.model.eval()
            logits = self.said([self.retain[i] for i in kept]).logits
        self._loaded.model.train(was_training)
        return logits

    @cached_property
    def reference_states(self) -> tuple[list[Tensor], Tensor]:
        """The base model's final hidden states of each answer to keep, and its head."""
        states = []
        for batch in reference_batches(self.retain):
            with torch.no_grad():
                said = answer_states(self._loaded.model, self._decoder, batch)
            states += [said.hidden[said.rows == row].cpu() for row in range(len(batch))]
        return states, self._loaded.model.get_output_embeddings().weight.detach().clone()

    def _sums(self, pairs: Sequence[Pair]) -> Float[Tensor, " answers"]:
        with torch.no_grad():
            return torch.cat([self.said(batch).answers for batch in reference_batches(pairs)])


def gradient_entry(objective: Objective) -> MethodEntry:
    """Return what the registry knows of a gradient method."""
    return MethodEntry(
        name=objective.name,
        summary=objective.summary,
        variants=TRAINED,
        variant_setting="trained",
        settings=GradientSettings,
        build=functools.partial(GradientMethod, objective),
    )
