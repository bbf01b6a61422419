"""The command that opens the comparison: which store, which runs, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import psutil
import pytest
from command_lines import command, start
from rich.console import Console
from tracked_searches import SCORES, make_search
from typer.testing import CliRunner, Result

from lunar_tune.cli.compare import _show, compare
from lunar_tune.cli.running import command_app
from lunar_tune.study.study import StoredStudy
from lunar_tune.tracking.mirror import Mirror

# MLflow and SQLAlchemy leave a store's connections to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
    pytest.mark.slow,
]


def invoke(*arguments: str | Path) -> Result:
    environment = {"COLUMNS": "160", "TERM": "dumb"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(command_app(compare), list(map(str, arguments)), env=environment)


def refused(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, empty_store: Callable[[Path], Path]) -> Path:
    """Return a folder of two searches that share a store; `two` was written to last."""
    output = tmp_path_factory.mktemp("runs")
    empty_store(output / "mlflow.db")
    for name in ("one", "two"):
        make_search(output, name)
    return output


def compared(address: str) -> tuple[str, list[str], list[str]]:
    """Return the server of a comparison's address, its runs and its experiments."""
    server, _, query = address.partition("/#/compare-runs?")
    parts = parse_qs(query, strict_parsing=True)
    return server, json.loads(parts["runs"][0]), json.loads(parts["experiments"][0])


def started(arguments: Sequence[str], cwd: Path) -> tuple[subprocess.Popen[str], str]:
    """Start the command and return it with the address that it prints."""
    process = start(command("compare", "--no-open", *arguments), cwd=cwd)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"^\d+ trials: (http\S+)", line):
            return process, found[1]
    raise AssertionError(process.communicate()[1])


def asked(server: str, what: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server}/api/2.0/mlflow/{what}", timeout=30) as answer:
        return dict(json.load(answer))


def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Tell the command to end; nothing that it started may be left."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) >= 2
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, ""), output
    psutil.wait_procs(family[1:], timeout=10)
    assert [one for one in family if one.is_running()] == []


def test_the_ui_has_the_trials_until_an_interrupt(runs: Path, tmp_path: Path) -> None:
    process, address = started([str(runs / "one")], tmp_path)
    try:
        server, ids, experiments = compared(address)
        trials = [asked(server, f"runs/get?run_id={one}")["run"] for one in ids]
    finally:
        end(process, signal.SIGINT)
    with pytest.raises(urllib.error.URLError):
        asked(server, "experiments/search")

    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server)
    scores = [{m["key"]: m["value"] for m in trial["data"]["metrics"]} for trial in trials]
    assert [(s["forget_rouge1"], s["retain_rouge1"]) for s in scores] == list(SCORES)
    assert {trial["info"]["experiment_id"] for trial in trials} == set(experiments)
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_the_search_written_to_last_is_compared(runs: Path, tmp_path: Path) -> None:
    """Its store lies beside it: both were moved to another folder."""
    moved = tmp_path / "moved"
    shutil.copytree(runs, moved)
    os.utime(moved / "two" / "study.journal", (1, 1))
    (runs / "mlflow.db").rename(runs / "away.db")
    try:
        process, address = started(["--runs", "moved"], tmp_path)
        try:
            server, ids, _ = compared(address)
            found = [asked(server, f"runs/get?run_id={one}")["run"] for one in ids]
        finally:
            end(process, signal.SIGTERM)
    finally:
        (runs / "away.db").rename(runs / "mlflow.db")
    tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in found]
    note = StoredStudy.read(moved / "one" / "study.journal")
    assert note is not None
    assert [one["mlflow.parentRunId"] for one in tags] == [note.notes["mlflow"]["run_id"]] * len(
        SCORES
    )


def test_searches_on_a_server_are_compared_there(server: str, tmp_path: Path) -> None:
    """Nothing is started: the command prints the address and is over."""
    folders = [make_search(tmp_path, name, server) for name in ("one", "two")]
    result = invoke("--no-open", *(folder.path for folder in folders))
    assert result.exit_code == 0, result.output
    address = next(line for line in result.stdout.splitlines() if " trials: " in line)
    at, ids, _ = compared(address.partition(" trials: ")[2])
    assert at == server
    assert len(set(ids)) == 2 * len(SCORES)
    assert "starting" not in result.stdout
    keys = re.findall(r"charts of \w+: \S+viewStateShareKey=([\w-]+)&", result.stdout)
    experiment = asked(server, "experiments/get-by-name?experiment_name=lunar-tune")["experiment"]
    tags = {tag["key"]: tag["value"] for tag in experiment["tags"]}
    for key, folder in zip(keys, folders, strict=True):
        note = StoredStudy.read(folder.journal)
        assert note is not None
        view = json.loads(tags[f"mlflow.sharedViewState.{key}"])
        assert f"'{note.notes['mlflow']['run_id']}'" in view["searchFilter"]
        assert view["orderByKey"] == "metrics.`forget_rouge1`"
        plot = view["compareRunCharts"][0]
        assert set(plot["selectedParams"]) == {"layer", "coefficient"}
        assert plot["selectedMetrics"] == [
            "log10_learning_rate",
            "forget_rouge1",
            "retain_rouge1",
            "feasible",
        ]


@pytest.mark.parametrize(
    ("uri", "shown", "order"),
    [
        ("http://me:s3cretpw@host:5000", "http://host:5000/#/", ["trials"]),
        ("sqlite:////runs/mlflow.db", "http://127.0.0.1:1/#/", ["trials", "server"]),
    ],
)
def test_runs_are_looked_up_before_a_server_starts_and_no_login_is_shown(
    uri: str, shown: str, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that starts brings an older store up to date: nothing else may open it then."""
    happened: list[str] = []

    def trials(given: list[Mirror]) -> tuple[list[str], dict[Mirror, str]]:
        happened.append("trials")
        return ["r"], {given[0]: "a-view"}

    @contextmanager
    def served(_: str, *, port: int | None) -> Iterator[Any]:
        happened.append("server")
        nothing = {"wait_until_ready": lambda: port, "wait_until_interrupted": lambda: port}
        yield SimpleNamespace(address="http://127.0.0.1:1", **nothing)

    monkeypatch.setattr("lunar_tune.cli.compare._trials", trials)
    monkeypatch.setattr("lunar_tune.tracking.ui.served", served)
    console = Console(file=(text := io.StringIO()))
    mirror = Mirror(search="one", uri=uri, experiment_id="1", run_id="s")
    _show([mirror], console, port=None, opens=False)
    assert happened == order
    assert shown in text.getvalue()
    assert "charts of one: " in text.getvalue()
    assert "s3cretpw" not in text.getvalue()
    assert "me:" not in text.getvalue()


def test_a_store_that_has_lost_the_runs_is_named(server: str, runs: Path) -> None:
    said = refused("--no-open", runs / "one", "--tracking-uri", server)
    assert f"one: {server} has no run" in said
    assert "--static" in said


def test_every_mistake_is_said_at_once(runs: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused("nosuch", "one", "neither", "--runs", runs, "--port", str(port))
    assert "3 things are wrong" in said
    assert "nosuch: there is no such search" in said
    assert "neither: there is no such search" in said
    assert f"--port {port}: cannot be used" in said
    assert "runs has no search to compare" in refused("--runs", tmp_path / "runs")
    assert "--port 70000: a number from 1 to 65535" in refused(runs / "one", "--port", "70000")
    assert "is a folder, not a file" in refused(runs / "one", "--static", tmp_path)
