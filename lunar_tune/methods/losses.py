"""What the gradient methods minimise: pure functions of log-probabilities.

Covers: gradient ascent, gradient difference, KL to a reference, DPO, NPO, SimNPO, each with its
paper, equation and sign.
Does not cover: how log-probabilities are computed (`likelihood`), what is trained (`gradient`).

log π is the logarithm of the probability of an answer's tokens given the question: of one token
(`token_log_probs`) or the sum over an answer (`answer_log_probs`). The reference is the model as it
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
    "simnpo",
]


def gradient_ascent(forget: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Return the mean log π of the tokens to forget: the negative of the usual loss.

    Source: Jang et al., arXiv 2210.01504; TOFU, arXiv 2401.06121, section 3.3.
    It has no lower bound, so training has to stop in time.
    """
    return forget.mean()


def gradient_difference(
    forget: Float[Tensor, " tokens"], retain: Float[Tensor, " tokens"]
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
