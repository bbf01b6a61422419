"""Negative preference optimisation (Zhang et al., arXiv 2404.05868)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lunar_tune.methods.gradient import GradientMethod, Step

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["ENTRY", "npo"]

BETA = 0.1


def npo(
    forget: Float[Tensor, " answers"], reference: Float[Tensor, " answers"], *, beta: float
) -> Float[Tensor, ""]:
    """Return −(2/β) mean log σ(−β(log π − log ref)): DPO without a preferred answer.

    Its gradient is gradient ascent's (on sums over answers) where π equals the reference, and
    vanishes as an answer becomes unlikely.
    Source: Zhang et al., arXiv 2404.05868, equation 3.
    """
    from torch.nn.functional import logsigmoid

    return -2 / beta * logsigmoid(-beta * (forget - reference)).mean()


class NegativePreference(GradientMethod):
    """NPO, with the usual loss on answers to keep if it has a weight."""

    name = "npo"
    references = ("forget",)

    def loss(self, step: Step) -> Tensor:
        """See `GradientMethod`."""
        beta = step.settings.beta or BETA
        return npo(step.forget.answers, step.reference_forget, beta=beta) + step.kept


ENTRY = NegativePreference
