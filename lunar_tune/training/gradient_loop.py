"""One gradient loop: AdamW over some parameters, a loss over batches, a schedule, and no more."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lunar_tune.errors import DivergenceError

__all__ = ["LoopSettings", "LoopState", "Schedule", "run_loop", "scheduled", "train_epochs"]

Example = TypeVar("Example")
Schedule = Literal["constant", "linear", "cosine"]
# Sorting by exact length fills a batch with one question template. Last losses on `tiny`, one seed
# each: exact .066 after 20 epochs; after 18, a jitter of 4 tokens .042 and no sorting .020. Eight
# was not compared by itself.
_LENGTH_JITTER = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How parameters are trained.

    Attributes:
        epochs: Passes over the examples.
        batch_size: Examples a step; the last batch of an epoch may be smaller.
        learning_rate: AdamW's, at the top of the schedule.
        weight_decay: AdamW's, for matrices; biases and norms are never decayed.
        schedule: What follows the warm-up: the same rate, or a fall to zero.
        warmup_share: The share of the steps, 0 up to 1, in which the rate rises from zero.
        beta2: AdamW's second moment decay.
        max_grad_norm: The gradient's norm is clipped to this; None does not clip.
        seed: Orders the examples; nothing else here is random.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup_share: float = 0.0
    beta2: float = 0.999
    max_grad_norm: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject what no loop can do; a mistake in the program, so a plain ValueError."""
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs {self.epochs} and batch_size {self.batch_size}: at least 1")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share {self.warmup_share}: at least 0, below 1")


@dataclass(frozen=True, slots=True)
class LoopState:
    """What a loop must be given to go on after an epoch."""

    losses: tuple[float, ...]
    """Mean loss of each epoch that is done."""
    tensors: Mapping[str, Tensor]
    """`<i>.value`, `<i>.step`, `<i>.exp_avg` and `<i>.exp_avg_sq` of the i-th trained parameter;
    the loop's own, not copies."""


def run_loop(
    parameters: Iterable[nn.Parameter],
    examples: Callable[[int], Sequence[Example]],
    loss_of: Callable[[list[Example]], Tensor],
    settings: LoopSettings,
    *,
    length_of: Callable[[Example], int] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    start: LoopState | None = None,
    on_state: Callable[[LoopState], None] | None = None,
) -> list[float]:
    """Train to the end and return the mean loss of each epoch; see `train_epochs`.

    Args:
        parameters: As there.
        examples: As there.
        loss_of: As there.
        settings: As there.
        length_of: As there.
        on_epoch: Called after each epoch with the number of epochs done and the epoch's mean loss.
        start: As there.
        on_state: As there.

    Raises:
        DivergenceError: A loss or a gradient was NaN or infinite.
    """
    history = [] if start is None else list(start.losses)
    epochs = train_epochs(
        parameters,
        examples,
        loss_of,
        settings,
        length_of=length_of,
        start=start,
        on_state=on_state,
    )
    for loss in epochs:
        history.append(loss)
        if on_epoch is not None:
            on_epoch(len(history), loss)
    return history


def train_epochs(
    parameters: Iterable[nn.Parameter],
    examples: Callable[[int], Sequence[Example]],
    loss_of: Callable[[list[Example]], Tensor],
    settings: LoopSettings,
    *,
    length_of: Callable[[Example], int] | None = None,
    start: LoopState | None = None,
    on_state: Callable[[LoopState], None] | None = None,
) -> Iterator[float]:
    """Train epoch by epoch, as far as it is driven; yield each epoch's mean loss.

    Modifies the parameters. `examples` is called at the beginning of every epoch, also of one that
    `start` has done, so that their order is the same.

    Args:
        parameters: What is trained; a parameter that wants no gradient is left out.
        examples: The examples of an epoch, counted from 0; the same each time, or fresh ones.
        loss_of: The loss of a batch, a scalar with a gradient.
        settings: How.
        length_of: Puts examples of like length into one batch, so that little is padded.
        start: Where an earlier loop with the same settings and examples ended.
        on_state: Called after each epoch with what is needed to go on from there.

    Raises:
        DivergenceError: A loss or a gradient was NaN or infinite.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = _optimizer(trained, settings)
    order = random.Random(settings.seed)  # noqa: S311  # shuffles, keeps no secret
    history = [] if start is None else _resume(start, trained, optimizer)
    done = len(history)
    for epoch in range(settings.epochs):
        batches = _batches(examples(epoch), settings.batch_size, order, length_of)
        if epoch < done:
            continue
        losses = []
        for index, batch in enumerate(batches):
            progress = (epoch + index / len(batches)) / settings.epochs
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * scheduled(progress, settings)
            losses.append(_step(trained, optimizer, loss_of(batch), settings, epoch))
        history.append(sum(losses) / len(losses))
        if on_state is not None:
            on_state(LoopState(tuple(history), _tensors(trained, optimizer)))
        yield history[-1]


def scheduled(progress: float, settings: LoopSettings) -> float:
    """Return the factor on the learning rate, 0 to 1.

    Args:
        progress: The share of the steps that are done, 0 up to 1.
        settings: Holds schedule and warm-up.
    """
    if progress < settings.warmup_share:
        return progress / settings.warmup_share
    left = (1 - progress) / (1 - settings.warmup_share)
    if settings.schedule == "constant":
        return 1.0
    return left if settings.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def _optimizer(trained: Sequence[nn.Parameter], settings: LoopSettings) -> torch.optim.AdamW:
    groups = [
        {
            "params": [parameter for parameter in trained if parameter.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [parameter for parameter in trained if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        fused=True,
    )


def _tensors(
    trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    tensors = {}
    for index, parameter in enumerate(trained):
        tensors[f"{index}.value"] = parameter.detach()
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{index}.{name}"] = value
    return tensors


def _resume(
    start: LoopState, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[float]:
    """Put parameters and moments where they were; return the losses so far."""
    for key, tensor in start.tensors.items():
        index, _, name = key.partition(".")
        parameter = trained[int(index)]
        if name == "value":
            with torch.no_grad():
                parameter.copy_(tensor)
        else:
            optimizer.state[parameter][name] = tensor.to(parameter.device, copy=True)
    return list(start.losses)


def _batches(
    examples: Sequence[Example],
    size: int,
    order: random.Random,
    length_of: Callable[[Example], int] | None,
) -> list[list[Example]]:
    rows = list(examples)
    if not rows:
        raise ValueError("an epoch without examples: there is nothing to train on")
    order.shuffle(rows)
    if length_of is not None:
        rows.sort(key=lambda row: length_of(row) + order.uniform(0, _LENGTH_JITTER))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    order.shuffle(batches)
    return batches


def _step(
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    settings: LoopSettings,
    epoch: int,
) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DivergenceError(f"the loss became {value} in epoch {epoch + 1}{_advice(settings)}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    norm = float(nn.utils.clip_grad_norm_(trained, limit))
    if not math.isfinite(norm):
        raise DivergenceError(f"a gradient became {norm} in epoch {epoch + 1}{_advice(settings)}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # not to be held while the model is evaluated
    return value


def _advice(settings: LoopSettings) -> str:
    return f" at learning rate {settings.learning_rate:g}: try a lower one"
