"""Methods that train an adapter or all weights on a loss of answers' log-probabilities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError
from lunar_tune.methods.contract import Fit, PreparedMethod, UnlearningTask
from lunar_tune.methods.gradient_fit import GradientSettings, TrainedMethod, gradient_fit
from lunar_tune.training.adapting import Trained
from lunar_tune.training.answer_loss import AnswerStates, Pair, answer_states, reference_batches

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["GradientMethod", "Step"]


class GradientMethod(TrainedMethod):
    """A method that is a loss of answers' log-probabilities."""

    parameters = ("learning_rate",)
    keeps: bool = False
    """Whether it needs answers to keep."""
    references: tuple[str, ...] = ()
    """What it compares with the base model's: log π of the answers to `forget` or of the `refused`
    questions, logits on answers to `retain`."""

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """Return the loss of a step, which is minimised."""

    def prepare(self, task: UnlearningTask) -> PreparedGradient:
        """Check that there is what the loss needs; see the contract."""
        if (self.keeps or self.settings.retain_weight > 0) and not task.retain_pairs:
            raise InputError(f"--method {self.name} needs answers to keep: there are none.")
        if "refused" in self.references and not task.refusals:
            raise InputError(f"--method {self.name} needs --refusals: there are none.")
        return PreparedGradient(self, task)


class PreparedGradient(PreparedMethod):
    """Encoded pairs, and what the base model says of them."""

    def __init__(self, method: GradientMethod, task: UnlearningTask) -> None:
        self._method, self._task, self._model = method, task, task.loaded.model
        self._decoder = task.loaded.layout.decoder_of(self._model)
        refused = [
            Pair(pair.prompt, task.refusals[i % len(task.refusals)])
            for i, pair in enumerate(task.forget_pairs if task.refusals else ())
        ]
        self._pairs: dict[str, Sequence[Pair]] = {
            "forget": task.forget_pairs,
            "refused": refused,
            "retain": task.retain_pairs,
        }
        self._sums: dict[str, Float[Tensor, " answers"]] = {}

    def unlearning(
        self, parameters: Mapping[str, Any], *, seed: int
    ) -> AbstractContextManager[Fit]:
        """Return a context in which the model is trained; see the contract."""
        own, settings = self._method.resolved(parameters)
        for name in self._method.references:  # asked of the base model, which this still is
            if name != "retain":
                self.reference_sums(name)
            elif settings.trained == "full":
                _ = self._reference_states

        def loss(trained: Trained, batch: list[int], kept: list[int]) -> Tensor:
            return self._method.loss(Step(self, trained, settings, batch, kept))

        rate = own["learning_rate"]
        return gradient_fit(self._task, settings, loss, learning_rate=rate, seed=seed)

    def answers(self, name: str, places: Sequence[int]) -> AnswerStates:
        """Return what the model as it is now says of some of the named pairs."""
        return self._answers([self._pairs[name][i] for i in places])

    def _answers(self, pairs: Sequence[Pair]) -> AnswerStates:
        return answer_states(self._model, self._decoder, pairs)

    def reference_sums(self, name: str) -> Float[Tensor, " answers"]:
        """Return the base model's log π of the answer of each of the named pairs."""
        import torch

        if name not in self._sums:
            batches = reference_batches(self._pairs[name])
            with torch.no_grad():
                self._sums[name] = torch.cat([self._answers(batch).answers for batch in batches])
        return self._sums[name]

    def reference_logits(
        self, trained: Trained, kept: Sequence[int]
    ) -> Float[Tensor, "tokens vocabulary"]:
        """Return the base model's logits for some answers to keep.

        An adapter is left out for one forward; where all weights are trained, final hidden states
        that were kept meet a copy of the head.
        """
        import torch

        if trained.edit.factors is None:
            states, head = self._reference_states
            return torch.cat([states[i] for i in kept]).to(head.device) @ head.T
        was_training = self._model.training
        with torch.no_grad(), trained.base_model():
            self._model.eval()
            logits = self.answers("retain", kept).logits
        self._model.train(was_training)
        return logits

    @cached_property
    def _reference_states(self) -> tuple[list[Tensor], Tensor]:
        """The base model's final hidden states of each answer to keep, and its head."""
        import torch

        states = []
        for batch in reference_batches(self._pairs["retain"]):
            with torch.no_grad():
                said = self._answers(batch)
            states += [said.hidden[said.rows == row].cpu() for row in range(len(batch))]
        return states, self._model.get_output_embeddings().weight.detach().clone()


class Step:
    """What a loss may ask for in one step; what it does not ask for is not computed."""

    def __init__(
        self,
        source: PreparedGradient,
        trained: Trained,
        settings: GradientSettings,
        batch: list[int],
        kept: list[int],
    ) -> None:
        self._source, self._trained, self.settings = source, trained, settings
        self._batch, self._kept = batch, kept  # places of the answers to forget and to keep

    @cached_property
    def forget(self) -> AnswerStates:
        """Answers to forget."""
        return self._source.answers("forget", self._batch)

    @cached_property
    def refused(self) -> AnswerStates:
        """The same questions, refused."""
        return self._source.answers("refused", self._batch)

    @cached_property
    def retain(self) -> AnswerStates:
        """Answers to keep."""
        return self._source.answers("retain", self._kept)

    @property
    def kept(self) -> Tensor | float:
        """The usual loss on answers to keep, as far as the settings weigh it."""
        weight = self.settings.retain_weight
        return -weight * self.retain.tokens.mean() if weight else 0.0

    @property
    def reference_forget(self) -> Float[Tensor, " answers"]:
        """The base model's log π of the answers to forget."""
        return self._source.reference_sums("forget")[self._batch]

    @property
    def reference_refused(self) -> Float[Tensor, " answers"]:
        """The base model's log π of the refusals."""
        return self._source.reference_sums("refused")[self._batch]

    @property
    def reference_retain_logits(self) -> Float[Tensor, "tokens vocabulary"]:
        """The base model's logits of the answers to keep."""
        return self._source.reference_logits(self._trained, self._kept)
