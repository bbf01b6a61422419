"""MLflow's own UI: a server as long as someone looks at it, and the pages that show searches."""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

from lunar_tune.errors import LunarTuneError
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking import ui_server
from lunar_tune.tracking.address import for_mlflow, sqlite_file
from lunar_tune.tracking.artifacts import beside
from lunar_tune.tracking.runs import SEARCH, TRIAL_OF

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_HOST = "127.0.0.1"
_PATIENCE, _GRACE = 120.0, 10.0  # seconds; a start takes 5 with one worker, 9 with MLflow's four
_OFF = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # of agents; it would start more processes
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_OURS = "lunar-tune"
_MOST_LISTED = 400  # ids of runs that a filter lists: an experiment's tag takes 20,000 characters
_WIDTHS = {"best": 60, "feasible": 80, "goal": 90, "layer": 70, "search": 160}  # pixels


class Shown(NamedTuple):
    """What a store has of a search."""

    search: StoredSearch
    parent: Run
    trials: list[Run]  # of its completed trials, at least one


class View(NamedTuple):
    """A page of MLflow's UI."""

    name: str
    experiment: str
    key: str | None  # of what is kept with the experiment; None where the store refuses it
    mode: str = "TABLE"  # or CHART

    def address(self, server: str) -> str:
        """Return its address, which has about 120 characters after the server's."""
        asked = {} if self.key is None else {"viewStateShareKey": self.key}
        # MLflow 3.17 shows every experiment as one of agents until it is told otherwise.
        asked |= {"compareRunsMode": self.mode, "workflowType": "machine_learning"}
        return f"{server.rstrip('/')}/#/experiments/{self.experiment}/runs?{urlencode(asked)}"


def keep_views(client: MlflowClient, found: Sequence[Shown]) -> list[View]:
    """Keep views of searches and of their experiments; return them, the one to open first.

    A view is what MLflow 3.17 keeps with an experiment when a user saves one, and lists under
    *Views*: its page takes neither columns nor axes from an address, and opens without a score.
    """
    views, lists = [], []
    for experiment in dict.fromkeys(one.parent.info.experiment_id for one in found):
        group = [one for one in found if one.parent.info.experiment_id == experiment]
        names = [one.search.folder.name for one in group]
        name = ", ".join(names) if len(names) < 4 else f"{len(names)} searches"
        parents = "".join(sorted(one.parent.info.run_id for one in group))
        key = hashlib.sha256(parents.encode()).hexdigest()[:12]
        kept = _keep(client, experiment, key, name, _trials(group, _of(group)))
        views.append(View(f"charts of {name}", experiment, kept, "CHART"))
        views.append(View(f"trials of {name}", experiment, kept))
        lists += keep_lists(client, experiment, group)
    return [*views, *lists]


def keep_lists(client: MlflowClient, experiment: str, group: Sequence[Shown]) -> list[View]:
    """Keep lists of all trials and all searches of an experiment, with the columns of some."""
    trials = _trials(group, f"tags.`{TRIAL_OF}` LIKE '%'")
    return [
        View(f"all {what}", experiment, _keep(client, experiment, what, f"all {what}", state))
        for what, state in (("trials", trials), ("searches", _searches(group)))
    ]


