"""A trial on a CUDA device, against the same trial on the CPU.

Deselected by default; run with `pytest -m gpu` on a machine that has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lunar_tune.config.run_options import RunOptions
from lunar_tune.methods.contract import METHODS
from lunar_tune.methods.lunar import SOLVERS
from lunar_tune.training import TRAINED
from lunar_tune.trial.assemble import assemble, materialise
from lunar_tune.trial.worker import Worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PARAMETERS = {
    "adamw": {"layer": 1, "coefficient": 2.0, "learning_rate": 0.003},
    "lora": {"layer": 1, "coefficient": 2.0, "learning_rate": 0.003},
    "closed_form": {"layer": 1, "coefficient": 2.0, "ridge": 0.1},
}


def worker_on(device: str, solver: str, dtype: str) -> Worker:
    options = RunOptions(
        model="tiny",
        device=device,
        dtype=dtype,
        solver=solver,
        cache_limit=0,
    )
    return Worker(materialise(assemble(options)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trial_in_float32_scores_as_on_the_cpu_and_leaves_the_weights_as_they_were(
    solver: str,
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    there, here = (worker_on(device, solver, "float32") for device in ("cuda", "cpu"))
    before = {name: value.clone() for name, value in there.loaded.model.state_dict().items()}
    scores = there.run(PARAMETERS[solver]).evaluation.scores
    expected = here.run(PARAMETERS[solver]).evaluation.scores
    after = there.loaded.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("forget_rouge1", "retain_rouge1", "factual_rouge1"):
        assert scores[name] == pytest.approx(expected[name], abs=0.03)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trial_in_bfloat16_forgets_and_keeps(solver: str) -> None:
    worker = worker_on("cuda", solver, "bfloat16")
    baseline = worker.baseline().evaluation.scores
    scores = worker.run(PARAMETERS[solver]).evaluation.scores
    assert baseline["forget_rouge1"] > 0.9
    assert scores["forget_rouge1"] < 0.3
    assert scores["retain_rouge1"] > 0.8


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "lunar"])
def test_a_gradient_method_in_bfloat16_trains_and_leaves_the_weights_as_they_were(
    method: str, trained: str
) -> None:
    options = RunOptions(
        model="tiny",
        device="cuda",
        dtype="bfloat16",
        method=method,
        fix=(f"trained={trained}", "epochs=2"),
        cache_limit=0,
        evaluation_rows=8,
    )
    spec = materialise(assemble(options))
    engine = dataclasses.replace(spec.engine, retain_floor=0.0)
    worker = Worker(dataclasses.replace(spec, engine=engine))
    before = {name: value.clone() for name, value in worker.loaded.model.state_dict().items()}
    own = {"layer": 1, "coefficient": 6.5} if method == "rmu" else {}
    result = worker.run({**own, "learning_rate": 1e-3})
    assert len(result.losses) == 2
    assert len(result.checks) == 1
    after = worker.loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_vectors_on_the_device_equal_those_on_the_cpu(
    checkpoint: Callable[..., Path],
) -> None:
    vectors = []
    for device in ("cuda", "cpu"):
        options = RunOptions(
            model=str(checkpoint("llama")),
            device=device,
            dtype="float32",
            data="mini",
            cache_limit=0,
        )
        vectors.append(worker_on_options(options).prepared.vectors)  # type: ignore[attr-defined]
    assert torch.allclose(vectors[0].cpu(), vectors[1], atol=1e-4)


def worker_on_options(options: RunOptions) -> Worker:
    return Worker(assemble(options))
