"""Putting new weights into a model and taking them out again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = ["edited"]


@contextmanager
def edited(
    loaded: LoadedModel, weights: Mapping[int, Tensor]
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Inside, block l's down-projection weight is `weights[l]`; after, what it was, bit for bit.

    Modifies the model's weights in place, without a copy of the model, and restores them also
    when the body raises.

    Args:
        loaded: The model.
        weights: New weight `[d_model, d_ff]` by layer, rounded to the model's number format.

    Yields:
        A context in which the original weights are back; after it the new ones are, bit for bit.

    Raises:
        ValueError: A weight has another shape than its matrix; `copy_` would spread it.
    """
    parameters = {
        layer: loaded.layout.down_projection_of(loaded.model, layer).weight for layer in weights
    }
    for layer, weight in weights.items():
        if weight.shape != parameters[layer].shape:
            raise ValueError(
                f"layer {layer}: shape {tuple(weight.shape)}, not {tuple(parameters[layer].shape)}"
            )
    originals = {layer: parameter.detach().clone() for layer, parameter in parameters.items()}

    def put(chosen: Mapping[int, Tensor]) -> None:
        with torch.no_grad():
            for layer, weight in chosen.items():
                parameters[layer].copy_(weight)

    @contextmanager
    def unmodified() -> Iterator[None]:
        new = {layer: parameter.detach().clone() for layer, parameter in parameters.items()}
        try:
            put(originals)
            yield
        finally:
            put(new)

    try:
        put(weights)
        yield unmodified
    finally:
        put(originals)
