"""Searches that do not end well: each ends with its own exit code and leaves everything closed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_lines import SMALL_SPACE, command, finish, run_command, start, without_ray
from search_results import rows_of, statuses

from lunar_tune.cli.search import COMMAND
from lunar_tune.yaml_files import read_yaml

DIVERGING = """
lunar:
  adamw:
    parameters:
      layer: {type: int, low: 0, high: 2}
      coefficient: {type: float, low: 0.5, high: 4.0}
      learning_rate: {type: fixed, value: 1e30}
"""


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, empty_store: Callable[[Path], Path]) -> None:
    empty_store(tmp_path / "runs" / "mlflow.db")


def space(folder: Path, text: str) -> list[str]:
    path = folder / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--space", str(path)]


def place(folder: Path) -> list[str]:
    return ["--output", str(folder / "runs"), "--name", "n"]


def journal_events(folder: Path) -> Sequence[dict[str, Any]]:
    lines = (folder / "runs/n/study.journal").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.alone
def test_a_model_that_does_not_know_the_data_is_refused(small: list[str], tmp_path: Path) -> None:
    done = run_command("search", *small, *place(tmp_path), cwd=tmp_path)

    assert done.returncode == 2, done.stderr
    for part in ("below the floor of 0.8", "fine-tune it", "--force"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs/n").exists(), "the name stays free"
    assert statuses(tmp_path / "runs") == ([], []), "there is no search to show"


@pytest.mark.alone
def test_a_search_whose_trials_all_fail_gives_up(small: list[str], tmp_path: Path) -> None:
    options = [*small, *place(tmp_path), *space(tmp_path, DIVERGING), "--force"]
    done = run_command("search", *options, "--num-trials", "8", cwd=tmp_path)

    assert done.returncode == 4, done.stderr
    rows = rows_of(tmp_path / "runs/n")
    assert [row["state"] for row in rows] == ["failed"] * 5
    for row in rows:
        assert row["failure"]
        assert row["forget_rouge1"] is row["feasible"] is None
        assert f"- {row['number']}: {row['failure']}" in (tmp_path / "runs/n/report.md").read_text()
    assert done.stdout.count("failed: ") == 5
    assert statuses(tmp_path / "runs") == (["FINISHED"], ["FAILED"] * 5)
    kept = [path.name for path in (tmp_path / "runs/n").glob("trials/*")]
    assert kept == ["baseline.parquet"]


@pytest.mark.alone
def test_a_search_that_is_terminated_with_all_its_processes_writes_what_it_has(
    small: list[str], tmp_path: Path
) -> None:
    """As `timeout` and schedulers of clusters do: Ray's own processes end at the same moment."""
    options = [*small, *place(tmp_path), *space(tmp_path, SMALL_SPACE), "--force"]
    process = start(command("search", *options, "--num-trials", "5000"), cwd=tmp_path)
    assert process.stdout is not None
    assert any(line.startswith("2/") for line in process.stdout)
    os.killpg(process.pid, signal.SIGTERM)
    done = finish(process)

    assert done.returncode == 130, done.stderr
    rows = rows_of(tmp_path / "runs/n")
    assert sum(row["state"] == "complete" for row in rows) >= 2
    for name in ("report.md", "pictures/trade_off.png"):
        assert (tmp_path / "runs/n" / name).stat().st_size > 0
    parents, children = statuses(tmp_path / "runs")
    assert (parents, len(children)) == (["KILLED"], len(rows))


@pytest.mark.alone
def test_an_interrupted_search_writes_what_it_has_and_leaves_nothing_open(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal goes to all that the command started, as that of Ctrl-C in a terminal; twice."""
    options = [*small, *place(tmp_path), *space(tmp_path, SMALL_SPACE), "--force"]
    process = start(command("search", *options, "--num-trials", "5000"), cwd=tmp_path)
    assert process.stdout is not None
    assert any(line.startswith("2/") for line in process.stdout)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.4)
    done = finish(process)

    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "ending; 2 more to end at once" in done.stderr
    assert [p.cmdline() for p in psutil.process_iter() if tmp_path.name in str(p.cmdline())] == []
    log = (tmp_path / "runs/n/search.log").read_text(encoding="utf-8")
    for said in (
        "data: pairs: forget A_B",
        "2/5000  trial ",
        "WARNING interrupted",
        "exit code 130",
    ):
        assert said in log
    rows = rows_of(tmp_path / "runs/n")
    assert len(rows) >= 2
    assert {row["state"] for row in rows} <= {"complete", "failed"}
    failures = [row["failure"] for row in rows if row["state"] == "failed"]
    assert failures in ([], ["interrupted"])
    parents, children = statuses(tmp_path / "runs")
    assert parents == ["KILLED"]
    assert len(children) == len(rows)
    assert set(children) <= {"FINISHED", "FAILED"}
    for name in ("config.yaml", "report.md", "pictures/trade_off.png", "pictures/history.svg"):
        assert (tmp_path / "runs/n" / name).stat().st_size > 0
    assert read_yaml(tmp_path / "runs/n/config.yaml")["options"]
    assert journal_events(tmp_path), "every line of the journal can be read"

    monkeypatch.chdir(tmp_path)
    again = without_ray(COMMAND, *options)
    assert again.exit_code == 2
    assert "exists already. Go on with it (python -m lunar_tune.search --resume" in again.stderr

    wanted = sum(row["state"] == "complete" for row in rows) + 2
    resume = ["--resume", "n", "--output", "runs", "--num-trials", str(wanted)]
    done = run_command("search", *resume, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    after = rows_of(tmp_path / "runs/n")
    assert after[: len(rows)] == rows, "what was computed is kept"
    new = after[len(rows) :]
    assert [row["state"] for row in new] == ["complete"] * 2
    if failures:
        interrupted = next(row for row in rows if row["again"])
        for name in ("params.layer", "params.coefficient", "params.learning_rate"):
            assert new[0][name] == interrupted[name], "the interrupted setting comes first"
    finished = without_ray(COMMAND, *resume)
    assert finished.exit_code == 3
    assert "n is finished" in finished.stdout


@pytest.mark.alone
def test_the_same_seed_gives_the_same_trials_and_scores(small: list[str], tmp_path: Path) -> None:
    """On one worker and a CPU; times and dates differ. The two run side by side."""
    options = [*small, *space(tmp_path, SMALL_SPACE), "--force", "--num-trials", "9"]
    options += ["--output", "runs", "--concurrency", "1", "--seed", "5"]
    names = ("one", "two")
    both = [start(command("search", *options, "--name", name), cwd=tmp_path) for name in names]
    found = []
    for name, process in zip(names, both, strict=True):
        done = finish(process)
        assert done.returncode == 3, done.stderr
        again = done.stdout.splitlines()[-1]
        assert again.endswith(" --seed 6")
        assert again.count("--seed") == 1
        timed = ("seconds", "started", "ended")
        rows = rows_of(tmp_path / "runs" / name)
        found.append([{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows])
    assert found[0] == found[1]
    assert len({row["answers_digest"] for row in found[0]}) > 1
    assert statuses(tmp_path / "runs") == (["FINISHED"] * 2, ["FINISHED"] * 18)
