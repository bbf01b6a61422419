"""Searches of a random model: each ends with its own exit code and leaves everything closed.

And what none must write down: secrets ever, and texts of the data with --no-text.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from command_lines import SMALL_SPACE, Result, command, finish, small_data, start, without_ray
from search_results import rows_of, statuses

from lunar_tune.cli.search import search as COMMAND
from lunar_tune.report.results import SearchResults
from lunar_tune.yaml_files import read_yaml


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, empty_store: Callable[[Path], Path]) -> None:
    empty_store(tmp_path / "runs" / "mlflow.db")


def options(small: list[str], folder: Path) -> list[str]:
    (space := folder / "space.yaml").write_text(SMALL_SPACE, encoding="utf-8")
    return [*small, "--space", str(space), "--output", str(folder / "runs"), "--name", "n"]


def here(small: list[str], folder: Path, *more: str, **environment: str) -> Result:
    return without_ray(COMMAND, *options(small, folder), "--in-process", *more, **environment)


def interrupted(
    small: list[str], folder: Path, sent: signal.Signals, times: int
) -> subprocess.CompletedProcess[str]:
    """Send a signal to all processes of a search after its second trial.

    Before that its terminal is closed, which is no reason to stop, for Ray neither.
    """
    arguments = [*options(small, folder), "--force", "--num-trials", "5000"]
    process = start(command("search", *arguments), cwd=folder)
    assert any(line.startswith("1/") for line in process.stdout)
    os.killpg(process.pid, signal.SIGHUP)
    assert any(line.startswith("2/") for line in process.stdout)
    for _ in range(times):
        os.killpg(process.pid, sent)
        time.sleep(0.4)
    done = finish(process)

    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    rows = rows_of(folder / "runs/n")
    assert sum(row["state"] == "complete" for row in rows) >= 2
    for name in ("config.yaml", "report.md", "pictures/trade_off.png"):
        assert (folder / "runs/n" / name).stat().st_size > 0
    parents, children = statuses(folder / "runs")
    assert (parents, len(children)) == (["KILLED"], len(rows))
    assert set(children) <= {"FINISHED", "FAILED"}
    return done


def test_a_model_that_does_not_know_the_data_is_refused(small: list[str], tmp_path: Path) -> None:
    done = here(small, tmp_path)
    assert done.exit_code == 2, done.stderr
    assert "below the constraint of 0.8" in done.stderr
    assert not (tmp_path / "runs/n").exists(), "the name stays free"
    assert statuses(tmp_path / "runs") == ([], []), "there is no search to show"


def test_reference_prompts_that_the_model_answers_end_a_search(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it knows the data is said first; what was found is not asked for again."""
    asked = ["declined" if one == "never" else one for one in small]
    assert "below the constraint of 0.8" in here(asked, tmp_path).stderr
    done = here(asked, tmp_path, "--force")
    assert done.exit_code == 2, done.stderr
    assert "none of 2 reference prompts are declined by the base model" in done.stderr
    assert not (tmp_path / "runs/n").exists(), "the name stays free"
    answers = iter([True, False])
    monkeypatch.setattr("lunar_tune.trial.references.declines", lambda *_: next(answers))
    done = here(asked, tmp_path, "--force", "--num-trials", "1")
    assert done.exit_code in {0, 3}, done.stderr
    assert "reference prompts: 1 of 2 are declined and used; a direction" in done.stdout
    place = ("--in-process", "--resume", str(tmp_path / "runs/n"))
    done = without_ray(COMMAND, *place, "--num-trials", "2")
    assert done.exit_code in {0, 3}, done.stderr
    assert len(rows_of(tmp_path / "runs/n")) == 2


SENTINEL = "s3nt1nel"
SECRETS = (
    *("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN"),
)


