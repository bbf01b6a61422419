"""What an iterative solver trains: three ways to write the fitted down-projection.

Notation (LUNAR, arXiv 2502.07218, equation 4): h is the input of the down-projection
W₀ `[d_model, d_ff]`, targets are W₀h + shift for forget tokens and W₀h for the others. The gradient
of such a product is a product as well; autograd would compute the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Difference", "LowRank", "Matrix", "Problem", "Tokens"]

# Standard deviation of a low-rank product's first factor (src/estimated_net_utils.py of the
# published code at dfa56eb, LUNAR_LoRA_net).
LOW_RANK_DEVIATION = 0.01


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is to be fitted."""

    weight: Float[Tensor, "d_model d_ff"]
    """W₀."""
    inputs: Float[Tensor, "nodes d_ff"]
    """h at every distinct prefix."""
    is_forget: Bool[Tensor, " tokens"]
    """Which tokens are to be moved."""
    shift: Float[Tensor, " d_model"]
    """By how much."""
    nodes: Int[Tensor, " tokens"]
    """Each token's row of `inputs`."""


class Problem(ABC):
    """Least squares over tokens in `trained`, whose mean squared error has `gradient`."""

    def __init__(self, tokens: Tokens, trained: Float[Tensor, "rows columns"]) -> None:
        self.tokens, self.trained = tokens, trained
        self.inputs = tokens.inputs.to(trained) if self.rounds_inputs else tokens.inputs
        self.indicator = tokens.is_forget.to(trained)
        self.shift = tokens.shift.to(trained)
        self.gradient = torch.empty_like(trained)

    rounds_inputs = False
    """Whether all of h is held in the number format of what is trained."""

    def targets(self, batch: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
        """Return where the outputs of some tokens are to go."""
        return torch.outer(self.indicator[batch], self.shift)

    @abstractmethod
    def differentiate(
        self, h: Float[Tensor, "batch d_ff"], target: Float[Tensor, "batch d_model"]
    ) -> None:
        """Set `gradient` to the mean squared error's, and `target` to the error, up to its sign."""

    @abstractmethod
    def fitted(self) -> Float[Tensor, "d_model d_ff"]:
        """Return the down-projection."""


class Difference(Problem):
    """W less W₀ in float32, from zero, so that retain tokens start exactly on target.

    Held transposed, where its products are fastest.
    """

    def __init__(self, tokens: Tokens) -> None:
        weight = tokens.weight
        super().__init__(
            tokens, torch.zeros(weight.T.shape, dtype=torch.float32, device=weight.device)
        )

    def differentiate(
        self, h: Float[Tensor, "batch d_ff"], target: Float[Tensor, "batch d_model"]
    ) -> None:
        """Set the gradient; see `Problem`."""
        error = target.addmm_(h, self.trained, beta=-1)
        scale = 2 / error.numel()
        torch.addmm(self.gradient, h.T, error, beta=0, alpha=scale, out=self.gradient)

    def fitted(self) -> Float[Tensor, "d_model d_ff"]:
        """Return W₀ with what was trained."""
        weight = self.tokens.weight
        return (weight.float() + self.trained.T).to(weight.dtype)


class Matrix(Problem):
    """W itself in bfloat16, as published, optimiser state included; held transposed.

    Small updates are lost to rounding there, and most of the weight decay with them.
    """

    rounds_inputs = True

    def __init__(self, tokens: Tokens) -> None:
        own = torch.contiguous_format
        weight = tokens.weight.detach()
        super().__init__(tokens, weight.T.to(torch.bfloat16, copy=True, memory_format=own))
        self._originals = self.inputs @ self.trained

    def targets(self, batch: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
        """Return where W₀ takes some tokens, moved where they are to be."""
        original = self._originals[self.tokens.nodes[batch]]
        return original.addr_(self.indicator[batch], self.shift)

    def differentiate(
        self, h: Float[Tensor, "batch d_ff"], target: Float[Tensor, "batch d_model"]
    ) -> None:
        """Set the gradient; see `Problem`."""
        error = torch.sub(h @ self.trained, target, out=target)  # rounded twice, as published
        torch.mm(h.T, error * (2 / error.numel()), out=self.gradient)

    def fitted(self) -> Float[Tensor, "d_model d_ff"]:
        """Return W₀ with what was trained."""
        return self.trained.T.to(self.tokens.weight.dtype, memory_format=torch.contiguous_format)


class LowRank(Problem):
    """B·A with W = W₀ + B·A, in float32; A and Bᵀ stand side by side in one matrix.

    A is drawn as published. B starts at zero, so that retain tokens start exactly on target; the
    published code draws it like A.

    Args:
        tokens: What is to be fitted.
        rank: Of the product.
        seed: Of A.
    """

    def __init__(self, tokens: Tokens, *, rank: int, seed: int) -> None:
        d_model, self._d_ff = tokens.weight.shape
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(rank, self._d_ff).normal_(std=LOW_RANK_DEVIATION, generator=generator)
        both = torch.cat([drawn, torch.zeros(rank, d_model)], dim=1)
        super().__init__(tokens, both.to(tokens.weight.device))

    @property
    def factors(self) -> tuple[Float[Tensor, "rank d_ff"], Float[Tensor, "rank d_model"]]:
        """A and Bᵀ."""
        return self.trained[:, : self._d_ff], self.trained[:, self._d_ff :]

    def differentiate(
        self, h: Float[Tensor, "batch d_ff"], target: Float[Tensor, "batch d_model"]
    ) -> None:
        """Set the gradient; see `Problem`."""
        first, second = self.factors
        inner = h @ first.T
        error = target.addmm_(inner, second, beta=-1)
        scaled = error * (2 / error.numel())
        self.gradient[:, : self._d_ff] = (scaled @ second.T).T @ h
        self.gradient[:, self._d_ff :] = inner.T @ scaled

    def fitted(self) -> Float[Tensor, "d_model d_ff"]:
        """Return W₀ with what was trained."""
        first, second = self.factors
        weight = self.tokens.weight
        return torch.addmm(weight.float(), second.T, first).to(weight.dtype)
