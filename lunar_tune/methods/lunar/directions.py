"""The unlearning vector of every block."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["unlearning_vectors"]


def unlearning_vectors(
    *,
    reference: Float[Tensor, "n_points reference_rows d_model"],
    forget: Float[Tensor, "n_points forget_rows d_model"],
) -> Float[Tensor, "n_layers d_model"]:
    """Return r_l = mean_reference(x_l) − mean_forget(x_l), x_l being the output of block l.

    Means are taken in float64. Row l belongs to block l; the published code's array is shifted by
    one, since it records block inputs.

    Args:
        reference: The base model's stream at the last token of the reference prompts, at the
            input of every block and the output of the last one.
        forget: The same of the questions to forget.

    Returns:
        One float64 vector for each block.
    """
    return reference[1:].double().mean(1) - forget[1:].double().mean(1)
