"""The command that opens the comparison: which store, which runs, and nothing left behind.

Searches on a tracking server, and what the views list: `test_tracking`.
"""

from __future__ import annotations

import html
import io
import json
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import command_lines
import psutil
import pytest
from command_lines import command, pages_shown, start
from rich.console import Console
from tracked_searches import begun_study, make_search

from lunar_tune.cli.compare import _show
from lunar_tune.cli.compare import compare as COMMAND
from lunar_tune.errors import InputError
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import Folder
from lunar_tune.tracking.address import store_of
from lunar_tune.tracking.ui import View

refused = partial(command_lines.refused, COMMAND)

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's warnings


def asked(address: str) -> str:
    """Return what a server answers, the status and a blank before it."""
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return f"{answer.status} {answer.read().decode()}"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()}"


def test_the_ui_shows_the_search_written_to_last_until_an_interrupt(
    tmp_path: Path, empty_store: Callable[[Path], Path]
) -> None:
    """Its store lies beside it: both were moved to another folder. No process is left."""
    empty_store(tmp_path / "runs" / "mlflow.db")
    for name in ("one", "two"):
        make_search(tmp_path / "runs", name)
    (tmp_path / "runs").rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "two" / "study.journal", (1, 1))
    process = start(command("compare", "--output", "moved"), cwd=tmp_path)
    pages = pages_shown(process)
    assert list(pages) == ["charts of one", "trials of one", "all trials", "all searches"]
    assert all(len(page) < 240 for page in pages.values())
    server, token = pages["all trials"].partition("/#/")[0].rsplit("/", 1)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server)
    assert len(token) >= 43, "256 bits"
    name = "api/2.0/mlflow/experiments/get-by-name?experiment_name=lunar-tune"
    assert asked(f"{server}/{name}").startswith("403 this is not the whole address")
    experiment = json.loads(asked(f"{server}/{token}/{name}").removeprefix("200 "))["experiment"]
    assert f"/#/experiments/{experiment['experiment_id']}/runs?" in pages["charts of one"]
    views = [tag["key"].rpartition(".")[2] for tag in experiment["tags"]]
    assert all(re.search("viewStateShareKey=([^&]+)", page)[1] in views for page in pages.values())

    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) >= 2
    assert not any(token in " ".join(one.cmdline()) for one in family)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, ""), output
    psutil.wait_procs(family[1:], timeout=10)
    assert [one for one in family if one.is_running()] == []
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server, timeout=5)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["moved"]


def test_runs_are_looked_up_before_a_server_starts_and_no_login_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that starts brings an older store up to date: nothing else may open it then."""
    happened = MagicMock()
    happened.written.return_value = [View("charts of one", "1", "a-view")]
    happened.served.return_value.__enter__.return_value = "http://127.0.0.1:1", lambda: None
    monkeypatch.setattr("lunar_tune.cli.compare._written", happened.written)
    monkeypatch.setattr("lunar_tune.tracking.ui.served", happened.served)
    opened: list[str] = []

    def browse(address: str) -> None:
        if address.startswith("file:"):  # a command line shows to every user of the machine
            file = Path(address.removeprefix("file://"))
            assert file.stat().st_mode & 0o777 == 0o600
            address = re.search('url=([^"]+)"', file.read_text())[1]
            address = f"by a file: {html.unescape(address)}"
        opened.append(address)

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.open", browse)
    http, database = "http://me:s3cretpw@host:5000", "postgresql://me:s3cretpw@there/db"
    for uri in (http, "sqlite:////runs/mlflow.db", database):
        _show([], uri, Console(file=(text := io.StringIO()), width=200))
        assert ("are shown of a sqlite store alone" in text.getvalue()) == (uri == database)
        place = "host:5000" if uri == http else "127.0.0.1:1"
        assert f"charts of one: http://{place}/#/" in text.getvalue()
        assert "s3cretpw" not in text.getvalue()
        assert "me:" not in text.getvalue()
    assert [one[0] for one in happened.method_calls] == ["written", *(2 * ["written", "served"])]
    remote, own, _ = opened
    assert remote.startswith("http://host:5000/#/experiments/1/runs?viewStateShareKey=a-view&")
    assert own.startswith("by a file: http://127.0.0.1:1/#/experiments/1/runs?viewStateShareKey=")


def test_another_store_is_taken_with_its_password_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_search(tmp_path, "one", "http://me:***@host:5000", mirrored=False)
    search = SearchResults.read(folder.path)
    refusal = r"one: was searched with --tracking-uri 'http://me:\*\*\*@host:5000'\."
    with pytest.raises(InputError, match=refusal):
        store_of(search)
    with pytest.raises(InputError, match=r"one: the store .* needs a password"):
        store_of(search, "http://me:***@host:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    assert store_of(search) == "http://me:secret@host:5000"
    assert store_of(search, "http://host:1") == "http://host:1"
    uri = f"sqlite:///{tmp_path / 'mistyped.db'}"
    with pytest.raises(InputError, match="there is no such file"):
        store_of(search, uri)
    assert not (tmp_path / "mistyped.db").exists()


def test_every_mistake_is_said_at_once(tmp_path: Path) -> None:
    begun_study(Folder(tmp_path / "runs" / "one"))
    said = refused("nosuch", "one", "--output", tmp_path / "runs")
    assert "2 things are wrong" in said
    assert "nosuch: there is no such search" in said
    nothing = "one: there is nothing to compare. No trial has ended yet. --save FILE"
    assert nothing in said
    assert "empty has no search to compare" in refused("--output", tmp_path / "empty")
    said = refused(tmp_path / "runs" / "one", "--save", tmp_path)
    assert "is a folder, not a file" in said
