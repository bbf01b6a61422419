"""The difference between two models' weights, from which the second is restored bit for bit.

    delta.safetensors   a tensor for each changed parameter: new - old

Covers: the smallest number format in which a difference restores the new weight; writing them.
Does not cover: how a reader adds them (`reading` does what the card says).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lunar_tune.errors import LunarTuneError

__all__ = ["DELTA_FILE", "difference", "same_bits", "with_difference", "write_delta"]

DELTA_FILE = "delta.safetensors"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def difference(old: Float[Tensor, "*shape"], new: Float[Tensor, "*shape"]) -> Tensor | None:
    """Return new - old in the smallest format from which `with_difference` gives `new` again.

    Tried are the weight's own format, float32 and float64; None where no bit has changed.

    Raises:
        LunarTuneError: None of them will do, as where a weight became negative zero.
    """
    if same_bits(old, new):
        return None
    exact = new.double() - old.double()
    for dtype in dict.fromkeys((old.dtype, torch.float32, torch.float64)):
        delta = exact.to(dtype)
        if same_bits(with_difference(old, delta), new):
            return delta
    raise LunarTuneError("a weight cannot be restored from a difference; use --format checkpoint.")


def with_difference(
    old: Float[Tensor, "*shape"], delta: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return the sum, taken in the difference's format and rounded to the weight's."""
    return (old.to(delta.dtype) + delta).to(old.dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors are the same bit for bit, the sign of zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = _BITS[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def write_delta(
    folder: Path,
    old_of: Callable[[str], Tensor],
    new: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write the differences of some weights; they are proved to restore `new` bit for bit.

    Args:
        folder: Where to.
        old_of: Gives the weight of the unmodified model by name.
        new: The new weights, in host memory.
        metadata: What the file says of itself.

    Raises:
        LunarTuneError: A weight cannot be restored, or the file is not what was written.
    """
    from safetensors.torch import load_file, save_file

    deltas = {}
    for name, weight in new.items():
        delta = difference(old_of(name).cpu(), weight)
        if delta is not None:
            deltas[name] = delta.contiguous()
    file = folder / DELTA_FILE
    save_file(deltas, file, metadata=dict(metadata))
    for name, delta in load_file(file).items():
        if not same_bits(with_difference(old_of(name).cpu(), delta), new[name]):
            raise LunarTuneError(f"{file}: {name} was not written as it was computed.")
