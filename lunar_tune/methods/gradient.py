"""Methods that train an adapter or weights with a loss of their own."""

from __future__ import annotations

import copy
import random
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError, TrialError
from lunar_tune.methods.contract import Fit, Method, PreparedMethod, UnlearningTask, number_of
from lunar_tune.models.device import is_out_of_memory
from lunar_tune.training import TRAINED, TrainingSettings, setting, with_settings
from lunar_tune.training.adapting import trainable
from lunar_tune.training.answer_loss import AnswerStates, Pair, answer_states, reference_batches
from lunar_tune.training.gradient_loop import train_epochs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GradientSettings(TrainingSettings):
    """What is fixed over a search; defaults are PISTOL's (arXiv 2406.16810) where it has them.

    An epoch takes each answer to forget once; as many to keep are drawn where a loss wants them.
    """

    beta: float | None = setting(None, above=0)
    """For dpo, npo and simnpo: how far an answer may go before it counts less. None is 0.1, for
    simnpo 2.5: there it multiplies a mean over tokens."""
    gamma: float = setting(0.0, least=0)
    """For simnpo: the margin."""
    retain_weight: float = setting(0.0, least=0)
    """For npo and simnpo: how much the usual loss on answers to keep counts."""
    steering_alpha: float = setting(100.0, least=0)
    """For rmu: weight of keeping retained activations; the paper's code has 100 and 1,200."""


class TrainedMethod(Method):
    """What methods share that train an adapter or weights with a loss of their own."""

    settings_type = GradientSettings
    variant_setting = "trained"
    variants = TRAINED
    settings: GradientSettings

    def __init__(self, settings: GradientSettings) -> None:
        super().__init__(settings)
        self.adapter = "none" if settings.trained == "full" else "exact"

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Check names and values; what depends on the model is checked with it."""
        self.resolved(parameters)

    def resolved(self, parameters: Mapping[str, Any]) -> tuple[dict[str, float], GradientSettings]:
        """Return the method's own parameters, and the settings with what a trial sets of them."""
        super().check_parameters(parameters)
        own = {
            name: number_of(name, parameters[name], positive=name == "learning_rate")
            for name in self.parameters
        }
        if not own.get("layer", 0.0).is_integer():
            raise InputError(f"layer {parameters['layer']}: must be a whole number.")
        return own, with_settings(self.settings, parameters)


