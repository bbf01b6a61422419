"""How much memory there is, and batches that shrink until they fit into it."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lunar_tune.errors import InputError, LunarTuneError

if TYPE_CHECKING:
    import torch

__all__ = ["BatchSize", "DeviceMemory", "give_back", "host_free_bytes", "is_out_of_memory"]

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

GIB = 2**30
# A device is never planned to the last byte: fragments and libraries take their share.
USABLE_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory that a worker may use on its device."""

    device: torch.device
    budget_gib: float | None = None
    """GiB of a GPU that weights, streams and batches share; None is all that is free."""

    def enforce(self) -> None:
        """Make an allocation beyond the budget fail as if the device were full.

        Raises:
            InputError: The budget exceeds the device.
        """
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
            return int(host_free_bytes() * USABLE_SHARE)
        import torch

        free, _ = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_allocated(self.device)
        free += torch.cuda.memory_reserved(self.device) - held  # cached by torch, free to us
        if self.budget_gib is not None:
            free = min(free, int(self.budget_gib * GIB) - held)
        return max(0, int(free * USABLE_SHARE))


def host_free_bytes() -> int:
    """Return the host memory that can be used without swapping, as far as the system says."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 not a path of ours
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * GIB


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, on a GPU or on the host."""
    if "OutOfMemory" in type(error).__name__ or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


class BatchSize:
    """A batch size that is found rather than asked for, and remembered.

    Args:
        most: The first try: an estimate from memory, or what was asked for.
        what: What is batched, for the message.
    """

    def __init__(self, most: int, what: str) -> None:
        self.size = max(1, most)
        self._what = what

    def fit(self, work: Callable[[int], Result]) -> Result:
        """Return `work(size)`; halve the size as long as memory runs out.

        Raises:
            LunarTuneError: Memory runs out even with a batch of one.
        """
        while True:
            try:
                return work(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.size == 1:
                    raise LunarTuneError(
                        f"out of memory with a single one of {self._what} in a batch. Raise "
                        "--memory-budget, give a trial a larger share with --gpus-per-trial, or "
                        "use a smaller model or --dtype bfloat16."
                    ) from error
            # Outside the handler, where the error no longer holds the tensors of the failed try.
            tried, self.size = self.size, self.size // 2
            told = "memory ran out with %d of %s in a batch; %d from now on"
            logger.warning(told, tried, self._what, self.size)
            give_back()


def give_back() -> None:
    """Return what torch keeps of a GPU's memory without a use."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