def _keep(
    client: MlflowClient, experiment: str, key: str, name: str, state: Mapping[str, Any]
) -> str | None:
    """Keep a view as MLflow's page does; return its key, None where the store refuses it."""
    from mlflow.exceptions import MlflowException

    key, now = f"{_OURS}-{key}", int(time.time() * 1000)
    view = {"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    try:
        client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", json.dumps(view))
    except MlflowException:  # a server may let its users read alone
        return None
    return key


def _of(group: Sequence[Shown]) -> str:
    """Return a filter for trials, of very many the best: MLflow has no OR, and IN of ids alone."""
    if len(group) == 1:  # those to come as well
        return f"tags.`mlflow.parentRunId` = '{group[0].parent.info.run_id}'"
    ids: list[str] = []
    for one in group:
        best = sorted(one.trials, key=lambda run: run.data.metrics.get("goal", math.inf))
        ids += [repr(run.info.run_id) for run in best[: _MOST_LISTED // len(group)]]
    return f"attributes.run_id IN ({','.join(ids)})"


def _list(searched: str, columns: Sequence[str]) -> dict[str, Any]:
    """Return a list of the runs that a filter finds, with columns in their order."""
    names = {column: column.split("`")[1] for column in columns}
    return {
        "searchFilter": searched,
        "selectedColumns": columns,
        "columnOrder": ["attributes.`Run Name`", *columns],
        "columnWidths": {k: _WIDTHS.get(name, 22 + 7 * len(name)) for k, name in names.items()},
    }


def _searches(group: Sequence[Shown]) -> dict[str, Any]:
    """Return a list of all searches with the scores of their best trials, the newest first."""
    scores = [f"best_{name}" for name in _scores(group)]
    columns = [f"metrics.`{name}`" for name in (*scores, "feasible", "num_trials")]
    columns += [f"tags.`{name}`" for name in ("model", "data", "method", "solver")]
    return _list(f"tags.`{SEARCH}` LIKE '%'", columns)


def _trials(group: Sequence[Shown], searched: str) -> dict[str, Any]:
    """Return a list of trials, the best first, and charts: all axes, and two scores."""
    runs = [run for one in group for run in one.trials]
    scores, names = _scores(group), dict.fromkeys(name for run in runs for name in run.data.params)
    values = {name: {run.data.params.get(name) for run in runs} for name in names}
    varied = [name for name in names if len(values[name]) > 1] or list(names)
    logarithms = {one: f"log10_{one}" for one in varied if f"log10_{one}" in runs[0].data.metrics}
    columns = ["tags.`best`", *(["tags.`search`"] if len(group) > 1 else [])]
    columns += [f"metrics.`{name}`" for name in (*scores, "feasible")]
    columns += [*(f"params.`{name}`" for name in varied), "metrics.`goal`"]
    parallel = {
        "selectedParams": [name for name in varied if name not in logarithms],
        "selectedMetrics": [*logarithms.values(), *scores, "feasible"],
        "showAllRuns": True,
    }
    axes = zip(("xaxis", "yaxis"), scores, strict=False)
    scatter = {axis: {"key": key, "type": "METRIC"} for axis, key in axes}
    own = {"deleted": False, "isGenerated": False}
    section = {"display": True, "columns": 1, "cardHeight": 480, "isReordered": False, **own}
    return {
        **_list(searched, columns),
        # Ordered by start, the page would nest the trials below their search.
        "orderByKey": "metrics.`goal`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [
            {"type": kind, "uuid": f"{_OURS}-{kind}", "metricSectionId": _OURS, **own, **more}
            for kind, more in (("PARALLEL", parallel), ("SCATTER", scatter))
        ],
        "compareRunSections": [{"uuid": _OURS, "name": "Trials", **section}],
    }


def _scores(group: Sequence[Shown]) -> list[str]:
    """Return the scores that goals speak of, and what is forgotten and kept."""
    goals = [name for one in group for name in one.search.goal.metrics]
    return list(dict.fromkeys((*goals, "forget_rouge1", "retain_rouge1")))


@contextmanager
def served(uri: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Inside, a server for a store answers; it ends with all of its processes.

    Given are its address, which has a token in it that nobody else knows, and what waits until it
    ends. An interruption and, from then on in this process, the end of the terminal leave the
    block. One that does not start or ends is a LunarTuneError.
    """
    token, file = secrets.token_urlsafe(), sqlite_file(uri)
    # The artifacts of another database lie in a store that has its own credentials.
    root = Path(os.devnull) if file is None else beside(file)
    told = {ui_server.STORE: for_mlflow(uri), ui_server.ROOT: str(root), ui_server.TOKEN: token}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    with tempfile.TemporaryFile() as log:
        # Handed over open, so that no other process can have its port in between.
        with socket.create_server((_HOST, 0)) as listening:
            address = f"http://{_HOST}:{listening.getsockname()[1]}/{token}"
            process = subprocess.Popen(  # noqa: S603 our own interpreter
                [sys.executable, "-m", ui_server.__name__, str(listening.fileno())],
                env={**kept, **_OFF, **told},
                pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE,  # of which it hears that this process is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + _PATIENCE
            while not _answers(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise LunarTuneError(f"MLflow's server did not start:\n{_last_words(log)}")
            with suppress(KeyboardInterrupt):
                yield address, process.wait
                raise LunarTuneError(f"MLflow's server has ended:\n{_last_words(log)}")
        finally:
            _end(process)


@contextmanager
def opening_page(address: str) -> Iterator[str]:
    """Inside, a file of the user's alone leads to an address; given is the file's own.

    A browser is started with an address on its command line, which every user of the machine sees.
    """
    with tempfile.NamedTemporaryFile("w", prefix=f"{_OURS}-", suffix=".html") as file:
        file.write(f'<meta http-equiv="refresh" content="0; url={html.escape(address)}">')
        file.flush()
        yield Path(file.name).as_uri()


def _answers(address: str) -> bool:
    """Say whether MLflow's server is ready, after at most a second."""
    no_proxy = build_opener(ProxyHandler({}))
    try:
        with no_proxy.open(f"{address}/health", timeout=1) as answer:
            return bool(answer.status == HTTPStatus.OK)
    except OSError:
        return False


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")[-2000:].strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.communicate(timeout=_GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
