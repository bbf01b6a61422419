"""Fitting one down-projection so that forget tokens move by a shift and retain tokens stay.

Notation (LUNAR, arXiv 2502.07218, equation 4): h is the input of the down-projection
W₀ `[d_model, d_ff]`, targets are W₀h + shift for forget tokens and W₀h for the others. The gradient
of such a product is a product as well; autograd would compute the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim.adamw import adamw

from lunar_tune.errors import DivergenceError, InputError
from lunar_tune.methods.lunar.settings import LunarSettings
from lunar_tune.training.adapting import Factors

LEARNING_RATE_DECAY = 0.9  # per epoch, as published (run_lunar.py at dfa56eb)
# Standard deviation of a low-rank product's first factor (src/estimated_net_utils.py of the
# published code at dfa56eb, LUNAR_LoRA_net).
LOW_RANK_DEVIATION = 0.01
STEPS_AHEAD = 64  # whose targets are made together
PART = 2048  # rows or columns of H that are converted to float64 at a time

Weight = Float[Tensor, "d_model d_ff"]
BatchInputs = Float[Tensor, "batch d_ff"]
BatchOutputs = Float[Tensor, "batch d_model"]


@dataclass(frozen=True, slots=True)
class Solution:
    """A fitted down-projection."""

    weight: Weight
    losses: tuple[float, ...]
    """Mean squared error of each epoch (AdamW), or the one that remains (closed form)."""
    factors: Factors | None = None
    """The product that was added to W₀, before rounding to its number format; None where a whole
    matrix was trained."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is to be fitted."""

    weight: Weight  # W₀; it is not modified
    inputs: Float[Tensor, "nodes d_ff"]  # h at every distinct prefix
    nodes: Int[Tensor, " tokens"]  # each token's row of `inputs`
    is_forget: Bool[Tensor, " tokens"]  # which tokens are to be moved
    shift: Float[Tensor, " d_model"]  # by how much: c · r_l, coefficient and unlearning vector


class _Problem(ABC):
    """Least squares over tokens in `trained`, whose mean squared error has `gradient`."""

    def __init__(self, tokens: Tokens, trained: Float[Tensor, "rows columns"]) -> None:
        self.tokens, self.inputs, self.trained = tokens, tokens.inputs, trained
        self.nodes = tokens.nodes  # rows of `inputs`
        self.indicator = tokens.is_forget.to(trained)
        self.shift = tokens.shift.to(trained)
        self.gradient = torch.empty_like(trained)

    def targets(self, batch: Int[Tensor, " batch"]) -> BatchOutputs:
        """Return where the outputs of some tokens are to go."""
        return torch.outer(self.indicator[batch], self.shift)

    @abstractmethod
    def differentiate(self, h: BatchInputs, target: BatchOutputs) -> None:
        """Set `gradient` to the mean squared error's, and `target` to the error, up to its sign."""

    @abstractmethod
    def fitted(self) -> tuple[Weight, Factors | None]:
        """Return W₀ with what was trained, and the product that was added to it, if it is one."""


class _Difference(_Problem):
    """W − W₀ in float32, from zero: retain tokens start exactly on target. Held transposed."""

    def __init__(self, tokens: Tokens) -> None:
        shape, device = tokens.weight.T.shape, tokens.weight.device
        super().__init__(tokens, torch.zeros(shape, dtype=torch.float32, device=device))

    def differentiate(self, h: BatchInputs, target: BatchOutputs) -> None:
        error = target.addmm_(h, self.trained, beta=-1)
        scale = 2 / error.numel()
        torch.addmm(self.gradient, h.T, error, beta=0, alpha=scale, out=self.gradient)

    def fitted(self) -> tuple[Weight, Factors | None]:
        weight = self.tokens.weight
        return (weight.float() + self.trained.T).to(weight.dtype), None


