"""Direct preference optimisation of refusals (Rafailov et al., arXiv 2305.18290)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lunar_tune.methods.gradient import GradientMethod, Step

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["ENTRY", "dpo"]

BETA = 0.1


def dpo(
    preferred: Float[Tensor, " answers"],
    rejected: Float[Tensor, " answers"],
    reference_preferred: Float[Tensor, " answers"],
    reference_rejected: Float[Tensor, " answers"],
    *,
    beta: float,
) -> Float[Tensor, ""]:
    """Return −mean log σ(β[(log π_p − log ref_p) − (log π_r − log ref_r)]).

    Preferred are refusals, rejected the true answers that are to be forgotten.
    Source: Rafailov et al., arXiv 2305.18290, equation 7; for unlearning TOFU, section 3.3.
    """
    from torch.nn.functional import logsigmoid

    margin = (preferred - reference_preferred) - (rejected - reference_rejected)
    return -logsigmoid(beta * margin).mean()


class Preference(GradientMethod):
    """DPO of refusals to the true answers."""

    name = "dpo"
    references = ("refused", "forget")

    def loss(self, step: Step) -> Tensor:
        """See `GradientMethod`."""
        return dpo(
            step.refused.answers,
            step.forget.answers,
            step.reference_refused,
            step.reference_forget,
            beta=step.settings.beta or BETA,
        )


ENTRY = Preference
