"""A search of a gradient method on the tiny model, and what ends its fits early."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_lines import run_command
from search_results import rows_of, statuses

from lunar_tune.cli.export import COMMAND
from lunar_tune.config.run_options import RunOptions
from lunar_tune.methods.contract import Fit
from lunar_tune.trial.assemble import assemble, materialise
from lunar_tune.trial.evaluator import Check, drive
from lunar_tune.trial.tasks import TRIAL, Task, TaskRunner
from lunar_tune.trial.worker import Worker
from lunar_tune.yaml_files import read_yaml

pytestmark = pytest.mark.slow  # a search of its own

# Looks


class MadeFit(Fit):
    """A fit that trains nothing, and counts its epochs."""

    def __init__(self, n_epochs: int) -> None:
        self.n_epochs, self.done = n_epochs, 0

    def __iter__(self) -> Iterator[int]:
        for epoch in range(1, self.n_epochs + 1):
            self.done = epoch
            yield epoch


def seen_of(fit: MadeFit, *retain: float, floor: float | None = 0.8) -> list[int]:
    """Return after which epochs a fit is looked at that keeps so much, look by look."""
    kept = iter(retain)

    def look(epochs: int) -> Check:
        return Check(epochs=epochs, forget_rouge1=0.0, retain_rouge1=next(kept, 1.0))

    return [check.epochs for check in drive(fit, floor, look)]


def test_a_fit_is_looked_at_at_even_distances_and_not_after_its_last_epoch() -> None:
    assert seen_of(MadeFit(20)) == [4, 8, 12, 16]
    assert seen_of(MadeFit(12)) == [3, 6, 9]
    assert seen_of(MadeFit(3)) == [1, 2]
    assert seen_of(MadeFit(1)) == seen_of(MadeFit(20), floor=None) == []


@pytest.mark.parametrize(
    ("retain", "done"),
    [
        ([0.39], 20),
        ([0.39, 0.39], 8),
        ([0.39, 0.41], 20),
        ([0.9, 0.4], 20),
        ([0.2, 0.9, 0.39, 0.0], 16),
    ],
)
def test_a_fit_that_is_below_half_of_the_floor_twice_in_a_row_ends(
    retain: list[float], done: int
) -> None:
    fit = MadeFit(20)
    seen_of(fit, *retain)
    assert fit.done == done


@pytest.fixture(scope="module")
def worker() -> Worker:
    """Return a worker whose fits are looked at; what it has run leaves no trace in its model."""
    options = RunOptions(
        method="ga",
        factual_data="none",
        evaluation_rows=24,
        fix=("epochs=12",),
        max_new_tokens=None,
    )
    spec = materialise(assemble(options))
    engine = dataclasses.replace(spec.engine, early_exit=True, retain_floor=0.8)
    return Worker(dataclasses.replace(spec, engine=engine))


def test_a_fit_that_loses_the_retain_set_ends_early_and_is_infeasible(worker: Worker) -> None:
    before = {name: p.detach().clone() for name, p in worker.loaded.model.named_parameters()}
    lost = worker.run({"learning_rate": 0.01})
    assert [check.epochs for check in lost.checks] == [3, 6]
    assert len(lost.losses) == 6
    assert lost.evaluation.scores["retain_rouge1"] < 0.4
    whole = worker.run({"learning_rate": 0.01}, bounded=False)
    assert (len(whole.losses), whole.checks) == (12, ())
    for name, parameter in worker.loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_looking_at_a_fit_changes_no_score(worker: Worker) -> None:
    """A setting that keeps the floor is asked everything, bounded or not."""
    looked = worker.run({"learning_rate": 3e-4})
    alone = worker.run({"learning_rate": 3e-4}, bounded=False)
    assert (len(looked.checks), alone.checks) == (3, ())
    assert looked.evaluation.scores == alone.evaluation.scores
    assert looked.losses == alone.losses


def test_the_looks_at_a_fit_come_with_a_tasks_outcome(worker: Worker) -> None:
    runner = TaskRunner(worker.spec)
    runner._worker = worker
    outcome = runner.run(Task(kind=TRIAL, number=1, parameters={"learning_rate": 3e-4}))
    runner.close()
    assert outcome.result is not None
    assert [check.epochs for check in outcome.result.checks] == [3, 6, 9]


# A whole search


@pytest.fixture(scope="module")
def search(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Callable[[Path], Path]
) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("gradient")
    space = folder / "space.yaml"
    space.write_text(
        "npo:\n  lora:\n    parameters:\n"
        "      learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}\n"
        "      retain_weight: {type: choice, values: [0.0, 1.0]}\n"
        "    starting_points:\n      - {learning_rate: 1e-3, retain_weight: 1.0}\n"
    )
    options = ["--method", "npo", "--fix", "epochs=8", "--space", str(space), "--num-trials", "3"]
    options += ["--factual-data", "none"]
    empty_store(folder / "runs" / "mlflow.db")
    done = run_command("search", *options, "--output", "runs", "--name", "npo", cwd=folder)
    return done, folder


def test_a_gradient_search_finds_a_setting_that_forgets_and_keeps(
    search: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = search
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = rows_of(folder / "runs" / "npo")
    assert [row["state"] for row in rows] == ["complete"] * 3
    assert rows[0]["params.learning_rate"] == 1e-3
    assert rows[0]["params.retain_weight"] == 1.0
    best = read_yaml(folder / "runs" / "npo" / "best.yaml")
    assert (best["method"], best["solver"]) == ("npo", "lora")
    assert best["confirmed"]["scores"]["retain_rouge1"] >= 0.8
    assert best["confirmed"]["scores"]["forget_rouge1"] < 0.5
    assert statuses(folder / "runs") == (["FINISHED"], ["FINISHED"] * 3)


def test_the_printed_command_writes_a_plain_model_with_its_scores(
    search: tuple[subprocess.CompletedProcess[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is added to the weights: rounding may differ, and with it a word or two."""
    done, folder = search
    line = next(line for line in done.stdout.splitlines() if "lunar_tune.export" in line)
    name, *arguments = shlex.split(line)[2:]
    assert name == "lunar_tune.export"
    monkeypatch.chdir(folder)
    assert COMMAND.main(arguments) == 0
    exported = json.loads((folder / "runs" / "npo" / "model" / "export.json").read_text())
    best = read_yaml(folder / "runs" / "npo" / "best.yaml")
    assert exported["proven"] is True
    for name in ("forget_rouge1", "retain_rouge1"):
        assert exported["scores"][name] == pytest.approx(
            best["confirmed"]["scores"][name], abs=0.01
        )
    assert (folder / "runs" / "npo" / "model" / "model.safetensors").is_file()
