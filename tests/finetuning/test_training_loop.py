"""The gradient loop: what it minimises, how its rate moves, when it stops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lunar_tune.errors import DivergenceError
from lunar_tune.training.gradient_loop import LoopSettings, LoopState, scheduled, train_epochs


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda w: w.sum() + math.nan, r"epoch 1 at learning rate 0\.1"),
        (lambda w: w.sqrt().sum(), "gradient"),  # d sqrt(w) at 0 is infinite
    ],
)
def test_what_is_no_number_ends_it(loss: Callable[[Tensor], Tensor], message: str) -> None:
    weight = nn.Parameter(torch.zeros(1, 1))
    settings = LoopSettings(epochs=1, batch_size=1, learning_rate=0.1)
    with pytest.raises(DivergenceError, match=message):
        next(train_epochs([weight], lambda _: [0], lambda _: loss(weight), settings))
    assert weight.item() == 0.0


def test_the_rate_follows_the_schedule() -> None:
    """Half of a warm-up of a tenth; half of the way from there to the end; the end."""
    for schedule in ("linear", "cosine"):
        settings = LoopSettings(
            epochs=1, batch_size=1, learning_rate=1.0, schedule=schedule, warmup_share=0.1
        )
        for progress, factor in ((0.05, 0.5), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0)):
            assert scheduled(progress, settings) == pytest.approx(factor)


def test_a_loop_goes_on_from_a_state_as_if_it_had_not_stopped() -> None:
    """A bias, a matrix and one that never sees a gradient; ten examples in another order each."""
    settings = LoopSettings(epochs=5, batch_size=3, learning_rate=0.1, schedule="cosine", seed=3)
    numbers = [float(n) for n in range(10)]

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

        epochs = train_epochs(
            parameters, lambda _: numbers, loss_of, settings, start=start, on_state=on_state
        )
        losses = [*(start.losses if start is not None else ()), *epochs]
        return [parameter.detach() for parameter in parameters], losses

    states: list[LoopState] = []
    whole, losses = trained(None, states)
    assert [len(state.losses) for state in states] == [1, 2, 3, 4, 5]
    for state in states:
        resumed, again = trained(state, [])
        assert again == losses
        assert all(torch.equal(*pair) for pair in zip(resumed, whole, strict=True))
