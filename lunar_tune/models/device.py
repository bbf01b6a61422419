"""The device: what its name means, how much memory it has, batches that shrink to fit into it."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from lunar_tune.config.options import AUTO, DTYPES
from lunar_tune.errors import InputError, LunarTuneError, ModelError, Result
from lunar_tune.files import is_folder
from lunar_tune.models.catalog import CATALOG, ModelSpec
from lunar_tune.models.weights import n_stored

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

GIB: Final = 2**30
USABLE_SHARE: Final = 0.9  # of what is free: fragments and libraries take their share
# What a model needs at least beside its weights: what one prompt computes, the libraries' buffers.
WORKING_BYTES: Final = GIB // 2
# A fit holds 20 bytes of float32 for each parameter of its matrix, which has 0.9 % of a model's
# (Qwen2.5-7B and -0.5B; SmolLM2-135M 0.65 %), and half as much again of its inputs.
FITTING_BYTES: Final = 0.27  # for each parameter of the model
TRAINED_BYTES: Final = 4 * 4  # float32 of a parameter, its gradient and AdamW's two moments
# Parameters below which a model's operations on a CPU are too short to gain by more threads or by
# fewer bits. Measured on `tiny` (3 million) and two cores: a trial takes 1.1 s with one thread and
# 0.9 s with two, but 8 s against 65 s for a full evaluation while others compute on the same cores.
SMALL_MODEL: Final = 20_000_000


def check_device_name(device: str) -> None:
    """Refuse a name that no device has, without torch, or raise an InputError."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise InputError(f"--device {device}: unknown. There are: auto, cpu, cuda.")


def resolve_device(device: str) -> torch.device:
    """Return the device that a name means, a GPU for `auto` if possible, or raise an InputError."""
    check_device_name(device)
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = torch.device(device)
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise InputError(
                f"--device {device}: torch {torch.__version__} sees {count or 'no'} CUDA devices "
                "here, numbered from 0. Use --device cpu, or install a CUDA build of torch on a "
                "machine with a GPU."
            )
    return resolved


def resolve_dtype(dtype: str, device: torch.device, parameters: float | None = None) -> torch.dtype:
    """Return the number format of a model's weights, or raise an InputError.

    `auto` is bfloat16 on a GPU, on a CPU float32, unless the processor has a fast unit for bfloat16
    and the model is not small, or host memory is too small for `parameters` in float32.
    """
    import torch

    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: unknown. There are: {', '.join(DTYPES)}.")
    if dtype == AUTO:
        need = memory_needed(parameters or 0, torch.float32.itemsize)
        halves = device.type == "cuda" or need > psutil.virtual_memory().total * USABLE_SHARE
        if _unit_of_halves() and (parameters is None or parameters >= SMALL_MODEL):
            halves = True
        dtype = "bfloat16" if halves else "float32"
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def dtype_of(model: ModelSpec) -> torch.dtype:
    """Return the number format of a model's weights on this machine, or raise an InputError."""
    return resolve_dtype(model.dtype, resolve_device(model.device), n_parameters(model))


def shown_dtype(dtype: torch.dtype, device: torch.device) -> str:
    """Return a number format's name, and what computes with it, to show."""
    name = str(dtype).removeprefix("torch.")
    unit = _unit_of_halves() if (name, device.type) == ("bfloat16", "cpu") else ""
    return f"{name} ({unit})" if unit else name


def _unit_of_halves() -> str:
    """Return what computes faster in bfloat16 than in float32 here; empty where nothing does.

    AVX-512-BF16 took a quarter to a half of the time on AMD's processors, and 1.2 to 2.7 times as
    long on Intel's without AMX (docs/benchmarks.md).
    """
    import torch

    known = torch.cpu.get_capabilities()
    if known.get("amx_tile") and known.get("amx_bf16"):
        return "AMX"
    is_amd = str(known.get("cpu_name", "")).startswith("AMD")
    return "AVX-512" if is_amd and known.get("avx512_bf16") else ""


