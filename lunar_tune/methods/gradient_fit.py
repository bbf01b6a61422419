"""One gradient fit, whatever its loss: made trainable, trained epoch by epoch, taken back."""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lunar_tune.errors import InputError, TrialError
from lunar_tune.methods.contract import AdapterKind, Change, Fit, Method
from lunar_tune.methods.gradient_settings import SEARCHABLE, GradientSettings
from lunar_tune.models.device import is_out_of_memory
from lunar_tune.training.adapting import (
    Trained,
    adapter_factors,
    full_weights,
    lora_adapter,
    merged_weights,
    recomputing,
    seeded,
)
from lunar_tune.training.gradient_loop import LoopSettings, train_epochs

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = ["BatchLoss", "TrainedMethod", "gradient_fit", "numbers_of"]

BatchLoss = Callable[[Trained, list[int], list[int]], Tensor]
"""The loss of a step: what is trained, answers to forget and answers to keep by their places."""


class TrainedMethod(Method):
    """What methods share that train an adapter or weights with a loss of their own.

    Args:
        settings: Fixed settings.
    """

    def __init__(self, settings: GradientSettings | None = None) -> None:
        self.settings = settings or GradientSettings()

    @property
    def variant(self) -> str:
        """What is trained."""
        return self.settings.trained

    @property
    def adapter(self) -> AdapterKind:
        """The adapter that was trained, or none."""
        return "none" if self.settings.trained == "full" else "exact"

    @property
    def optional_parameters(self) -> tuple[str, ...]:
        """Settings that a space may search as well."""
        return SEARCHABLE

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Check names and values; what depends on the model is checked with it."""
        super().check_parameters(parameters)
        self.resolved(parameters)

    @abstractmethod
    def resolved(self, parameters: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the parameters as numbers, and the settings with what a trial sets of them.

        Raises:
            InputError: A value is no number, or out of range.
        """


def numbers_of(parameters: Mapping[str, Any]) -> dict[str, float]:
    """Return parameters as finite numbers.

    Raises:
        InputError: One is no number, or the learning rate is not positive.
    """
    numbers: dict[str, float] = {}
    for name, value in parameters.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            numbers[name] = math.nan
        positive = name != "learning_rate" or numbers[name] > 0
        if not math.isfinite(numbers[name]) or not positive:
            kind = "a positive number" if name == "learning_rate" else "a finite number"
            raise InputError(f"{name} {value}: {kind}.")
    return numbers


@contextmanager
def gradient_fit(
    loaded: LoadedModel,
    settings: GradientSettings,
    loss: BatchLoss,
    *,
    n_forget: int,
    n_retain: int,
    learning_rate: float,
    seed: int,
    modules: Sequence[str] | None = None,
) -> Iterator[Fit]:
    """Return a context in which the model can be trained; after it, it is what it was.

    Args:
        loaded: The model.
        settings: How it is trained.
        loss: Of a step.
        n_forget: Answers to forget; an epoch takes each once.
        n_retain: Answers to keep, of which a step draws as many as it forgets.
        learning_rate: Falls linearly to zero.
        seed: Of adapter, dropout, order and draws.
        modules: Names of what is trained; None trains everything.
    """
    context: AbstractContextManager[Trained] = (
        full_weights(loaded, modules=modules)
        if settings.trained == "full"
        else lora_adapter(
            loaded,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            modules=modules,
        )
    )
    draws = random.Random(seed)  # noqa: S311  # draws what is kept, keeps no secret
    loop = LoopSettings(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=learning_rate,
        weight_decay=settings.weight_decay,
        schedule="linear",
        seed=seed,
    )
    with seeded(seed, loaded.device), context as trained:

        def loss_of(batch: list[int]) -> Tensor:
            kept = draws.sample(range(n_retain), min(len(batch), n_retain))
            with trained.computing():
                return loss(trained, batch, kept)

        losses: Any = train_epochs(trained.parameters, lambda _: range(n_forget), loss_of, loop)
        with (
            recomputing(loaded.model, on=settings.checkpointing),
            closing(_driven(loaded.model, losses)) as epochs,
        ):

            def finish() -> None:
                epochs.close()
                trained.finish()

            yield Fit(
                unmodified=trained.unmodified,
                epochs=epochs,
                n_epochs=settings.epochs,
                evaluating=trained.evaluating,
                finish=finish,
                change=_change(loaded.model, settings),
            )


def _change(model: nn.Module, settings: GradientSettings) -> Change:
    """Return the weights that are trained, or what the adapter makes of them."""
    if settings.trained == "full":
        return Change(
            weights=lambda: {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        )
    return Change(
        weights=lambda: merged_weights(model), factors=lambda: adapter_factors(model), merged=True
    )


def _driven(model: nn.Module, losses: Generator[float, None, None]) -> Generator[float, None, None]:
    """Yield each epoch's loss with the model ready to be evaluated.

    Raises:
        TrialError: Memory ran out.
    """
    try:
        while True:
            model.train()
            loss = next(losses, None)
            model.eval()
            if loss is None:
                return
            yield loss
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrialError(
            "out of memory while training: use --fix checkpointing=true, a smaller batch_size or "
            "rank, or trained=lora"
        ) from error
    finally:
        losses.close()  # and with it the optimiser's state
        model.eval()
