"""What the gradient methods minimise: pure functions of log-probabilities, or of activations.

Covers: gradient ascent, gradient difference, KL to a reference, DPO, NPO, SimNPO, RMU, each with
its paper, equation and sign.
Does not cover: how log-probabilities are computed (`training.answer_loss`), what is trained
(`gradient_fit`).

log π is the logarithm of the probability of an answer's tokens given the question: of one token, or
the sum over an answer. The reference is the model as it
was before unlearning. Every function returns what is to be made small.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

__all__ = [
    "dpo",
    "gradient_ascent",
    "gradient_difference",
    "kl_to_reference",
    "npo",
    "rmu",
    "simnpo",
]


def gradient_ascent(forget: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Return the mean log π of the tokens to forget: the negative of the usual loss.

    Source: Jang et al., arXiv 2210.01504; TOFU, arXiv 2401.06121, section 3.3.
    It has no lower bound, so training has to stop in time.
    """
    return forget.mean()


def gradient_difference(
    forget: Float[Tensor, " forget_tokens"], retain: Float[Tensor, " retain_tokens"]
) -> Float[Tensor, ""]:
    """Return gradient ascent on the tokens to forget and the usual loss on those to keep.

    Source: Liu et al., arXiv 2203.12817; TOFU, arXiv 2401.06121, section 3.3, with equal weights.
    """
    return gradient_ascent(forget) - retain.mean()


def kl_to_reference(
    reference: Float[Tensor, "tokens vocabulary"], logits: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, ""]:
    """Return the mean over tokens of KL(reference ‖ model), from both's logits.

    Source: TOFU, arXiv 2401.06121, section 3.3 ("KL minimization"). UKL adds it on retained answers
    to gradient ascent.
    """
    expected = log_softmax(reference.float(), dim=-1)
    said = log_softmax(logits.float(), dim=-1)
    return (expected.exp() * (expected - said)).sum(-1).mean()


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
    return -2 / beta * logsigmoid(-beta * forget / lengths - gamma).mean()


def rmu(
    forget: Float[Tensor, "forget_tokens d_model"],
    control: Float[Tensor, " d_model"],
    retain: Float[Tensor, "retain_tokens d_model"],
    reference: Float[Tensor, "retain_tokens d_model"],
    *,
    alpha: float,
) -> Float[Tensor, ""]:
    """Return mean (x_f − control)² + α mean (x_r − ref_r)² over tokens and dimensions.

    x are a block's outputs; `control` is a random unit vector times a coefficient.
    Source: Li et al., arXiv 2403.03218, equations 1 and 2; they write sums over dimensions, their
    published code takes means, and α belongs to means.
    """
    moved = (forget.float() - control.float()).square().mean()
    return moved + alpha * (retain.float() - reference.float()).square().mean()
