"""The unlearning vector of every block.

Covers: LUNAR, arXiv 2502.07218, equation 3: the difference of mean activations between reference
prompts (which the model declines) and the questions to forget, at the last prompt token.
Does not cover: choosing a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lunar_tune.activations.streams import ResidualStreams

__all__ = ["unlearning_vectors"]


def unlearning_vectors(
    streams: ResidualStreams, *, reference_rows: Sequence[int], forget_rows: Sequence[int]
) -> Float[Tensor, "n_layers d_model"]:
    """Return r_l = mean_reference(x_l) − mean_forget(x_l), x_l being the output of block l.

    Means are taken in float64. Row l belongs to block l; the published code's array is shifted by
    one, since it records block inputs.

    Args:
        streams: The unmodified model's streams.
        reference_rows: Rows of the reference prompts.
        forget_rows: Rows of the questions to forget.

    Returns:
        One float64 vector for each block.
    """
    n_layers = streams.values.shape[0] - 1
    return torch.stack(
        [
            streams.last_tokens(reference_rows, layer + 1).double().mean(0)
            - streams.last_tokens(forget_rows, layer + 1).double().mean(0)
            for layer in range(n_layers)
        ]
    )
