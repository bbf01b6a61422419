"""Fitting one down-projection so that forget tokens move by a shift and retain tokens stay.

Notation (LUNAR, arXiv 2502.07218, equation 4): h is the input of the down-projection
W₀ `[d_model, d_ff]`, targets are W₀h + shift for forget tokens and W₀h for the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim.adamw import adamw

from lunar_tune.errors import DivergenceError, InputError
from lunar_tune.methods.lunar.lunar_settings import LunarSettings
from lunar_tune.methods.lunar.problems import Difference, LowRank, Matrix, Problem, Tokens

__all__ = [
    "RidgeSolution",
    "Solution",
    "solve_adamw",
    "solve_closed_form",
    "solve_ridge",
]

LEARNING_RATE_DECAY = 0.9  # per epoch, as published (run_lunar.py at dfa56eb)
STEPS_AHEAD = 64  # whose targets are made together
PART = 2048  # rows or columns of H that are converted to float64 at a time


@dataclass(frozen=True, slots=True)
class Solution:
    """A fitted down-projection."""

    weight: Float[Tensor, "d_model d_ff"]
    losses: tuple[float, ...] = field(default=())
    """Mean squared error of each epoch (AdamW), or the one that remains (closed form)."""
    factors: tuple[Float[Tensor, "rank d_ff"], Float[Tensor, "d_model rank"]] | None = None
    """A and B where the fitted matrix is W₀ + B·A, rounded to its number format; None otherwise."""


def solve_adamw(
    weight: Float[Tensor, "d_model d_ff"],
    inputs: Float[Tensor, "nodes d_ff"],
    is_forget: Bool[Tensor, " tokens"],
    shift: Float[Tensor, " d_model"],
    *,
    learning_rate: float,
    settings: LunarSettings,
    seed: int,
    tokens: Int[Tensor, " tokens"] | None = None,
    rank: int | None = None,
) -> Solution:
    """Fit by AdamW on the mean squared error over shuffled batches of tokens.

    Args:
        weight: The original matrix W₀; not modified.
        inputs: h at every distinct prefix.
        is_forget: Which tokens are to be moved.
        shift: By how much: coefficient × unlearning vector.
        learning_rate: Of the first epoch; each later one has 0.9 of the one before.
        settings: Epochs, batch size, number format.
        seed: Of the batch order, and of a low-rank product's start.
        tokens: Each token's row of `inputs`; None where the rows are the tokens.
        rank: Of the product that is added to W₀; None trains all of the matrix.

    Raises:
        DivergenceError: The loss or the matrix became NaN or infinite.
    """
    if tokens is None:
        tokens = torch.arange(len(inputs), device=inputs.device)
    given = Tokens(weight, inputs, is_forget, shift, tokens)
    problem: Problem
    if rank is not None:
        problem = LowRank(given, rank=rank, seed=seed)
    else:
        problem = (Matrix if settings.master_dtype == "bfloat16" else Difference)(given)
    with _tensor_cores(inputs):
        losses = _train(problem, learning_rate, settings=settings, seed=seed)
    factors = None
    if isinstance(problem, LowRank):
        first, second = problem.factors
        factors = first.clone(), second.T.clone()
    return Solution(weight=_finite(problem.fitted()), losses=losses, factors=factors)


def _train(
    problem: Problem, learning_rate: float, *, settings: LunarSettings, seed: int
) -> tuple[float, ...]:
    """Minimise the mean squared error in place; return each epoch's mean loss.

    Nothing waits for the device between one epoch's end and the next.
    """
    tokens, size = problem.tokens.nodes, settings.batch_size
    update = _AdamW(problem.trained, problem.gradient, weight_decay=settings.decay)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(settings.epochs):
        order = torch.randperm(len(tokens), generator=generator).to(tokens.device)
        squares = []
        for group in order.split(size * STEPS_AHEAD):
            targets = problem.targets(group)
            for nodes, target in zip(tokens[group].split(size), targets.split(size), strict=True):
                h = problem.inputs.index_select(0, nodes).to(problem.trained.dtype)
                problem.differentiate(h, target)
                update.step(learning_rate)
            squares.append(targets.float().square_().mean(1))  # they hold the errors now
        of_steps = [batch.mean() for batch in torch.cat(squares).split(size)]
        losses.append(_checked(float(torch.stack(of_steps).mean()), epoch, settings.epochs))
        learning_rate *= LEARNING_RATE_DECAY
    return tuple(losses)


class _AdamW:
    """torch's AdamW on one tensor, without the bookkeeping of a `torch.optim.Optimizer`.

    Its step costs 60 µs of Python there, as much as a small model's arithmetic.
    """

    def __init__(
        self,
        trained: Float[Tensor, "rows columns"],
        gradient: Float[Tensor, "rows columns"],
        *,
        weight_decay: float,
    ) -> None:
        # In bfloat16 the plain optimiser rounds after every one of its operations, as published;
        # the fused one computes a step in float32 and rounds once, which unlearns more.
        self._fused = trained.dtype == torch.float32
        steps = torch.zeros((), device=trained.device if self._fused else "cpu")
        self._state = (
            [trained],
            [gradient],
            [torch.zeros_like(trained)],
            [torch.zeros_like(trained)],
            list[Tensor](),
            [steps],
        )
        self._steps = steps
        self._constants: dict[str, Any] = {
            "amsgrad": False,
            "beta1": 0.9,
            "beta2": 0.999,
            "weight_decay": weight_decay,
            "eps": 1e-8,
            "maximize": False,
        }

    def step(self, learning_rate: float) -> None:
        """Take one step along the gradient."""
        if self._fused:  # the kernel alone; what torch.optim puts around it is a tenth of a step
            self._steps += 1
            torch._fused_adamw_(*self._state, lr=learning_rate, **self._constants)
        else:
            adamw(*self._state, foreach=False, fused=False, lr=learning_rate, **self._constants)


@contextmanager
def _tensor_cores(inputs: Float[Tensor, "nodes d_ff"]) -> Iterator[None]:
    """Inside, float32 products of 16-bit activations may run on a GPU's tensor cores (TF32).

    TF32 keeps 10 bits of a factor's mantissa: a 16-bit activation passes whole, the matrix and the
    error are rounded to 2⁻¹¹. The result is rounded to the model's 16 bits in the end. Products of
    float32 activations stay in float32.
    """
    allowed = torch.backends.cuda.matmul.allow_tf32
    if inputs.device.type == "cuda" and inputs.dtype != torch.float32:
        torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


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


@dataclass(frozen=True, slots=True)
class RidgeSolution:
    """What the closed form needs of the tokens: it serves every coefficient and direction."""

    coefficients: Float[Tensor, " d_ff"]
    """v, in float64."""
    error: float
    """Mean over the tokens of the squared difference between v·h and 1_forget."""


def solve_ridge(
    inputs: Float[Tensor, "tokens d_ff"],
    is_forget: Bool[Tensor, " tokens"],
    *,
    ridge: float,
) -> RidgeSolution:
    """Solve v = (HᵀH + λI)⁻¹Hᵀ1_forget with λ = ridge · tr(HᵀH)/d_ff, in float64.

    It depends neither on the coefficient nor on the unlearning vector. With fewer tokens than
    features the same v is found in token space, v = Hᵀ(HHᵀ + λI)⁻¹1_forget. Only one square matrix
    is held in float64; H is converted a part at a time.

    Raises:
        InputError: `ridge` is not positive.
        DivergenceError: The system cannot be solved in float64.
    """
    if not 0 < ridge < math.inf:
        raise InputError(f"ridge {ridge}: a positive number.")
    tokens, d_ff = inputs.shape
    in_features = tokens >= d_ff
    indicator = is_forget.to(torch.float64)
    size = min(tokens, d_ff)
    gram = torch.zeros((size, size), dtype=torch.float64, device=inputs.device)
    for part in inputs.split(PART, dim=0 if in_features else 1):
        h = part.double()
        gram.addmm_(*((h.T, h) if in_features else (h, h.T)))
    gram.diagonal().add_(ridge * gram.trace() / d_ff)  # both Gram matrices have one trace
    info = torch.zeros((), dtype=torch.int32, device=inputs.device)
    torch.linalg.cholesky_ex(gram, out=(gram, info))
    if int(info) != 0:
        raise DivergenceError(f"ridge {ridge} is too small: the normal equations are singular.")
    if in_features:
        v = torch.cholesky_solve(_transposed_times(inputs, indicator)[:, None], gram)[:, 0]
    else:
        v = _transposed_times(inputs, torch.cholesky_solve(indicator[:, None], gram)[:, 0])
    said = torch.cat([part.double() @ v for part in inputs.split(PART)])
    return RidgeSolution(coefficients=v, error=float((said - indicator).square().mean()))


def _transposed_times(
    inputs: Float[Tensor, "tokens d_ff"], values: Float[Tensor, " tokens"]
) -> Float[Tensor, " d_ff"]:
    """Return Hᵀ·values in float64, a part of the features at a time."""
    return torch.cat([part.double().T @ values for part in inputs.split(PART, dim=1)])


def solve_closed_form(
    weight: Float[Tensor, "d_model d_ff"],
    shift: Float[Tensor, " d_model"],
    solved: RidgeSolution,
) -> Solution:
    """Return W₀ + shift·vᵀ, the minimum of the ridge objective: a rank-one edit.

    Args:
        weight: The original matrix W₀; not modified.
        shift: How far the tokens to forget move: coefficient × unlearning vector.
        solved: From `solve_ridge`.

    Raises:
        DivergenceError: The matrix is NaN or infinite in its number format.
    """
    v = solved.coefficients
    shift64 = shift.to(v)
    fitted = torch.addr(weight.double(), shift64, v).to(weight.dtype)
    loss = solved.error * float(shift64.square().mean())
    factors = v[None], shift64[:, None]
    return Solution(weight=_finite(fitted), losses=(loss,), factors=factors)
