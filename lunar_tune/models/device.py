"""Device, number format, threads, each resolved in this one place."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from lunar_tune.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICES", "DTYPES", "limit_threads", "resolve_device", "resolve_dtype"]

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_device(device: str) -> torch.device:
    """Return the torch device that a name means; `auto` takes a GPU where there is one.

    Raises:
        InputError: The name is unknown, or a CUDA device was demanded that is not there.
    """
    import torch

    if device not in DEVICES and not re.fullmatch(r"cuda:\d+", device):
        raise InputError(f"--device {device}: unknown. There are: {', '.join(DEVICES)}.")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"--device {device}: torch {torch.__version__} sees no CUDA device here. "
            "Use --device cpu, or install a CUDA build of torch on a machine with a GPU."
        )
    resolved = torch.device(device)
    if (resolved.index or 0) >= torch.cuda.device_count() and resolved.type == "cuda":
        raise InputError(
            f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices, numbered "
            "from 0."
        )
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the number format of the weights; `auto` is bfloat16 on a GPU, float32 on a CPU.

    Raises:
        InputError: The name is unknown.
    """
    import torch

    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: unknown. There are: {', '.join(DTYPES)}.")
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def limit_threads(count: int | None = None) -> int:
    """Bound torch's CPU threads by `count` or by what this process may use; return the bound."""
    import torch

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, min(count or available or 1, available or 1))
    torch.set_num_threads(threads)
    return threads
