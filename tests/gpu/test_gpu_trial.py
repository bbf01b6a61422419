"""A trial on a CUDA device, against the same trial on the CPU.

Deselected by default; run with `pytest -m gpu` on a machine that has one. What is tested on the
device can be rehearsed on a CPU: `scripts/gpu_check --rehearse` does.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunar_tune.config.options import RunOptions
from lunar_tune.methods.contract import METHODS
from lunar_tune.methods.lunar import SOLVERS
from lunar_tune.methods.lunar.method import PreparedLunar
from lunar_tune.training import TRAINED
from lunar_tune.trial.assemble import assemble, materialise
from lunar_tune.trial.worker import Worker

DEVICE = os.environ.get("LUNAR_TUNE_GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
FITTED = {"layer": 1, "coefficient": 2.0}
PARAMETERS = {
    "adamw": FITTED | {"learning_rate": 0.003},
    "lora": FITTED | {"learning_rate": 0.003},
    "closed_form": FITTED | {"ridge": 0.1},
}


def worker_on(device: str, dtype: str, *, floor: float | None = None, **options: Any) -> Worker:
    spec = materialise(assemble(RunOptions(device=device, dtype=dtype, cache_limit=0, **options)))
    return Worker(dataclasses.replace(spec, retain_floor=floor))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trial_in_float32_scores_as_on_the_cpu_and_leaves_the_weights_as_they_were(
    solver: str, unchanged: Callable[[Any], None]
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    there, here = (worker_on(device, "float32", solver=solver) for device in (DEVICE, "cpu"))
    unchanged(there.loaded.model)
    scores, expected = (one.run(PARAMETERS[solver]).evaluation.scores for one in (there, here))
    for name in ("forget_rouge1", "retain_rouge1", "factual_rouge1"):
        assert scores[name] == pytest.approx(expected[name], abs=0.03)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trial_in_bfloat16_forgets_and_keeps(solver: str) -> None:
    worker = worker_on(DEVICE, "bfloat16", solver=solver)
    assert worker.baseline().evaluation.scores["forget_rouge1"] > 0.9
    scores = worker.run(PARAMETERS[solver]).evaluation.scores
    assert scores["forget_rouge1"] < 0.3
    assert scores["retain_rouge1"] > 0.8


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "lunar"])
def test_a_gradient_method_in_bfloat16_trains_and_leaves_the_weights_as_they_were(
    method: str, trained: str, unchanged: Callable[[Any], None]
) -> None:
    fix = (f"trained={trained}", "epochs=2")
    worker = worker_on(DEVICE, "bfloat16", floor=0.0, method=method, fix=fix, evaluation_rows=8)
    unchanged(worker.loaded.model)
    own = {"layer": 1, "coefficient": 6.5} if method == "rmu" else {}
    result = worker.run({**own, "learning_rate": 1e-3})
    assert (len(result.losses), len(result.checks)) == (2, 1)


def test_vectors_on_the_device_equal_those_on_the_cpu(checkpoint: Callable[..., Path]) -> None:
    vectors = []
    for device in (DEVICE, "cpu"):
        random = {"model": str(checkpoint("llama")), "reference_check": "never"}
        worker = worker_on(device, "float32", data="mini", **random)
        assert isinstance(worker.prepared, PreparedLunar)
        vectors.append(worker.prepared.vectors.cpu())
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-4)