class _Matrix(_Problem):
    """W itself in bfloat16, as published, optimiser state and all of h included; held transposed.

    Small updates are lost to rounding there, and most of the weight decay with them.
    """

    def __init__(self, tokens: Tokens) -> None:
        own, weight = torch.contiguous_format, tokens.weight.detach()
        super().__init__(tokens, weight.T.to(torch.bfloat16, copy=True, memory_format=own))
        # Of the fit's tokens alone: in 16 bits a product hangs on how many rows it has.
        used, self.nodes = tokens.nodes.unique(return_inverse=True)
        self.inputs = tokens.inputs[used].to(self.trained)
        self._originals = self.inputs @ self.trained

    def targets(self, batch: Int[Tensor, " batch"]) -> BatchOutputs:
        original = self._originals[self.nodes[batch]]
        return original.addr_(self.indicator[batch], self.shift)

    def differentiate(self, h: BatchInputs, target: BatchOutputs) -> None:
        error = torch.sub(h @ self.trained, target, out=target)  # rounded twice, as published
        torch.mm(h.T, error * (2 / error.numel()), out=self.gradient)

    def fitted(self) -> tuple[Weight, Factors | None]:
        dtype, own = self.tokens.weight.dtype, torch.contiguous_format
        return self.trained.T.to(dtype, memory_format=own), None


class _LowRank(_Problem):
    """B·A with W = W₀ + B·A, in float32; A and Bᵀ stand side by side in one matrix.

    A is drawn as published. B starts at zero, so that retain tokens start exactly on target; the
    published code draws it like A.
    """

    def __init__(self, tokens: Tokens, rank: int, seed: int) -> None:
        d_model, d_ff = tokens.weight.shape
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(rank, d_ff).normal_(std=LOW_RANK_DEVIATION, generator=generator)
        both = torch.cat([drawn, torch.zeros(rank, d_model)], dim=1)
        super().__init__(tokens, both.to(tokens.weight.device))
        self._first, self._second = self.trained[:, :d_ff], self.trained[:, d_ff:]  # A and Bᵀ

    def differentiate(self, h: BatchInputs, target: BatchOutputs) -> None:
        first, second = self._first, self._second
        inner = h @ first.T
        error = target.addmm_(inner, second, beta=-1)
        scaled = error * (2 / error.numel())
        d_ff = first.shape[1]
        self.gradient[:, :d_ff] = (scaled @ second.T).T @ h
        self.gradient[:, d_ff:] = inner.T @ scaled

    def fitted(self) -> tuple[Weight, Factors | None]:
        weight = self.tokens.weight
        factors = Factors(first=self._first.clone(), second=self._second.T.clone())
        fitted = torch.addmm(weight.float(), self._second.T, self._first)
        return fitted.to(weight.dtype), factors


def solve_adamw(
    tokens: Tokens, *, learning_rate: float, settings: LunarSettings, seed: int
) -> Solution:
    """Fit by AdamW on the mean squared error over shuffled batches of tokens.

    All of the matrix is trained (adamw) or a product of low rank that is added to W₀ (lora). The
    learning rate is the first epoch's; each later one has 0.9 of the one before. A loss or a matrix
    that becomes NaN or infinite raises a DivergenceError.
    """
    kind = _Matrix if settings.master_dtype == "bfloat16" else _Difference
    is_product = settings.solver == "lora"
    problem = _LowRank(tokens, settings.rank, seed) if is_product else kind(tokens)
    with _tensor_cores(tokens.inputs):
        losses = _train(problem, learning_rate, settings=settings, seed=seed)
    weight, factors = problem.fitted()
    return Solution(weight=_finite(weight), losses=losses, factors=factors)


def _train(
    problem: _Problem, learning_rate: float, *, settings: LunarSettings, seed: int
) -> tuple[float, ...]:
    """Minimise the mean squared error in place; return each epoch's mean loss."""
    tokens, size = problem.nodes, settings.batch_size
    step = _adamw(problem, settings.decay)
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
                step(learning_rate)
            squares.append(targets.float().square_().mean(1))  # they hold the errors now
        of_steps = [batch.mean() for batch in torch.cat(squares).split(size)]
        loss = float(torch.stack(of_steps).mean())
        if not math.isfinite(loss):
            raise DivergenceError(
                f"the loss became {loss} in epoch {epoch + 1} of {settings.epochs}: the learning "
                "rate is too high for these activations."
            )
        losses.append(loss)
        learning_rate *= LEARNING_RATE_DECAY
    return tuple(losses)


