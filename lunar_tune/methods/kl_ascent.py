"""Gradient ascent with KL to the base model on answers to keep (TOFU, arXiv 2401.06121)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lunar_tune.methods.gradient import GradientMethod, Step

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["ENTRY", "kl_to_reference"]


def kl_to_reference(
    reference: Float[Tensor, "tokens vocabulary"], logits: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, ""]:
    """Return the mean over tokens of KL(reference ‖ model), from both's logits.

    Source: TOFU, arXiv 2401.06121, section 3.3 ("KL minimization"). UKL adds it on retained answers
    to gradient ascent.
    """
    from torch.nn.functional import log_softmax

    expected = log_softmax(reference.float(), dim=-1)
    said = log_softmax(logits.float(), dim=-1)
    return (expected.exp() * (expected - said)).sum(-1).mean()


class KlAscent(GradientMethod):
    """Gradient ascent, with KL to the base model on answers to keep."""

    name = "ukl"
    keeps = True
    references = ("retain",)

    def loss(self, step: Step) -> Tensor:
        """See `GradientMethod`."""
        kept = kl_to_reference(step.reference_retain_logits, step.retain.logits)
        return step.forget.tokens.mean() + kept


ENTRY = KlAscent