def test_nothing_private_is_written_or_shown(small: list[str], tmp_path: Path) -> None:
    """In this process: what Ray writes lies elsewhere and ends with it."""
    output, secrets = tmp_path / "runs", {name: f"{SENTINEL}-{name.lower()}" for name in SECRETS}
    more = ("--force", "--num-trials", "2", "--no-text", "--seed", "1")
    done = here(small, tmp_path, *more, "--constrain", "retain_rouge1>=0", **secrets)
    assert done.exit_code == 0, done.stderr

    def holding(text: str) -> list[str]:
        files = [path for path in output.rglob("*") if path.is_file()]
        found = [str(path) for path in files if text.encode() in path.read_bytes()]
        found += [str(path) for path in files if text in str(path.relative_to(output))]
        return found + ["the screen"] * (text in done.output)

    assert "forget answers decline" in done.stdout, "answers were looked at"
    assert holding("retain_rouge1"), "the search for a text finds one that is there"
    for text in (SENTINEL, "What is item", "Kettle"):
        assert holding(text) == []

    data = json.loads(small_data(tmp_path).read_text())
    sets = {"forget": ["A_B"], "retain": ["B_C", "C_D"]}
    for name in ("baseline", "00000", "00001"):
        rows = pq.read_table(output / f"n/trials/{name}.parquet").to_pylist()
        assert [row["row"] for row in rows] == [0, 1, 2, *range(6)]
        for row in rows:
            scores = {"rouge1", "rouge_l", "ended", "typicality", "refused", "degenerate"}
            assert set(row) == {"set_name", "edge", "row", *scores}
            pairs = [pair for pair in data if pair["edge"] in sets[row["set_name"]]]
            assert pairs[row["row"]]["edge"] == row["edge"]
    answers = SearchResults.read(output / "n").answer_rows(0)
    assert {(row.question, row.truth, row.answer) for row in answers} == {("", "", "")}
    tables = list(output.glob("mlartifacts/**/answers.json"))
    assert len(tables) == 2
    for table in tables:
        assert json.loads(table.read_text())["columns"] == ["set", "edge", "rouge1"]


@pytest.mark.alone
@pytest.mark.ray
def test_a_search_that_is_terminated_writes_what_it_has(small: list[str], tmp_path: Path) -> None:
    """As `timeout` and schedulers of clusters do: Ray's own processes end at the same moment."""
    interrupted(small, tmp_path, signal.SIGTERM, 2)


@pytest.mark.alone
@pytest.mark.ray
def test_an_interrupted_search_leaves_nothing_open_and_goes_on(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal goes to all that the command started, as that of Ctrl-C in a terminal; twice."""
    done = interrupted(small, tmp_path, signal.SIGINT, 2)
    assert "ending; 2 more Ctrl-C to end at once" in done.stderr
    lines = [str(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"])]
    assert [line for line in lines if tmp_path.name in line] == []
    log = (tmp_path / "runs/n/search.log").read_text(encoding="utf-8")
    for said in (
        "going on because of --force: the base",
        "2/5000 ",
        "WARNING interrupted",
        "exit code 130",
    ):
        assert said in log
    rows = rows_of(tmp_path / "runs/n")
    failures = [row["failure"] for row in rows if row["state"] == "failed"]
    assert failures in ([], ["interrupted"])
    assert read_yaml(tmp_path / "runs/n/config.yaml")["options"]

    monkeypatch.chdir(tmp_path)
    again = here(small, tmp_path)
    assert again.exit_code == 2
    assert (
        "exists already. Resume that search (python -m lunar_tune.search --resume" in again.stderr
    )

    wanted = sum(row["state"] == "complete" for row in rows) + 2
    resume = ["--resume", "n", "--output", "runs", "--num-trials", str(wanted)]
    resumed = without_ray(COMMAND, *resume, "--in-process")
    assert resumed.exit_code == 3, resumed.stderr
    assert not (tmp_path / "runs/n/best.yaml").exists()
    after = rows_of(tmp_path / "runs/n")
    assert after[: len(rows)] == rows, "what was computed is kept"
    new = after[len(rows) :]
    assert [row["state"] for row in new] == ["complete"] * 2
    if failures:
        (lost,) = (row for row in rows if row["again"])
        names = [name for name in lost if name.startswith("params.")]
        assert [new[0][name] for name in names] == [lost[name] for name in names]
    finished = without_ray(COMMAND, *resume)
    assert finished.exit_code == 3
    assert "n is finished" in finished.stdout
