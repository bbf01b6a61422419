"""MLflow's own UI on a store, as long as someone looks at it; the addresses of its pages."""

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
from typing import IO, Any
from urllib.parse import quote

from lunar_tune.errors import LunarTuneError
from lunar_tune.tracking.store import sqlite_file

__all__ = [
    "charts_address",
    "comparison_address",
    "is_served",
    "runs_address",
    "served",
]

_HOST = "127.0.0.1"
# A start takes 4 to 5 s on two cores with one worker, 8 to 9 s with MLflow's four.
_PATIENCE, _GRACE = 120.0, 10.0
_OFF = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # of agents; it would start more processes
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def is_served(uri: str) -> bool:
    """Say whether a store has a server of its own, so that none is to be started."""
    return uri.startswith(("http://", "https://"))


def comparison_address(server: str, runs: Sequence[str], experiments: Sequence[str]) -> str:
    """Return the address of the page on which MLflow's UI compares runs.

    Example:
        >>> from urllib.parse import unquote
        >>> unquote(comparison_address("http://127.0.0.1:5000/", ["a"], ["1"])).partition("/#/")[2]
        'compare-runs?runs=["a"]&experiments=["1"]&workflowType=machine_learning'
    """
    lists = [quote(json.dumps(list(ids), separators=(",", ":"))) for ids in (runs, experiments)]
    return _page(server, f"compare-runs?runs={lists[0]}&experiments={lists[1]}")


def charts_address(server: str, experiment: str, key: str) -> str:
    """Return the address of an experiment's runs in a view that is kept with it (`chart_view`)."""
    view = f"viewStateShareKey={quote(key)}&compareRunsMode=CHART"
    return _page(server, f"experiments/{experiment}/runs?{view}")


def runs_address(server: str, experiment: str) -> str:
    """Return the address of the page on which MLflow's UI lists an experiment's runs."""
    return _page(server, f"experiments/{experiment}/runs?")


def _page(server: str, page: str) -> str:
    # MLflow 3.17 shows every experiment as one of agents until it is told otherwise.
    address = f"{server.rstrip('/')}/#/{page}&workflowType=machine_learning"
    return address.replace("?&", "?")


@contextmanager
def served(uri: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Inside, a server for a store answers; it ends with all of its processes.

    What is given is its address, and what waits until it ends. Ctrl-C and a signal to terminate
    leave the block.

    Args:
        uri: Of the store.

    Raises:
        LunarTuneError: It does not start, or has ended by itself.
    """
    port = _free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port)]
    command += ["--workers", "1", "--no-serve-artifacts"]
    places = {"MLFLOW_BACKEND_STORE_URI": uri}  # no argument: it may have a password
    if (file := sqlite_file(uri)) is not None:
        places["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = str(file.parent / "mlartifacts")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with tempfile.TemporaryFile() as log, _terminated_as_interrupted():
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


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise KeyboardInterrupt."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
