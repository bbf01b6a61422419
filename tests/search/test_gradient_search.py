"""A search of a gradient method on the tiny model, and what ends its fits early.

Does not cover: the outputs that every search has (`test_search_run`).
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_lines import run_command
from optuna.trial import TrialState
from search_results import rows_of, statuses
from test_course import Heard
from test_study import frozen
from typer.testing import CliRunner

from lunar_tune.cli.export import export
from lunar_tune.cli.running import command_app
from lunar_tune.config.gradient_settings import GradientSettings
from lunar_tune.config.run_options import EngineSettings, RunOptions
from lunar_tune.search.backends.ray.trainable import PENALISED, UnlearningTrainable
from lunar_tune.study.rows import PRUNED
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.checks import Check, Watch
from lunar_tune.trial.worker import Worker

pytestmark = pytest.mark.slow  # a search of its own

SEEN = {"epochs": 4, "forget_rouge1": 0.5, "retain_rouge1": 0.25}


# Looks


def test_a_fit_is_looked_at_at_even_distances_and_not_after_its_last_epoch() -> None:
    def due(n_epochs: int, n_checks: int, floor: float | None = 0.8) -> list[int]:
        watch = Watch(n_epochs, n_checks, floor)
        return [epoch for epoch in range(1, n_epochs + 1) if watch.is_due(epoch)]

    assert due(20, 4) == [4, 8, 12, 16]
    assert due(20, 1) == [10]
    assert due(3, 10) == [1, 2]
    assert due(1, 4) == due(20, 0) == due(20, 4, floor=None) == []


@pytest.mark.parametrize(
    ("retain", "lost"),
    [
        ([], False),
        ([0.39], False),
        ([0.39, 0.39], True),
        ([0.39, 0.41], False),
        ([0.9, 0.4], False),
        ([0.2, 0.9, 0.39, 0.0], True),
    ],
)
def test_a_fit_is_lost_below_half_of_the_floor_twice_in_a_row(
    retain: list[float], lost: bool
) -> None:
    seen = [Check(epochs=i, forget_rouge1=0.0, retain_rouge1=r) for i, r in enumerate(retain)]
    assert Watch(20, 4, 0.8, seen).is_lost is lost


def tiny_worker(**engine: Any) -> Worker:
    from lunar_tune.config.decoding_settings import DecodingSettings
    from lunar_tune.trial.assemble import materialise

    options = RunOptions(
        method="ga",
        factual_data="none",
        evaluation_rows=24,
        gradient=GradientSettings(epochs=12),
        decoding=DecodingSettings(max_new_tokens=None),
        engine=EngineSettings(early_exit=True, **engine),
    )
    return Worker(materialise(assemble(options)))


@pytest.fixture(scope="module")
def worker() -> Worker:
    """Return a worker whose fits are looked at; what it has run leaves no trace in its model."""
    return tiny_worker(retain_floor=0.8, checks=5)


def test_a_fit_that_loses_the_retain_set_ends_early_and_is_infeasible(worker: Worker) -> None:
    before = {name: p.detach().clone() for name, p in worker.loaded.model.named_parameters()}
    lost = worker.run({"learning_rate": 0.01})
    assert [check.epochs for check in lost.checks] == [2, 4]
    assert lost.fit is not None
    assert len(lost.fit.losses) == 4
    assert lost.evaluation.scores["retain_rouge1"] < 0.4
    whole = worker.run({"learning_rate": 0.01}, bounded=False)
    assert whole.fit is not None
    assert (len(whole.fit.losses), whole.checks) == (12, ())
    trial = worker.trial({"learning_rate": 0.01})
    assert next(trial) == lost.checks[0]
    trial.close()
    for name, parameter in worker.loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_looking_at_a_fit_changes_no_score(worker: Worker) -> None:
    looked = worker.run({"learning_rate": 3e-4})
    alone = tiny_worker(retain_floor=0.8, checks=0).run({"learning_rate": 3e-4})
    assert len(looked.checks) == 5
    assert looked.evaluation.scores == alone.evaluation.scores
    assert looked.fit == alone.fit


# Ended from outside


def test_a_trial_that_a_scheduler_ends_is_pruned_and_no_failure(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    heard.vanilla()
    heard.trial("one", {"number": 0, "done": False, **SEEN})
    row = heard.study.row(0)
    assert row.state == PRUNED
    assert row.failure == "pruned after 4 epochs: forget 0.500, retain 0.250 on samples"
    assert (row.scores, row.feasible) == ({}, None)
    heard.trial("two", {"number": 1, "done": False, **SEEN})
    assert not heard.course.gave_up
    assert [trial.state for trial in frozen(tmp_path)] == [TrialState.PRUNED] * 2


def test_a_worker_takes_a_step_for_each_look_and_puts_the_model_back(
    tmp_path: Path, worker: Worker
) -> None:
    before = {name: p.detach().clone() for name, p in worker.loaded.model.named_parameters()}
    trainable = UnlearningTrainable.__new__(UnlearningTrainable)
    task = {"task": "trial", "number": 0, "parameters": {"learning_rate": 3e-4}}
    trainable.setup(task, spec=worker.spec, folder=tmp_path)
    trainable._worker = worker
    first = trainable.step()
    assert (first["done"], first["epochs"]) == (False, 2)
    missed = max(0.0, 0.8 - first["retain_rouge1"])
    assert first[PENALISED] == pytest.approx(first["forget_rouge1"] + 3 * missed)
    trainable.reset_config(task | {"number": 1})  # as Ray does when a scheduler has ended it
    for name, parameter in worker.loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])
    steps = [trainable.step() for _ in range(6)]
    assert [one["done"] for one in steps] == [False] * 5 + [True]
    kept = json.loads(steps[-1]["report"])
    assert [check["epochs"] for check in kept["checks"]] == [2, 4, 6, 8, 10]
    assert (tmp_path / "trials" / "00001.parquet").is_file()


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
    options = ["--method", "npo", "--epochs", "8", "--space", str(space), "--num-trials", "3"]
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
    best = yaml.safe_load((folder / "runs" / "npo" / "best.yaml").read_text())
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
    written = CliRunner().invoke(command_app(export), arguments, env={"TERM": "dumb"})
    assert written.exit_code == 0, written.output
    exported = json.loads((folder / "runs" / "npo" / "model" / "export.json").read_text())
    best = yaml.safe_load((folder / "runs" / "npo" / "best.yaml").read_text())
    assert exported["proven"] is True
    for name in ("forget_rouge1", "retain_rouge1"):
        assert exported["scores"][name] == pytest.approx(
            best["confirmed"]["scores"][name], abs=0.01
        )
    assert (folder / "runs" / "npo" / "model" / "model.safetensors").is_file()
