"""Negative preference optimisation without a reference: SimNPO (Fan et al., arXiv 2410.07163)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lunar_tune.methods.gradient import GradientMethod, Step

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["ENTRY", "simnpo"]

BETA = 2.5  # it multiplies a mean over tokens, and 0.1 would hardly ever count less


def simnpo(
    forget: Float[Tensor, " answers"],
    lengths: Float[Tensor, " answers"],
    *,
    beta: float,
    gamma: float,
) -> Float[Tensor, ""]:
    """Return −(2/β) mean log σ(−β log π / length − γ): NPO without a reference.

    Source: Fan et al., arXiv 2410.07163; lengths are in tokens, γ is the margin.
    """
    from torch.nn.functional import logsigmoid

    return -2 / beta * logsigmoid(-beta * forget / lengths - gamma).mean()


class SimplePreference(GradientMethod):
    """SimNPO, with the usual loss on answers to keep if it has a weight."""

    name = "simnpo"

    def loss(self, step: Step) -> Tensor:
        """See `GradientMethod`."""
        forgotten = simnpo(
            step.forget.answers,
            step.forget.lengths,
            beta=step.settings.beta or BETA,
            gamma=step.settings.gamma,
        )
        return forgotten + step.kept


ENTRY = SimplePreference
