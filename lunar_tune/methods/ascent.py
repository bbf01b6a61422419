"""Gradient ascent on the answers to forget, alone or with a term for the answers to keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lunar_tune.methods.gradient import GradientMethod, Step

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def kl_to_reference(
    reference: Float[Tensor, "tokens vocabulary"], logits: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, ""]:
    """Return the mean over tokens of KL(reference ‖ model), from both's logits."""
    from torch.nn.functional import log_softmax

    expected = log_softmax(reference.float(), dim=-1)
    said = log_softmax(logits.float(), dim=-1)
    return (expected.exp() * (expected - said)).sum(-1).mean()


class GradientAscent(GradientMethod):
    """The negative of the usual loss, which has no lower bound: training has to stop in time.

    Source: Jang et al., arXiv 2210.01504; TOFU, arXiv 2401.06121, section 3.3.
    """

    name = "ga"

    def loss(self, step: Step) -> Tensor:
        """Return the mean log π of the tokens to forget."""
        return step.answers("forget").tokens.mean()


class GradientDifference(GradientMethod):
    """Ascent and the usual loss on answers to keep, with equal weights as in TOFU, section 3.3.

    Source: Liu et al., arXiv 2203.12817.
    """

    name = "gd"
    keeps = True

    def loss(self, step: Step) -> Tensor:
        """Return the ascent and the usual loss."""
        return step.answers("forget").tokens.mean() - step.answers("retain").tokens.mean()


class KlAscent(GradientMethod):
    """Ascent and KL to the base model on answers to keep ("KL minimization" in TOFU, 3.3)."""

    name = "ukl"
    keeps = True
    references = ("retain",)

    def loss(self, step: Step) -> Tensor:
        """Return the ascent and the divergence."""
        kept = kl_to_reference(step.reference("retain"), step.answers("retain").logits)
        return step.answers("forget").tokens.mean() + kept


ENTRIES = (GradientAscent, GradientDifference, KlAscent)
