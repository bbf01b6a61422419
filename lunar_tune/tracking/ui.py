"""MLflow's own UI: a server as long as someone looks at it, and the pages that show searches."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode

from lunar_tune.errors import LunarTuneError
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.store import sqlite_file
from lunar_tune.tracking.sync import completed_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["Compared", "addresses", "compared", "served"]

_HOST = "127.0.0.1"
# A start takes 4 to 5 s on two cores with one worker, 8 to 9 s with MLflow's four.
_PATIENCE, _GRACE = 120.0, 10.0
_OFF = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # of agents; it would start more processes
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_SECTION = "lunar-tune"


class Compared(NamedTuple):
    """A search as MLflow shows it."""

    name: str
    experiment: str
    trials: list[str]
    """Ids of its completed trials' runs."""
    view: str | None
    """Key of the view of them that is kept with the experiment; None where the store refuses it."""


def compared(client: MlflowClient, search: StoredSearch) -> Compared | None:
    """Keep a search's view in a store; None where that has no run of a completed trial.

    It is what MLflow 3.17 keeps with an experiment when a user shares a view, written beforehand:
    the page takes no axes from its address and would open with one metric.
    """
    from mlflow.exceptions import MlflowException

    parent, runs = completed_runs(client, search)
    if parent is None or not runs:
        return None
    experiment = parent.info.experiment_id
    key: str | None = f"{_SECTION}-{parent.info.run_id}"
    view = json.dumps(_view(search, parent.info.run_id, runs))
    try:
        client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", view)
    except MlflowException:  # a server may let its users read alone
        key = None
    return Compared(search.folder.name, experiment, [run.info.run_id for run in runs], key)


def _view(search: StoredSearch, parent: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the page's state: all trials in parallel coordinates, and two scores as a scatter."""
    goal, measured = search.goal, set.intersection(*(set(run.data.metrics) for run in runs))
    varied = [
        name
        for name in runs[0].data.params
        if len({run.data.params.get(name) for run in runs}) > 1 or len(runs) == 1
    ]
    logarithms = {name: f"log10_{name}" for name in varied if f"log10_{name}" in measured}
    names = dict.fromkeys((*goal.metrics, "forget_rouge1", "retain_rouge1"))
    scores = [name for name in names if name in measured]
    charts: dict[str, dict[str, Any]] = {
        "PARALLEL": {
            "selectedParams": [name for name in varied if name not in logarithms],
            "selectedMetrics": [*logarithms.values(), *scores, "feasible"],
            "showAllRuns": True,
        },
        "SCATTER": {
            axis: {"key": key, "type": "METRIC"}
            for axis, key in zip(("xaxis", "yaxis"), scores, strict=False)
        },
    }
    own = {"deleted": False, "isGenerated": False}
    section = {"display": True, "columns": 1, "cardHeight": 480, "isReordered": False, **own}
    return {
        # Ordered by start, the page would nest the trials below their search and draw that alone.
        "orderByKey": f"metrics.`{scores[0]}`",
        "orderByAsc": goal.objective.direction == "minimize",
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'",
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [
            {"type": kind, "uuid": f"{_SECTION}-{kind}", "metricSectionId": _SECTION, **own, **more}
            for kind, more in charts.items()
        ],
        "compareRunSections": [{"uuid": _SECTION, "name": search.folder.name, **section}],
    }


def addresses(server: str, found: Sequence[Compared]) -> tuple[list[tuple[str, str]], str]:
    """Return pages of MLflow's UI, each with what it shows, and the one to open.

    That is the comparison of all trials, or the charts of a search that is alone.
    """

    def page(path: str, **query: str) -> str:
        # MLflow 3.17 shows every experiment as one of agents until it is told otherwise.
        asked = urlencode(query | {"workflowType": "machine_learning"}, quote_via=quote)
        return f"{server.rstrip('/')}/#/{path}?{asked}"

    trials = [run for one in found for run in one.trials]
    experiments = sorted({one.experiment for one in found})
    compact = json.JSONEncoder(separators=(",", ":")).encode
    comparison = page("compare-runs", runs=compact(trials), experiments=compact(experiments))
    views = [(one.name, one.experiment, one.view) for one in found if one.view is not None]
    charts = [
        (
            f"charts of {search}",
            page(f"experiments/{one}/runs", viewStateShareKey=view, compareRunsMode="CHART"),
        )
        for search, one, view in views
    ]
    runs = [("all runs", page(f"experiments/{one}/runs")) for one in experiments]
    pages = [(f"{len(trials)} trials", comparison), *charts, *runs]
    return pages, charts[0][1] if len(charts) == 1 else comparison


@contextmanager
def served(uri: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Inside, a server for a store answers; it ends with all of its processes.

    What is given is its address, and what waits until it ends. Ctrl-C and, from then on in this
    process, a signal to terminate leave the block.

    Raises:
        LunarTuneError: It does not start, or has ended by itself.
    """
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port)]
    command += ["--workers", "1", "--no-serve-artifacts"]
    places = {"MLFLOW_BACKEND_STORE_URI": uri}  # no argument: it may have a password
    if (file := sqlite_file(uri)) is not None:
        places["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = str(file.parent / "mlartifacts")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 our own interpreter
            command,
            env={**kept, **_OFF, **places},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + _PATIENCE
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise LunarTuneError(f"MLflow's server did not start:\n{_last_words(log)}")
                time.sleep(0.1)
            with suppress(KeyboardInterrupt):
                yield f"http://{_HOST}:{port}", process.wait
                raise LunarTuneError(f"MLflow's server has ended:\n{_last_words(log)}")
        finally:
            _end(process)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")[-2000:].strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(_GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
