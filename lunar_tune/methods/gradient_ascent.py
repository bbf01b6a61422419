"""Gradient ascent (Jang et al., arXiv 2210.01504)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lunar_tune.methods.gradient import GradientMethod, Step

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["ENTRY", "gradient_ascent"]


def gradient_ascent(forget: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Return the mean log π of the tokens to forget: the negative of the usual loss.

    Source: Jang et al., arXiv 2210.01504; TOFU, arXiv 2401.06121, section 3.3.
    It has no lower bound, so training has to stop in time.
    """
    return forget.mean()


class GradientAscent(GradientMethod):
    """Gradient ascent on the answers to forget."""

    name = "ga"

    def loss(self, step: Step) -> Tensor:
        """See `GradientMethod`."""
        return gradient_ascent(step.forget.tokens)


ENTRY = GradientAscent
