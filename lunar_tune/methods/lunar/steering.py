"""Adding a vector to the residual stream while a model answers, without changing a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from lunar_tune.models.layout import check_layers

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = ["steered"]


@contextmanager
def steered(loaded: LoadedModel, layer: int, shift: Float[Tensor, " d_model"]) -> Iterator[None]:
    """Inside, block `layer`'s output is `shift` more than it was; after, what it was.

    It is added at every position: all prompt tokens and all generated ones. That is activation
    addition as in LUNAR (arXiv 2502.07218, section 3) after Arditi et al. (arXiv 2406.11717).
    It is also what foretells the edit best: its fit moves all tokens of a forget prompt, and the
    edited matrix is there for generated tokens too. Padding moves as well; nothing attends to it.

    Adds a forward hook to the block, and removes it also when the body raises; no weight changes.
    Contexts may be nested: shifts of one block add up.

    Args:
        loaded: The model.
        layer: Block whose output, the stream that the next one reads, is moved.
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
        """Return what takes the output's place: replacing it is what this hook is for."""
        if isinstance(output, tuple):
            return (output[0] + added, *output[1:])
        return output + added

    handle = loaded.layout.blocks_of(loaded.model)[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
