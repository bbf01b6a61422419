"""Devices: their names and memory, batches that shrink until they fit, models that do not."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from random_models import build_model

from lunar_tune.errors import InputError, LunarTuneError, ModelError
from lunar_tune.models import device
from lunar_tune.models.catalog import ModelSpec

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: 9 bytes"),
]
OTHERS = [RuntimeError("shapes cannot be multiplied"), ValueError("not enough memory")]


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


@pytest.fixture(autouse=True)
def given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving memory back takes a while."""
    monkeypatch.setattr(device, "give_back", lambda: None)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_batches_are_halved_to_fit(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    size, work = device.BatchSize(100, "rows"), Work(13, error)
    for _ in range(2):
        assert size.fit(work) == "done with 12"
    assert work.tried == [100, 50, 25, 12, 12]
    assert caplog.messages[2] == "memory ran out with 25 of rows in a batch; 12 from now on"
    with pytest.raises(LunarTuneError, match=r"one of the answers.*--memory-budget") as one:
        device.BatchSize(6, "the answers").fit(Work(0, error))
    assert one.value.__cause__ is error


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_other_errors_pass_and_leave_the_size(error: Exception) -> None:
    size, work = device.BatchSize(100, "rows"), Work(1, error)
    with pytest.raises(type(error)):
        size.fit(work)
    assert (work.tried, size.size) == ([100], 100)
    assert not device.is_out_of_memory(error)
    assert device.BatchSize(-5, "rows").fit(work) == "done with 1", "an estimate of nothing is one"


def test_what_a_failed_try_held_is_free_before_the_next_try() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def work(size: int) -> int:
        assert [one for one in alive if one() is not None] == []
        large = torch.zeros(1)
        alive.append(weakref.ref(large))
        if size > 2:
            raise MemoryError
        return size

    assert device.BatchSize(8, "rows").fit(work) == 2
    assert len(alive) == 3


Gpus = Callable[..., list[float]]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Return a function that makes up GPUs, each by its free and its whole memory in GiB.

    Of each torch has as much as it is told to have; shares that are set are noted.
    """

    def make_up(*memory: tuple[float, float], allocated: int = 0, reserved: int = 0) -> list[float]:
        of_each = [(int(free * device.GIB), int(total * device.GIB)) for free, total in memory]
        shares: list[float] = []
        values: dict[str, Callable[..., Any]] = {
            "is_available": lambda: bool(memory),
            "device_count": lambda: len(memory),
            "mem_get_info": lambda one: of_each[one if isinstance(one, int) else 0],
            "memory_reserved": lambda _: reserved * device.GIB,
            "memory_allocated": lambda _: allocated * device.GIB,
            "get_device_properties": lambda _: SimpleNamespace(total_memory=of_each[0][1]),
            "set_per_process_memory_fraction": lambda share, _: shares.append(share),
        }
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return shares

    return make_up


@pytest.mark.parametrize(("budget", "free"), [(None, 7), (20.0, 7), (5.0, 3), (1.0, 0)])
def test_a_gpu_has_what_torch_keeps_too(gpus: Gpus, budget: float | None, free: int) -> None:
    """Of ten GiB four are free and five torch's: two in tensors, three kept for later."""
    gpus((4, 10), allocated=2, reserved=5)
    memory = device.DeviceMemory(torch.device("cuda"), budget)
    assert memory.free_bytes() == int(free * device.GIB * device.USABLE_SHARE)
    cpu = device.DeviceMemory(torch.device("cpu"), budget)
    assert cpu.free_bytes() == pytest.approx(0.9 * psutil.virtual_memory().available, rel=0.2)


def test_a_budget_is_enforced_and_one_beyond_the_gpu_refused(gpus: Gpus) -> None:
    shares = gpus((4, 10))
    for budget in (None, 4.0):
        device.DeviceMemory(torch.device("cuda"), budget).enforce()
    assert shares == [0.4]
    with pytest.raises(InputError, match=r"--memory-budget 12: the GPU has 10.0 GiB"):
        device.DeviceMemory(torch.device("cuda"), 12.0).enforce()


def spec(name: str, source: str | None = None, **changes: str) -> ModelSpec:
    return ModelSpec(name=name, source=source or name, **changes)  # type: ignore[arg-type]


def test_how_parameters_are_counted(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    counted = device.n_parameters(spec("mine", str(checkpoint("llama"))))
    assert counted == sum(one.numel() for one in build_model("llama").state_dict().values())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert device.n_parameters(spec("owner/name")) is None
    assert device.n_parameters(spec("mine", str(tmp_path))) is None
    assert device.n_parameters(spec("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct")) == 7.6e9


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(gpus: Gpus) -> None:
    """7.6·10⁹ parameters · (2 + .27) bytes = 16.07 GiB, and half a one.

    .27 are for a fit. Trained: 4 bytes each for weight, gradient and two moments.
    """
    gpus((10.5, 24.0), (12.25, 24.0))
    for trained, told in (
        (False, "parameters as bfloat16 need about 16.6 GiB"),
        (True, "parameters, all of them trained, as bfloat16 need about 115.7 GiB"),
    ):
        with pytest.raises(ModelError) as caught:
            device.check_fits(spec("qwen2.5-7b"), trained=trained)
        expected = f"model qwen2.5-7b: 7.6 billion {told}; the GPU has 12.2 of 24.0 GiB free. Use"
        assert str(caught.value).startswith(expected)


def test_number_format_device_share_and_budget_decide(gpus: Gpus) -> None:
    gpus((20.0, 24.0), (10.0, 24.0))
    device.check_fits(spec("qwen2.5-7b", device="cpu", dtype="float32"))
    device.check_fits(spec("qwen2.5-7b"), budget_gib=17.0)
    for changes, limits in (
        ({"dtype": "float32"}, {}),
        ({"device": "cuda:1"}, {}),
        *(({}, limit) for limit in ({"share": 0.5}, {"budget_gib": 16.0}, {"trained": True})),
    ):
        with pytest.raises(ModelError, match="need about"):
            device.check_fits(spec("qwen2.5-7b", **changes), **limits)
    gpus((1.0, 2.0))
    device.check_fits(spec("owner/name"))  # of unknown size


def test_a_device_is_one_that_is_there_and_its_number_format_follows(gpus: Gpus) -> None:
    gpus()
    with pytest.raises(InputError, match=r"--device cuda: torch .* sees no CUDA device"):
        device.resolve_device("cuda")
    assert device.resolve_device("auto").type == "cpu"
    gpus((1.0, 2.0), (1.0, 2.0))
    assert device.resolve_device("auto").type == "cuda"
    assert device.resolve_device("cuda:1") == torch.device("cuda", 1)
    for wrong in ("cuda:2", "gpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(InputError, match=f"--device {wrong}"):
            device.resolve_device(wrong)
    assert device.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(InputError, match=r"--dtype int8: unknown. There are: auto, float32"):
        device.resolve_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize(
    ("has", "host_gib", "parameters", "chosen"),
    [
        ({"avx512_bf16": True, "cpu_name": "Intel(R) Xeon"}, 16, 135e6, "float32"),  # it is slower
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, 16, 135e6, "bfloat16 (AVX-512)"),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, 16, 135e6, "float32"),
        ({"amx_tile": True, "amx_int8": True}, 16, 135e6, "float32"),
        ({"amx_tile": True, "amx_bf16": True}, 16, 135e6, "bfloat16 (AMX)"),
        ({"amx_tile": True, "amx_bf16": True}, 16, None, "bfloat16 (AMX)"),  # a hub id
        ({"amx_tile": True, "amx_bf16": True}, 16, 3e6, "float32"),
        ({}, 16, 3.1e9, "float32"),
        ({}, 16, 4e9, "bfloat16"),  # 16.8 GB in float32
        ({}, 16, None, "float32"),
    ],
)
def test_a_cpu_has_the_number_format_that_it_computes_fast_or_that_it_can_hold(
    has: dict[str, bool | str],
    host_gib: int,
    parameters: float | None,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, host = torch.device("cpu"), SimpleNamespace(total=host_gib * 2**30)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    dtype = device.resolve_dtype("auto", cpu, parameters)
    assert device.shown_dtype(dtype, cpu) == chosen
    assert device.resolve_dtype("float32", cpu, parameters) == torch.float32
    assert device.resolve_dtype("float16", cpu, parameters) == torch.float16
