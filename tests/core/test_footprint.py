"""Memory that a model needs, by hand, and GPUs that a test makes up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from random_models import build_model

from lunar_tune.errors import ModelError
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.device import check_fits, n_parameters

GIB = 2**30


def spec(name: str, source: str | None = None, **changes: str) -> ModelSpec:
    return ModelSpec(name=name, source=source or name, **changes)  # type: ignore[arg-type]


def test_parameters_of_a_folder_are_those_of_its_model(checkpoint: Callable[..., Path]) -> None:
    model = build_model("llama")
    counted = n_parameters(spec("mine", str(checkpoint("llama"))))
    assert counted == sum(one.numel() for one in model.state_dict().values())


def test_parameters_that_nobody_has_told_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert n_parameters(spec("owner/name")) is None
    assert n_parameters(spec("mine", str(tmp_path))) is None
    assert n_parameters(spec("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct")) == 7.6e9


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes up GPUs, each by its free and its whole memory in GiB."""

    def make_up(*memory: tuple[float, float]) -> None:
        bytes_of = [(int(free * GIB), int(total * GIB)) for free, total in memory]
        monkeypatch.setattr("torch.cuda.is_available", lambda: bool(memory))
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(memory))
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda number: bytes_of[number])
        monkeypatch.setattr("torch.cuda.memory_reserved", lambda _number: 0)

    return make_up


@pytest.mark.parametrize(
    ("dtype", "trained", "told"),
    [
        # 7.6·10⁹ parameters · 2 bytes · 1.05 = 14.86 GiB, and half a one.
        ("auto", False, "parameters as bfloat16 need about 15.4 GiB"),
        ("float32", False, "parameters as float32 need about 30.2 GiB"),
        # 4 bytes each for weight, gradient and two moments.
        ("auto", True, "parameters, all of them trained, as bfloat16 need about 119.4 GiB"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_the_numbers(
    gpus: Callable[..., None], dtype: str, trained: bool, told: str
) -> None:
    gpus((10.5, 24.0), (12.25, 24.0))
    with pytest.raises(ModelError) as caught:
        check_fits(spec("qwen2.5-7b", dtype=dtype), trained=trained)
    assert str(caught.value) == (
        f"model qwen2.5-7b: 7.6 billion {told}; the GPU has 12.2 of 24.0 GiB free. Use a smaller "
        "model, a 16-bit --dtype, a larger GPU or share of it, end what else uses it, or take "
        "--device cpu."
    )


@pytest.mark.parametrize(
    ("changes", "limits", "fits"),
    [
        ({}, {}, True),
        ({"dtype": "float32"}, {}, False),
        ({"device": "cpu", "dtype": "float32"}, {}, True),
        ({"device": "cuda:1"}, {}, False),
        ({}, {"share": 0.5}, False),
        ({}, {"share": 2.0}, True),
        ({}, {"budget_gib": 15.0}, False),
        ({}, {"budget_gib": 16.0}, True),
        ({}, {"trained": True}, False),
    ],
)
def test_number_format_device_share_and_budget_decide(
    gpus: Callable[..., None], changes: dict[str, str], limits: dict[str, float], fits: bool
) -> None:
    gpus((20.0, 24.0), (10.0, 24.0))
    if fits:
        check_fits(spec("qwen2.5-7b", **changes), **limits)  # type: ignore[arg-type]
        return
    with pytest.raises(ModelError, match="need about"):
        check_fits(spec("qwen2.5-7b", **changes), **limits)  # type: ignore[arg-type]


def test_nothing_is_refused_where_there_is_no_gpu_or_no_size(gpus: Callable[..., None]) -> None:
    gpus()
    check_fits(spec("qwen2.5-7b"))
    gpus((1.0, 2.0))
    check_fits(spec("owner/name"))
