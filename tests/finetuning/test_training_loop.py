"""The gradient loop: what it minimises, how its rate moves, when it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lunar_tune.errors import DivergenceError
from lunar_tune.training import TrainingSettings
from lunar_tune.training.gradient_loop import LoopState, scheduled, train_epochs


def train(
    parameters: Sequence[nn.Parameter], loss_of: Callable[..., Tensor], *, size: int, **options: Any
) -> Iterator[float]:
    """Train on the numbers from 0 to 9 at a rate of .1."""
    settings = TrainingSettings(epochs=5, batch_size=size, weight_decay=0.0)
    numbers, model = [float(n) for n in range(10)], nn.ParameterList(parameters)
    return train_epochs(model, lambda _: numbers, loss_of, settings, learning_rate=0.1, **options)


def test_every_example_is_seen_once_an_epoch() -> None:
    weight, seen = nn.Parameter(torch.zeros(1, 1)), []

    def loss_of(batch: list[int]) -> Tensor:
        seen.extend(batch)
        return weight.sum()

    assert len(list(train([weight], loss_of, size=4, length_of=int))) == 5
    assert [sorted(seen[i : i + 10]) for i in range(0, 50, 10)] == [[*range(10)]] * 5


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda w: w.sum() + math.nan, r"epoch 1 at learning rate 0\.1"),
        (lambda w: w.sum() + math.inf, r"epoch 1 at learning rate 0\.1"),
        (lambda w: w.sqrt().sum(), "gradient"),  # d sqrt(w) at 0 is infinite
    ],
)
def test_what_is_no_number_ends_it_before_a_weight_changes(
    loss: Callable[[Tensor], Tensor], message: str
) -> None:
    weight = nn.Parameter(torch.zeros(1, 1))
    with pytest.raises(DivergenceError, match=message):
        next(train([weight], lambda _: loss(weight), size=1))
    assert weight.item() == 0.0


@pytest.mark.parametrize(
    ("cosine", "progress", "factor"),
    [
        (False, 0.05, 0.5),  # half of a warm-up of a tenth
        (False, 0.55, 0.5),  # half of the way from .1 to 1
        (True, 0.1, 1.0),
        (True, 0.55, 0.5),
        (True, 1.0, 0.0),
    ],
)
def test_the_rate_follows_the_schedule(cosine: bool, progress: float, factor: float) -> None:
    assert scheduled(progress, warmup_share=0.1, cosine=cosine) == pytest.approx(factor)


def test_a_loop_goes_on_from_a_state_as_if_it_had_not_stopped() -> None:
    """A bias, a matrix and one that never sees a gradient; ten examples in another order each."""

    def trained(
        start: LoopState | None, states: list[LoopState]
    ) -> tuple[list[Tensor], list[float]]:
        parameters = [nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (3,))]

        def loss_of(batch: list[float]) -> Tensor:
            product = parameters[0] @ torch.tensor([batch[0], 1.0]) + parameters[1]
            return ((product - batch[-1]) ** 2).sum()

        def on_state(state: LoopState) -> None:
            copied = {name: tensor.clone() for name, tensor in state.tensors.items()}
            states.append(LoopState(state.losses, copied))

        own: dict[str, Any] = {"seed": 3, "cosine": True, "start": start, "on_state": on_state}
        epochs = train(parameters, loss_of, size=3, **own)
        losses = [*(start.losses if start is not None else ()), *epochs]
        return [parameter.detach() for parameter in parameters], losses

    states: list[LoopState] = []
    whole, losses = trained(None, states)
    assert [len(state.losses) for state in states] == [1, 2, 3, 4, 5]
    for state in states:
        resumed, again = trained(state, [])
        assert again == losses
        assert all(torch.equal(*pair) for pair in zip(resumed, whole, strict=True))
