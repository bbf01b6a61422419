"""Batches shrink until they fit, and only where memory is what is lacking."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.models import device as device_module
from lunar_tune.models.device import GIB, BatchSize, DeviceMemory, host_free_bytes, is_out_of_memory

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: 9 bytes"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("not enough memory"),
    InputError("layer 99"),
    KeyError("memory"),
]


class Work:
    """Fails above a size, and notes what was tried."""

    def __init__(self, fits: int, error: BaseException) -> None:
        self.tried: list[int] = []
        self._fits, self._error = fits, error

    def __call__(self, size: int) -> str:
        self.tried.append(size)
        if size > self._fits:
            raise self._error
        return f"done with {size}"


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Note when memory is given back instead of doing it, which takes a while."""
    noted: list[None] = []
    monkeypatch.setattr(device_module, "give_back", lambda: noted.append(None))
    return noted


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_is_halved_until_it_fits_and_the_size_is_remembered(
    error: Exception, given_back: list[None], caplog: pytest.LogCaptureFixture
) -> None:
    size, work = BatchSize(100, "rows"), Work(13, error)
    assert size.fit(work) == "done with 12"
    assert caplog.messages == [
        f"memory ran out with {tried} of rows in a batch; {then} from now on"
        for tried, then in ((100, 50), (50, 25), (25, 12))
    ]
    assert work.tried == [100, 50, 25, 12]
    assert len(given_back) == 3
    assert size.fit(work) == "done with 12"
    assert work.tried[4:] == [12]
    assert size.size == 12


def test_what_fits_is_done_once(given_back: list[None]) -> None:
    work = Work(7, MemoryError())
    assert BatchSize(7, "rows").fit(work) == "done with 7"
    assert work.tried == [7]
    assert given_back == []


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_other_errors_pass_and_leave_the_size(error: Exception) -> None:
    size, work = BatchSize(100, "rows"), Work(1, error)
    with pytest.raises(type(error)) as raised:
        size.fit(work)
    assert raised.value is error
    assert work.tried == [100]
    assert size.size == 100


def test_an_interruption_passes() -> None:
    work = Work(0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        BatchSize(4, "rows").fit(work)
    assert work.tried == [4]


@pytest.mark.usefixtures("given_back")
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_of_one_that_does_not_fit_is_an_error_that_says_what_to_do(
    error: Exception,
) -> None:
    work = Work(0, error)
    with pytest.raises(LunarTuneError, match=r"one of the answers.*--memory-budget") as one:
        BatchSize(6, "the answers").fit(work)
    assert one.value.__cause__ is error
    assert work.tried == [6, 3, 1]


@pytest.mark.parametrize(("most", "first"), [(0, 1), (-5, 1), (1, 1), (9, 9)])
def test_an_estimate_of_nothing_is_a_batch_of_one(most: int, first: int) -> None:
    work = Work(100, MemoryError())
    BatchSize(most, "rows").fit(work)
    assert work.tried == [first]


def test_what_a_failed_try_held_is_free_before_the_next_try() -> None:
    class Held:
        """Something large."""

    alive: list[weakref.ref[Held]] = []

    def work(size: int) -> int:
        assert [one for one in alive if one() is not None] == []
        large = Held()
        alive.append(weakref.ref(large))
        if size > 2:
            raise MemoryError
        return size

    assert BatchSize(8, "rows").fit(work) == 2
    assert len(alive) == 3


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert all(map(is_out_of_memory, OUT_OF_MEMORY))
    assert not any(map(is_out_of_memory, OTHERS))
    assert not is_out_of_memory(KeyboardInterrupt())


def test_a_cpu_has_what_the_host_has_and_no_budget() -> None:
    cpu = torch.device("cpu")
    free = host_free_bytes()
    assert 2**20 < free < 2**50
    for budget in (None, 0.001):
        memory = DeviceMemory(cpu, budget)
        memory.enforce()
        assert memory.free_bytes() == pytest.approx(0.9 * free, rel=0.2)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pretend that there is a GPU of 10 GiB; return the shares that were set.

    Four GiB are free, five are torch's: two in tensors and three kept for later.
    """
    shares: list[float] = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10 * GIB)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 * GIB, 10 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * GIB)
    return shares


@pytest.mark.parametrize(("budget", "free"), [(None, 7), (20.0, 7), (5.0, 3), (2.0, 0), (1.0, 0)])
@pytest.mark.usefixtures("gpu")
def test_a_gpu_has_what_is_free_and_what_torch_keeps_within_the_budget(
    budget: float | None, free: int
) -> None:
    memory = DeviceMemory(torch.device("cuda"), budget)
    assert memory.free_bytes() == int(free * GIB * device_module.USABLE_SHARE)


def test_a_budget_is_enforced_and_one_beyond_the_gpu_refused(gpu: list[float]) -> None:
    device = torch.device("cuda")
    DeviceMemory(device).enforce()
    assert gpu == []
    DeviceMemory(device, 4.0).enforce()
    assert gpu == [0.4]
    with pytest.raises(InputError, match=r"--memory-budget 12: the GPU has 10.0 GiB"):
        DeviceMemory(device, 12.0).enforce()
