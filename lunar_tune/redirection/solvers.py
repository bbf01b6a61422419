"""Fitting one down-projection so that forget tokens move by a shift and retain tokens stay.

Covers: AdamW as published (batches of 64 tokens, learning rate decaying by 0.9 an epoch) with an
fp32 master of the difference or on a bfloat16 matrix; the closed-form ridge solution, in the
space of features or of tokens.
Does not cover: which tokens count as forget or retain (`methods.lunar`), the edit (`editing`).

Notation (LUNAR, arXiv 2502.07218, equation 4): h is the input of the down-projection
W₀ `[d_model, d_ff]`, targets are W₀h + shift for forget tokens and W₀h for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from lunar_tune.errors import DivergenceError, InputError
from lunar_tune.redirection.settings import AdamWSettings

__all__ = [
    "Solution",
    "ridge_coefficients",
    "solve_adamw",
    "solve_closed_form",
]

LEARNING_RATE_DECAY = 0.9  # per epoch, as published (run_lunar.py at dfa56eb)


@dataclass(frozen=True, slots=True)
class Solution:
    """A fitted down-projection."""

    weight: Float[Tensor, "d_model d_ff"]
    losses: tuple[float, ...] = field(default=())
    """Mean squared error of each epoch (AdamW), or the one that remains (closed form)."""


def solve_adamw(
    weight: Float[Tensor, "d_model d_ff"],
    inputs: Float[Tensor, "tokens d_ff"],
    is_forget: Bool[Tensor, " tokens"],
    shift: Float[Tensor, " d_model"],
    *,
    learning_rate: float,
    settings: AdamWSettings,
    seed: int,
) -> Solution:
    """Fit by AdamW on the mean squared error over shuffled batches of tokens.

    Args:
        weight: The original matrix W₀; not modified.
        inputs: h at every token.
        is_forget: Which tokens are to be moved.
        shift: By how much: coefficient × unlearning vector.
        learning_rate: Of the first epoch; each later one has 0.9 of the one before.
        settings: Epochs, batch size, number format.
        seed: Of the batch order.

    Raises:
        DivergenceError: The loss or the matrix became NaN or infinite.
    """
    if settings.master_dtype == "bfloat16":
        # As published: W itself is trained in bfloat16, optimiser state included. Small updates
        # are lost to rounding there, and most of the weight decay with them.
        trained = weight.detach().to(torch.bfloat16, copy=True)
        inputs = inputs.to(torch.bfloat16)
        targets = linear(inputs, trained)
        targets[is_forget] += shift.to(targets)
        losses = _train(
            trained, inputs, targets.__getitem__, learning_rate, settings=settings, seed=seed
        )
        return Solution(weight=_finite(trained.to(weight.dtype)), losses=losses)
    # W − W₀ is trained in float32 from zero, so that retain tokens start exactly on target.
    difference = torch.zeros_like(weight, dtype=torch.float32)
    target = shift.to(difference)
    losses = _train(
        difference,
        inputs,
        lambda batch: is_forget[batch, None] * target,
        learning_rate,
        settings=settings,
        seed=seed,
    )
    return Solution(weight=_finite((weight.float() + difference).to(weight.dtype)), losses=losses)


def _train(
    trained: Float[Tensor, "d_model d_ff"],
    inputs: Float[Tensor, "tokens d_ff"],
    targets_of: Callable[[Tensor], Tensor],
    learning_rate: float,
    *,
    settings: AdamWSettings,
    seed: int,
) -> tuple[float, ...]:
    """Minimise the mean squared error of `trained` in place; return each epoch's mean loss.

    The gradient of this one product is written out; autograd would compute the same.
    """
    trained.grad = torch.empty_like(trained)
    # In bfloat16 the plain optimiser rounds after every one of its operations, as published; the
    # fused one computes a step in float32 and rounds once, which unlearns more.
    fused = trained.dtype == torch.float32
    optimizer = torch.optim.AdamW(
        [trained], lr=learning_rate, weight_decay=settings.decay, fused=fused
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=LEARNING_RATE_DECAY)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(settings.epochs):
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        batch_losses = []
        for batch in order.split(settings.batch_size):
            h = inputs[batch].to(trained.dtype)
            error = linear(h, trained) - targets_of(batch)
            torch.mm(error.T * (2 / error.numel()), h, out=trained.grad)
            optimizer.step()
            batch_losses.append(error.float().square().mean())
        losses.append(_checked(float(torch.stack(batch_losses).mean()), epoch, settings.epochs))
        schedule.step()
    return tuple(losses)


def _checked(loss: float, epoch: int, epochs: int) -> float:
    if not math.isfinite(loss):
        raise DivergenceError(
            f"the loss became {loss} in epoch {epoch + 1} of {epochs}: the learning rate is too "
            "high for these activations."
        )
    return loss


def _finite(weight: Float[Tensor, "d_model d_ff"]) -> Float[Tensor, "d_model d_ff"]:
    """Return the matrix; the last step's loss is never taken, and a number format has an end."""
    if not bool(weight.isfinite().all()):
        raise DivergenceError(
            f"the fitted matrix became NaN or infinite in {weight.dtype}: the learning rate or "
            "the coefficient is too high."
        )
    return weight


def ridge_coefficients(
    inputs: Float[Tensor, "tokens d_ff"],
    is_forget: Bool[Tensor, " tokens"],
    *,
    ridge: float,
) -> Float[Tensor, " d_ff"]:
    """Return v = (HᵀH + λI)⁻¹Hᵀ1_forget with λ = ridge · tr(HᵀH)/d_ff, in float64.

    It depends neither on the coefficient nor on the unlearning vector. With fewer tokens than
    features the same v is found in token space, v = Hᵀ(HHᵀ + λI)⁻¹1_forget.

    Raises:
        InputError: `ridge` is not positive.
        DivergenceError: The system cannot be solved in float64.
    """
    if not 0 < ridge < math.inf:
        raise InputError(f"--ridge {ridge}: a positive number.")
    h = inputs.double()
    tokens, d_ff = h.shape
    indicator = is_forget.to(h)
    strength = ridge * h.square().sum() / d_ff
    gram = h.T @ h if tokens >= d_ff else h @ h.T
    gram.diagonal().add_(strength)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        raise DivergenceError(f"ridge {ridge} is too small: the normal equations are singular.")
    if tokens >= d_ff:
        return torch.cholesky_solve((h.T @ indicator)[:, None], factor)[:, 0]
    return h.T @ torch.cholesky_solve(indicator[:, None], factor)[:, 0]


def solve_closed_form(
    weight: Float[Tensor, "d_model d_ff"],
    inputs: Float[Tensor, "tokens d_ff"],
    is_forget: Bool[Tensor, " tokens"],
    shift: Float[Tensor, " d_model"],
    coefficients: Float[Tensor, " d_ff"],
) -> Solution:
    """Return W₀ + shift·vᵀ, the minimum of the ridge objective: a rank-one edit.

    Args:
        weight: The original matrix W₀; not modified.
        inputs: h at every token; for the error that remains.
        is_forget: Which tokens are to be moved.
        shift: By how much: coefficient × unlearning vector.
        coefficients: v, from `ridge_coefficients`.

    Raises:
        DivergenceError: The matrix is NaN or infinite in its number format.
    """
    v = coefficients.to(torch.float64)
    shift64 = shift.to(v)
    solved = (weight.double() + torch.outer(shift64, v)).to(weight.dtype)
    share = inputs.double() @ v - is_forget.to(v)
    loss = float(share.square().mean() * shift64.square().mean())
    return Solution(weight=_finite(solved), losses=(loss,))