def _adamw(problem: _Problem, weight_decay: float) -> Callable[[float], None]:
    """Return torch's AdamW on what is trained: a function that takes a step at a learning rate.

    A `torch.optim.Optimizer` costs 60 µs of Python a step, as much as a small model's arithmetic.
    """
    # In bfloat16 the plain optimiser rounds after every one of its operations, as published;
    # the fused one computes a step in float32 and rounds once, which unlearns more.
    trained = problem.trained
    fused = trained.dtype == torch.float32
    steps = torch.zeros((), device=trained.device if fused else "cpu")
    moments = [torch.zeros_like(trained)], [torch.zeros_like(trained)]
    update = partial(
        torch._fused_adamw_ if fused else partial(adamw, foreach=False, fused=False),
        *([trained], [problem.gradient], *moments, list[Tensor](), [steps]),
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        weight_decay=weight_decay,
        eps=1e-8,
        maximize=False,
    )

    def step(learning_rate: float) -> None:
        if fused:  # the kernel alone does not count
            steps.add_(1)
        update(lr=learning_rate)

    return step


@contextmanager
def _tensor_cores(inputs: Float[Tensor, "nodes d_ff"]) -> Iterator[None]:
    """Inside, float32 products of 16-bit activations may run on a GPU's tensor cores (TF32).

    TF32 keeps 10 bits of a factor's mantissa: a 16-bit activation passes whole, the matrix and the
    error are rounded to 2⁻¹¹, and the result to the model's 16 bits in the end.
    """
    allowed = torch.backends.cuda.matmul.allow_tf32
    if inputs.device.type == "cuda" and inputs.dtype != torch.float32:
        torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _finite(weight: Weight) -> Weight:
    """Return the matrix; the last step's loss is never taken, and a number format has an end."""
    if not bool(weight.isfinite().all()):
        raise DivergenceError(
            f"the fitted matrix became NaN or infinite in {weight.dtype}: the learning rate or "
            "the coefficient is too high."
        )
    return weight


@dataclass(frozen=True, slots=True)
class RidgeSolution:
    """What the closed form needs of the tokens, whatever coefficient and unlearning vector are."""

    coefficients: Float[Tensor, " d_ff"]  # v, in float64
    error: float  # mean over the tokens of the squared difference between v·h and 1_forget


def solve_ridge(
    inputs: Float[Tensor, "tokens d_ff"], is_forget: Bool[Tensor, " tokens"], *, ridge: float
) -> RidgeSolution:
    """Solve v = (HᵀH + λI)⁻¹Hᵀ1_forget with λ = ridge · tr(HᵀH)/d_ff, in float64.

    With fewer tokens than features the same v is found in token space, v = Hᵀ(HHᵀ + λI)⁻¹1_forget.
    Only one square matrix is held in float64; H is converted a part at a time. A system that cannot
    be solved in float64 raises a DivergenceError.
    """
    if not 0 < ridge < math.inf:
        raise InputError(f"ridge {ridge}: must be a positive number.")
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
    values = indicator if in_features else torch.cholesky_solve(indicator[:, None], gram)[:, 0]
    v = torch.cat([part.double().T @ values for part in inputs.split(PART, dim=1)])  # Hᵀ·values
    if in_features:
        v = torch.cholesky_solve(v[:, None], gram)[:, 0]
    said = torch.cat([part.double() @ v for part in inputs.split(PART)])
    return RidgeSolution(coefficients=v, error=float((said - indicator).square().mean()))


def solve_closed_form(
    weight: Weight, shift: Float[Tensor, " d_model"], solved: RidgeSolution
) -> Solution:
    """Return W₀ + shift·vᵀ, the minimum of the ridge objective: a rank-one edit."""
    v = solved.coefficients
    shift64 = shift.to(v)
    fitted = torch.addr(weight.double(), shift64, v).to(weight.dtype)
    loss = solved.error * float(shift64.square().mean())
    factors = Factors(first=v[None], second=shift64[:, None])
    return Solution(weight=_finite(fitted), losses=(loss,), factors=factors)
