"""The unlearning vectors, and temporary changes: new weights, or a vector on the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lunar_tune.models.layout import check_layers
from lunar_tune.models.loading import LoadedModel

__all__ = ["edited", "steered", "unlearning_vectors"]


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
    """
    return reference[1:].double().mean(1) - forget[1:].double().mean(1)


@contextmanager
def edited(
    loaded: LoadedModel, weights: Mapping[int, Tensor]
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Inside, block l's down-projection weight is `weights[l]`; after, what it was, bit for bit.

    Modifies the weights in place, and restores them also when the body raises.

    Args:
        loaded: The model.
        weights: New weight `[d_model, d_ff]` by layer; rounded to the model's number format.

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
    def base_model() -> Iterator[None]:
        new = {layer: parameter.detach().clone() for layer, parameter in parameters.items()}
        try:
            put(originals)
            yield
        finally:
            put(new)

    try:
        put(weights)
        yield base_model
    finally:
        put(originals)


@contextmanager
def steered(loaded: LoadedModel, layer: int, shift: Float[Tensor, " d_model"]) -> Iterator[None]:
    """Inside, block `layer`'s output is `shift` more than it was; after, what it was.

    It is added at every position: all prompt tokens and all generated ones. That is activation
    addition as in LUNAR (arXiv 2502.07218, section 3) after Arditi et al. (arXiv 2406.11717), and
    what foretells the edit best, which moves all tokens of a forget prompt and generated ones too.
    Padding moves as well; nothing attends to it. By a forward hook, which is removed also when the
    body raises. Contexts may be nested: shifts of one block add up.

    Args:
        loaded: The model.
        layer: The block.
        shift: c · r_l; rounded to the model's number format.

    Raises:
        ModelError: The model has no such block.
        ValueError: The shift has another width than the stream; the sum would spread it.
    """
    check_layers((layer,), loaded.n_layers)
    width = loaded.model.config.hidden_size
    if shift.shape != (width,):
        raise ValueError(f"a shift of shape {tuple(shift.shape)} for a stream of width {width}")
    added = shift.to(device=loaded.device, dtype=loaded.model.dtype)

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    handle = loaded.layout.blocks_of(loaded.model)[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
