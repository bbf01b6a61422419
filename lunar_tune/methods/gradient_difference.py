"""Gradient difference (Liu et al., arXiv 2203.12817)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lunar_tune.methods.gradient import GradientMethod, Step

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["ENTRY", "gradient_difference"]


def gradient_difference(
    forget: Float[Tensor, " forget_tokens"], retain: Float[Tensor, " retain_tokens"]
) -> Float[Tensor, ""]:
    """Return gradient ascent on the tokens to forget and the usual loss on those to keep.

    Source: Liu et al., arXiv 2203.12817; TOFU, arXiv 2401.06121, section 3.3, with equal weights.
    """
    return forget.mean() - retain.mean()


class GradientDifference(GradientMethod):
    """Gradient ascent, with the usual loss on answers to keep."""

    name = "gd"
    keeps = True

    def loss(self, step: Step) -> Tensor:
        """See `GradientMethod`."""
        return gradient_difference(step.forget.tokens, step.retain.tokens)


ENTRY = GradientDifference
