"""The command that opens the comparison: which store, which runs, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import psutil
import pytest
from command_lines import Result, command, start, without_ray
from filelock import FileLock
from rich.console import Console
from tracked_searches import SCORES, begun_study, make_search

from lunar_tune.cli.compare import COMMAND, _show
from lunar_tune.errors import InputError
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import Folder
from lunar_tune.tracking.store import store_of
from lunar_tune.tracking.ui import Compared

# MLflow and SQLAlchemy leave a store's connections to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
    pytest.mark.slow,
]


def invoke(*arguments: str | Path) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return without_ray(COMMAND, *arguments)


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
    process = start(command("compare", *arguments), cwd=cwd)
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
        process, address = started(["--output", "moved"], tmp_path)
        try:
            server, ids, _ = compared(address)
            found = [asked(server, f"runs/get?run_id={one}")["run"] for one in ids]
        finally:
            end(process, signal.SIGTERM)
    finally:
        (runs / "away.db").rename(runs / "mlflow.db")
    tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in found]
    assert [one["lunar_tune.trial_of"] for one in tags] == ["id-of-one"] * len(SCORES)


def test_searches_on_a_server_are_compared_there(server: str, tmp_path: Path) -> None:
    """Nothing is started: the command prints the address and is over."""
    folders = [make_search(tmp_path, name, server) for name in ("one", "two")]
    result = invoke(*(folder.path for folder in folders))
    assert result.exit_code == 0, result.output
    address = next(line for line in result.stdout.splitlines() if " trials: " in line)
    at, ids, _ = compared(address.partition(" trials: ")[2])
    assert at == server
    assert len(set(ids)) == 2 * len(SCORES)
    assert "starting" not in result.stdout
    keys = re.findall(r"charts of \w+: \S+viewStateShareKey=([\w-]+)&", result.stdout)
    experiment = asked(server, "experiments/get-by-name?experiment_name=lunar-tune")["experiment"]
    tags = {tag["key"]: tag["value"] for tag in experiment["tags"]}
    for key in keys:
        view = json.loads(tags[f"mlflow.sharedViewState.{key}"])
        parent = key.removeprefix("lunar-tune-")
        assert view["searchFilter"] == f"tags.`mlflow.parentRunId` = '{parent}'"
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

    def written(_: Any, __: str) -> list[Compared]:
        happened.append("trials")
        return [Compared(name="one", experiment="1", trials=["r"], view="a-view")]

    @contextmanager
    def served(_: str) -> Iterator[Any]:
        happened.append("server")
        yield "http://127.0.0.1:1", lambda: None

    monkeypatch.setattr("lunar_tune.cli.compare._written", written)
    monkeypatch.setattr("lunar_tune.tracking.ui.served", served)
    console = Console(file=(text := io.StringIO()))
    _show([], uri, console)
    assert happened == order
    assert shown in text.getvalue()
    assert "charts of one: " in text.getvalue()
    assert "s3cretpw" not in text.getvalue()
    assert "me:" not in text.getvalue()


def test_a_store_that_was_away_is_caught_up_with(server: str, tmp_path: Path) -> None:
    folder = make_search(tmp_path, "late", server, mirrored=False)
    with FileLock(folder.lock):  # the search still runs, and writes its runs itself
        said = refused(folder.path)
    assert f"late: {server} does not have its runs" in said
    assert "--save" in said
    result = invoke(folder.path)
    assert result.exit_code == 0, result.output
    assert f"{len(SCORES)} trials: {server}" in result.stdout


def test_a_search_without_scores_says_why_there_is_nothing_to_compare(tmp_path: Path) -> None:
    study = begun_study(Folder(tmp_path / "one"))
    said = refused(tmp_path / "one")
    assert "one: there is nothing to compare. No trial has ended yet. --save FILE" in said
    study.fail(study.ask()[0], "the loss is NaN", deterministic=True)
    said = refused(tmp_path / "one")
    assert "Every trial failed, most of them with: the loss is NaN" in said


def test_another_store_is_taken_with_its_password_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_search(tmp_path, "one", "http://me:***@host:5000", mirrored=False)
    search = SearchResults.read(folder.path)
    with pytest.raises(InputError, match=r"one: its store .* wants a password"):
        store_of(search)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    assert store_of(search) == "http://me:secret@host:5000"
    assert store_of(search, "http://host:1") == "http://host:1"
    uri = f"sqlite:///{tmp_path / 'mistyped.db'}"
    with pytest.raises(InputError, match="there is no such file"):
        store_of(search, uri)
    assert not (tmp_path / "mistyped.db").exists()
    said = refused(folder.path, "--tracking-uri", "http://127.0.0.1:9")
    assert "the MLflow store http://127.0.0.1:9 cannot be used" in said


def test_every_mistake_is_said_at_once(runs: Path, tmp_path: Path) -> None:
    said = refused("nosuch", "one", "neither", "--output", runs)
    assert "2 things are wrong" in said
    assert "nosuch: there is no such search" in said
    assert "neither: there is no such search" in said
    assert "runs has no search to compare" in refused("--output", tmp_path / "runs")
    assert "is a folder, not a file" in refused(runs / "one", "--save", tmp_path)
