"""How much memory a model needs, before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from lunar_tune.errors import ModelError
from lunar_tune.files import is_folder
from lunar_tune.models.catalog import CATALOG
from lunar_tune.models.device import resolve_device, resolve_dtype
from lunar_tune.models.memory import GIB

if TYPE_CHECKING:
    from lunar_tune.models.loading import ModelSpec

__all__ = ["bytes_needed", "check_fits", "n_parameters"]

# Beside the weights: what one prompt computes, the libraries' own buffers. More than that is used
# where there is more.
WORKING_BYTES: Final = GIB // 2
WORKING_SHARE: Final = 0.05
# Trained wholly, a parameter is float32, and so are its gradient and AdamW's two moments.
TRAINED_BYTES: Final = 4 * 4


def bytes_needed(parameters: float, bytes_each: int, *, trained: bool = False) -> int:
    """Return the least memory that a model can be worked with.

    Args:
        parameters: How many it has.
        bytes_each: Of a parameter in the number format it is loaded in.
        trained: Whether all weights are trained, rather than one matrix or an adapter.
    """
    weights = parameters * (TRAINED_BYTES if trained else bytes_each)
    return int(weights * (1 + WORKING_SHARE)) + WORKING_BYTES


def n_parameters(model: ModelSpec) -> float | None:
    """Return how many parameters a model has, as far as that is known without loading it."""
    folder = Path(model.checkpoint)
    if is_folder(folder):
        return _counted(folder)
    return CATALOG[model.name].billions * 1e9 if model.name in CATALOG else None


def _counted(folder: Path) -> float | None:
    from math import prod

    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="np") as tensors:
                names = tensors.keys()
                total += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError):
        return None  # whoever loads it says what is wrong
    return total or None


def check_fits(
    model: ModelSpec,
    *,
    trained: bool = False,
    share: float = 1.0,
    budget_gib: float | None = None,
) -> None:
    """Refuse a model that the GPU on this machine cannot hold.

    Args:
        model: What would be loaded, on the device that it names.
        trained: Whether all weights are trained.
        share: Of a GPU, for one worker.
        budget_gib: What a worker may use at most; None is all of its share.

    Raises:
        ModelError: It would not fit.
    """
    device = resolve_device(model.device)
    parameters = n_parameters(model)
    if device.type != "cuda" or parameters is None:
        return
    import torch

    dtype = resolve_dtype(model.dtype, device)
    need = bytes_needed(parameters, dtype.itemsize, trained=trained)
    numbers = range(torch.cuda.device_count()) if device.index is None else (device.index,)
    free, total = max(map(_memory_of, numbers))
    usable = min(free, total * min(share, 1.0))
    if budget_gib is not None:
        usable = min(usable, budget_gib * GIB)
    if need <= usable:
        return
    how = ", all of them trained," if trained else ""
    limits = f" and {share:g} of it for a trial" if share < 1 else ""
    limits += f", of which --memory-budget allows {budget_gib:g}" if budget_gib is not None else ""
    raise ModelError(
        f"model {model.name}: {parameters / 1e9:.2g} billion parameters{how} as "
        f"{str(dtype).removeprefix('torch.')} need about {need / GIB:.1f} GiB; the GPU has "
        f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{limits}. Use a smaller model, a 16-bit "
        "--dtype, a larger GPU or share of it, end what else uses it, or take --device cpu."
    )


def _memory_of(number: int) -> tuple[int, int]:
    """Return a GPU's free and whole memory; what this process holds can be given back."""
    import torch

    free, total = torch.cuda.mem_get_info(number)
    return free + torch.cuda.memory_reserved(number), total