def limit_threads(count: int | None = None) -> int:
    """Bound torch's CPU threads by `count` or by what this process may use; return the bound."""
    import torch

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, min(count or available or 1, available or 1))
    torch.set_num_threads(threads)
    return threads


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory that a worker may use on its device."""

    device: torch.device
    budget_gib: float | None = None
    """GiB of a GPU that weights, streams and batches share; None is all that is free."""

    def enforce(self) -> None:
        """Make an allocation beyond the budget fail; more than the device is an InputError."""
        if self.budget_gib is None or self.device.type != "cuda":
            return
        import torch

        total = torch.cuda.get_device_properties(self.device).total_memory
        if self.budget_gib * GIB > total:
            raise InputError(
                f"--memory-budget {self.budget_gib:g}: the GPU has {total / GIB:.1f} GiB."
            )
        torch.cuda.set_per_process_memory_fraction(self.budget_gib * GIB / total, self.device)

    def free_bytes(self) -> int:
        """Return what may still be allocated, with a margin; the host's for a CPU."""
        if self.device.type != "cuda":
            return int(psutil.virtual_memory().available * USABLE_SHARE)
        import torch

        free, _ = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_allocated(self.device)
        free += torch.cuda.memory_reserved(self.device) - held  # cached by torch, free to us
        if self.budget_gib is not None:
            free = min(free, int(self.budget_gib * GIB) - held)
        return max(0, int(free * USABLE_SHARE))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, on a GPU or on the host."""
    if "OutOfMemory" in type(error).__name__ or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def give_back() -> None:
    """Return what torch keeps of a GPU's memory without a use."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class BatchSize:
    """A batch size that is found and remembered; `most` is the first try, `what` is batched."""

    def __init__(self, most: int, what: str) -> None:
        self.size = max(1, most)
        self._what = what

    def fit(self, work: Callable[[int], Result]) -> Result:
        """Return `work(size)`; halve the size as long as memory runs out, down to 1."""
        while True:
            try:
                return work(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.size == 1:
                    raise LunarTuneError(
                        f"out of memory with only one of {self._what} in a batch. Raise "
                        "--memory-budget, give a trial a larger share with --gpus-per-trial, or "
                        "use a smaller model or --dtype bfloat16."
                    ) from error
            # Outside the handler, where the error no longer holds the tensors of the failed try.
            tried, self.size = self.size, self.size // 2
            told = "memory ran out with %d of %s in a batch; %d from now on"
            logger.warning(told, tried, self._what, self.size)
            give_back()


def n_parameters(model: ModelSpec) -> float | None:
    """Return how many parameters a model has, as far as that is known without loading it."""
    folder = Path(model.checkpoint)
    if not is_folder(folder):
        return CATALOG[model.name].billions * 1e9 if model.name in CATALOG else None
    return n_stored(folder)


def memory_needed(parameters: float, bytes_each: int) -> int:
    """Return the bytes of a device that so many parameters and the work on them take."""
    return int(parameters * (bytes_each + FITTING_BYTES)) + WORKING_BYTES


def check_fits(
    model: ModelSpec,
    *,
    trained: bool = False,
    share: float = 1.0,
    budget_gib: float | None = None,
) -> None:
    """Raise a ModelError where the GPU on this machine cannot hold a model, or train it wholly.

    A worker has a share of the GPU, and of that at most the budget.
    """
    if model.device == "cpu":
        return
    import torch

    device, parameters = resolve_device(model.device), n_parameters(model)
    if device.type != "cuda" or parameters is None:
        return
    dtype = dtype_of(model)
    need = memory_needed(parameters, TRAINED_BYTES if trained else dtype.itemsize)

    def memory_of(number: int) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(number)
        return free + torch.cuda.memory_reserved(number), total  # what is held can be given back

    numbers = range(torch.cuda.device_count()) if device.index is None else (device.index,)
    free, total = max(map(memory_of, numbers))
    usable = min(free, total * min(share, 1.0))
    if budget_gib is not None:
        usable = min(usable, budget_gib * GIB)
    if need <= usable:
        return
    how = ", all of them trained," if trained else ""
    limits = f" and {share:g} of it for a trial" if share < 1 else ""
    limits += f", of which --memory-budget allows {budget_gib:g}" if budget_gib is not None else ""
    smaller = "a 16-bit --dtype, " if dtype.itemsize > 2 and not trained else ""
    raise ModelError(
        f"model {model.name}: {parameters / 1e9:.2g} billion parameters{how} as "
        f"{str(dtype).removeprefix('torch.')} need about {need / GIB:.1f} GiB; the GPU has "
        f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{limits}. Use a smaller model, "
        f"{smaller}a larger GPU or share of it, end what else uses it, or take --device cpu."
    )
