"""Losses of answers: gradient ascent, alone or with answers to keep, DPO, NPO and SimNPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lunar_tune.methods.gradient import GradientMethod, Step

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

BETA = 0.1
SIMNPO_BETA = 2.5  # it multiplies a mean over tokens, and 0.1 would hardly ever count less


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
    Source: Rafailov et al., arXiv 2305.18290, equation 7; for unlearning TOFU, arXiv 2401.06121,
    section 3.3.
    """
    from torch.nn.functional import logsigmoid

    margin = (preferred - reference_preferred) - (rejected - reference_rejected)
    return -logsigmoid(beta * margin).mean()


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


class Preference(GradientMethod):
    """DPO of refusals to the true answers."""

    name = "dpo"
    references = ("refused", "forget")

    def loss(self, step: Step) -> Tensor:
        """Return the loss of both answers to each question."""
        now = [step.answers(name).answers for name in self.references]
        before = [step.reference(name) for name in self.references]
        return dpo(*now, *before, beta=step.settings.beta or BETA)


class NegativePreference(GradientMethod):
    """NPO, with the usual loss on answers to keep if it has a weight."""

    name = "npo"
    references = ("forget",)

    def loss(self, step: Step) -> Tensor:
        """Return the loss, and that of answers to keep."""
        beta, said = step.settings.beta or BETA, step.answers("forget").answers
        return npo(said, step.reference("forget"), beta=beta) + step.kept_loss


class SimplePreference(GradientMethod):
    """SimNPO, with the usual loss on answers to keep if it has a weight."""

    name = "simnpo"

    def loss(self, step: Step) -> Tensor:
        """Return the loss, and that of answers to keep."""
        said, fixed = step.answers("forget"), step.settings
        beta, gamma = fixed.beta or SIMNPO_BETA, fixed.gamma
        return simnpo(said.answers, said.lengths, beta=beta, gamma=gamma) + step.kept_loss


ENTRIES = (
    GradientAscent,
    GradientDifference,
    KlAscent,
    Preference,
    NegativePreference,
    SimplePreference,
)
