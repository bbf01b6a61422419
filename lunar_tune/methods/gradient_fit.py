"""One gradient fit, whatever its loss: made trainable, trained epoch by epoch, taken back."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError, TrialError
from lunar_tune.methods.contract import Fit, Method, UnlearningTask, number_of
from lunar_tune.models.device import is_out_of_memory
from lunar_tune.training import TRAINED, TrainingSettings, setting, with_settings
from lunar_tune.training.adapting import Trained, trainable
from lunar_tune.training.gradient_loop import LoopSettings, train_epochs

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["GradientSettings", "TrainedMethod", "gradient_fit"]


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
        """Return the method's own parameters, and the settings with what a trial sets of them.

        Raises:
            InputError: A parameter is missing, unknown or out of range.
        """
        super().check_parameters(parameters)
        own = {
            name: number_of(name, parameters[name], positive=name == "learning_rate")
            for name in self.parameters
        }
        if not own.get("layer", 0.0).is_integer():
            raise InputError(f"layer {parameters['layer']}: a whole number.")
        return own, with_settings(self.settings, parameters)


@contextmanager
def gradient_fit(
    task: UnlearningTask,
    settings: GradientSettings,
    loss: Callable[[Trained, list[int], list[int]], Tensor],
    *,
    learning_rate: float,
    seed: int,
    modules: Sequence[str] | None = None,
) -> Iterator[Fit]:
    """Return a context in which the model can be trained; after it, it is what it was.

    Args:
        task: The model, answers to forget and answers to keep.
        settings: How it is trained.
        loss: Of a step: of what is trained, and the places of answers to forget and to keep.
        learning_rate: Falls linearly to zero.
        seed: Of adapter, dropout, order and draws.
        modules: Names of what is trained; None trains everything.
    """
    n_forget, n_retain = len(task.forget_pairs), len(task.retain_pairs)
    draws = random.Random(seed)  # noqa: S311  # draws what is kept, keeps no secret
    loop = LoopSettings(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=learning_rate,
        weight_decay=settings.weight_decay,
        seed=seed,
    )
    with trainable(task.loaded, settings, seed=seed, modules=modules) as trained:

        def loss_of(batch: list[int]) -> Tensor:
            kept = draws.sample(range(n_retain), min(len(batch), n_retain))
            with trained.computing():
                return loss(trained, batch, kept)

        losses: Any = train_epochs(trained.parameters, lambda _: range(n_forget), loss_of, loop)
        with closing(_driven(task.loaded.model, losses)) as epochs:

            def finish() -> None:
                epochs.close()
                trained.finish()

            yield Fit(
                base_model=trained.base_model,
                edit=trained.edit,
                epochs=epochs,
                n_epochs=settings.epochs,
                evaluating=trained.evaluating,
                finish=finish,
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