class GradientMethod(TrainedMethod):
    """A method that is a loss of answers' log-probabilities."""

    parameters = ("learning_rate",)
    keeps: bool = False  # whether it needs answers to keep
    weighs_retain: bool = False  # whether it takes them with the setting `retain_weight`
    references: tuple[str, ...] = ()
    """Which answers it compares with the base model's: see `Step.reference`."""

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """Return the loss of a step, which is minimised."""

    def sees_retain(self, parameters: Mapping[str, Any]) -> bool:
        """Say whether the loss has a term of answers to keep."""
        weighs = self.weighs_retain and self.resolved(parameters)[1].retain_weight > 0
        return self.keeps or weighs

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
        self.pairs: dict[str, Sequence[Pair]] = {
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

        def loss(fit: Fit, batch: list[int], kept: list[int]) -> Tensor:
            return self._method.loss(Step(self, fit, settings, batch, kept))

        rate = own["learning_rate"]
        return gradient_fit(self._task, settings, loss, learning_rate=rate, seed=seed)

    def answers(self, pairs: Sequence[Pair]) -> AnswerStates:
        """Return what the model as it is now says of some pairs."""
        return answer_states(self._model, self._decoder, pairs)

    def reference_sums(self, name: str) -> Float[Tensor, " answers"]:
        """Return the base model's log π of the answer of each of the named pairs."""
        import torch

        if name not in self._sums:
            with torch.no_grad():
                said = [self.answers(some).answers for some in reference_batches(self.pairs[name])]
            self._sums[name] = torch.cat(said)
        return self._sums[name]

    def reference_logits(self, fit: Fit, kept: Sequence[int]) -> Float[Tensor, "tokens vocabulary"]:
        """Return the base model's logits for some answers to keep.

        An adapter is left out for one forward; where all weights are trained, final hidden states
        that were kept meet a copy of the head.
        """
        import torch

        if fit.edit.factors is None:
            states, head = self._reference_states
            logits: Tensor = head(torch.cat([states[i] for i in kept]).to(self._model.device))
            return logits
        was_training = self._model.training
        with torch.no_grad(), fit.base_model():
            self._model.eval()
            logits = self.answers([self.pairs["retain"][i] for i in kept]).logits
        self._model.train(was_training)
        return logits

    @cached_property
    def _reference_states(self) -> tuple[list[Tensor], nn.Module]:
        """The base model's final hidden states of each answer to keep, and a copy of its head."""
        import torch

        states: list[Tensor] = []
        for some in reference_batches(self.pairs["retain"]):
            with torch.no_grad():
                said = self.answers(some)
            states += [said.hidden[said.rows == row].cpu() for row in range(len(some))]
        head: Any = copy.deepcopy(self._model.get_output_embeddings())
        return states, head.requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class Step:
    """What a loss may ask for in one step; what it does not ask for is not computed.

    Answers are named: those to `forget`, the same questions `refused`, and those to `retain`.
    """

    source: PreparedGradient
    fit: Fit
    settings: GradientSettings
    batch: list[int]  # places of the answers to forget
    kept: list[int]  # places of the answers to keep

    def answers(self, name: str) -> AnswerStates:
        """Return what the model says of the named answers."""
        pairs, places = self.source.pairs[name], self.kept if name == "retain" else self.batch
        return self.source.answers([pairs[i] for i in places])

    def reference(self, name: str) -> Tensor:
        """Return what the base model says: log π of each answer, of those to `retain` logits."""
        if name == "retain":
            return self.source.reference_logits(self.fit, self.kept)
        return self.source.reference_sums(name)[self.batch]

    @property
    def kept_loss(self) -> Tensor | float:
        """The usual loss on answers to keep, as far as the settings weigh it."""
        weight = self.settings.retain_weight
        return -weight * self.answers("retain").tokens.mean() if weight else 0.0


@contextmanager
def gradient_fit(
    task: UnlearningTask,
    settings: GradientSettings,
    loss: Callable[[Fit, list[int], list[int]], Tensor],
    *,
    learning_rate: float,
    seed: int,
    modules: Sequence[str] | None = None,
) -> Iterator[Fit]:
    """Inside, the model can be trained; after, it is what it was.

    `loss` is a step's, of the fit and the places of answers to forget and to keep; the learning
    rate falls linearly to zero; `modules` names what is trained, None trains everything.
    """
    model, rows, n_retain = task.loaded.model, range(len(task.forget_pairs)), len(task.retain_pairs)
    draws = random.Random(seed)  # noqa: S311  # draws what is kept, keeps no secret
    with trainable(task.loaded, settings, seed=seed, modules=modules) as fit:

        def loss_of(batch: list[int]) -> Tensor:
            kept = draws.sample(range(n_retain), min(len(batch), n_retain))
            with fit.computing():
                return loss(fit, batch, kept)

        def trained() -> Generator[float, None, None]:
            try:
                yield from train_epochs(
                    model, lambda _: rows, loss_of, settings, learning_rate=learning_rate, seed=seed
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                lora = settings.trained == "lora"
                less = {
                    "checkpointing=true": not settings.checkpointing,
                    f"batch_size below {settings.batch_size}": settings.batch_size > 1,
                    f"rank below {settings.rank}": lora and settings.rank > 1,
                    "trained=lora": not lora,
                }
                ways = ", or ".join(way for way, is_left in less.items() if is_left)
                raise TrialError(
                    f"out of memory while training: use --fix {ways or 'of a smaller model'}"
                ) from error

        with closing(trained()) as epochs:
            round_weights = fit.finish

            def finish() -> None:
                epochs.close()
                round_weights()

            fit.epochs, fit.n_epochs, fit.finish = epochs, settings.epochs, finish
            yield fit
