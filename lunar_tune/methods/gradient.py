"""Unlearning by gradients: an adapter or all weights, and a loss for each method.

Covers: the methods of `objectives` under the contract; what the reference model says, from the one
model that there is.
Does not cover: the losses (`losses`), the fit (`gradient_fit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lunar_tune.config.gradient_settings import TRAINED, GradientSettings
from lunar_tune.errors import InputError
from lunar_tune.methods.contract import METHODS, Fit, MethodInfo, Preparation, Subject
from lunar_tune.methods.gradient_fit import TrainedMethod, gradient_fit, numbers_of, with_settings
from lunar_tune.methods.objectives import OBJECTIVES
from lunar_tune.methods.steps import Said, Source, Step
from lunar_tune.training.adapting import Trained
from lunar_tune.training.answer_loss import Pair, answer_states, reference_batches

__all__ = ["GradientMethod"]

for _name, _objective in OBJECTIVES.items():
    METHODS.register(_name, MethodInfo(summary=_objective.summary, variants=TRAINED))


class GradientMethod(TrainedMethod):
    """A gradient method with its fixed settings.

    Args:
        name: One of `OBJECTIVES`.
        settings: Fixed settings.
    """

    def __init__(self, name: str, settings: GradientSettings | None = None) -> None:
        super().__init__(settings)
        self._name = name

    @property
    def name(self) -> str:
        """Name in the registry."""
        return self._name

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
        objective = OBJECTIVES[self._name]
        keeps = objective.keeps or self.settings.retain_weight > 0
        if keeps and not subject.retain_pairs:
            raise InputError(f"--method {self._name} needs answers to keep: there are none.")
        if objective.refuses and not subject.refusals:
            raise InputError(f"--method {self._name} needs --refusals: there are none.")
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
        objective = OBJECTIVES[self._method.name]
        self._ask_reference(settings)

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

    def _ask_reference(self, settings: GradientSettings) -> None:
        """Compute, while the model is what it was, what the loss compares with."""
        name = self._method.name
        if name in {"dpo", "npo"}:
            _ = self.reference_forget
        if name == "dpo":
            _ = self.reference_refused
        if name == "ukl" and settings.trained == "full":
            _ = self.reference_states

    def said(self, pairs: Sequence[Pair]) -> Said:
        """Return what the model as it is now says of some answers."""
        states = answer_states(self._loaded.model, self._decoder, pairs)
        return Said(states, self._loaded.model.get_output_embeddings())

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
            return torch.cat([states[i] for i in kept]).to(head.device) @ head.T
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
        for batch in reference_batches(self.retain):
            with torch.no_grad():
                said = answer_states(self._loaded.model, self._decoder, batch)
            states += [said.hidden[said.rows == row].cpu() for row in range(len(batch))]
        return states, self._loaded.model.get_output_embeddings().weight.detach().clone()

    def _sums(self, pairs: Sequence[Pair]) -> Float[Tensor, " answers"]:
        with torch.no_grad():
            return torch.cat([self.said(batch).answers for batch in reference_batches(pairs)])
