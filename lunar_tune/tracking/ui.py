"""MLflow's own UI on a store, for as long as someone looks at it.

Covers: `mlflow server` bound to this machine alone, waiting until it answers, ending it with all
that it started; the address of a comparison.
Does not cover: which runs are compared (`mirror`), opening a browser (the command).
"""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any
from urllib.parse import quote

from lunar_tune.errors import InputError, LunarTuneError

__all__ = [
    "Server",
    "charts_address",
    "check_port",
    "comparison_address",
    "is_served",
    "runs_address",
    "served",
]

_HOST = "127.0.0.1"
# A start takes 4 to 5 s on two cores with one worker, 8 to 9 s with MLflow's four.
_PATIENCE = 120.0
_GRACE = 10.0
# MLflow 3.17 shows every experiment as one of agents until it is told otherwise.
_WORKFLOW = "workflowType=machine_learning"
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
    parts = (("runs", runs), ("experiments", experiments))
    query = "&".join(
        f"{name}={quote(json.dumps(list(values), separators=(',', ':')))}" for name, values in parts
    )
    return f"{server.rstrip('/')}/#/compare-runs?{query}&{_WORKFLOW}"


def charts_address(server: str, experiment: str, key: str) -> str:
    """Return the address of an experiment's runs in a view that is kept with it (`chart_view`)."""
    view = f"viewStateShareKey={quote(key)}&compareRunsMode=CHART"
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs?{view}&{_WORKFLOW}"


def runs_address(server: str, experiment: str) -> str:
    """Return the address of the page on which MLflow's UI lists an experiment's runs."""
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs?{_WORKFLOW}"


def check_port(port: int | None) -> None:
    """Check that a server can be bound to a port; None is any that is free.

    Raises:
        InputError: It is none, or it is taken.
    """
    if port is None:
        return
    if not 1 <= port <= 65535:
        raise InputError(f"--port {port}: a number from 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise InputError(
                f"--port {port}: cannot be used ({error.strerror}); leave it out for a free one."
            ) from error


class Server:
    """A server that runs.

    Args:
        process: Its first process, which leads a session of its own.
        log: What it says.
        port: On this machine.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes], port: int) -> None:
        self._process, self._log = process, log
        self.address = f"http://{_HOST}:{port}"
        self._port = port

    def wait_until_ready(self) -> None:
        """Return once it answers.

        Raises:
            LunarTuneError: It ended instead, or does not answer.
        """
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise LunarTuneError(f"MLflow's server did not start:\n{self._last_words()}")
            if _answers(self._port):
                return
            time.sleep(0.1)
        raise LunarTuneError(f"MLflow's server does not answer:\n{self._last_words()}")

    def wait_until_interrupted(self) -> None:
        """Return once this process is told to end.

        Raises:
            LunarTuneError: The server ended by itself.
        """
        with suppress(KeyboardInterrupt):
            self._process.wait()
            raise LunarTuneError(f"MLflow's server has ended:\n{self._last_words()}")

    def stop(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(_GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:].strip()


@contextmanager
def served(uri: str, *, port: int | None = None) -> Iterator[Server]:
    """Inside, a server for a store is starting or runs; it ends with all of its processes.

    A signal to terminate interrupts what is inside, as Ctrl-C does.

    Args:
        uri: Of the store.
        port: To bind to; None takes a free one.
    """
    port = port or _free_port()
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    command = [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port)]
    command += ["--workers", "1", "--no-serve-artifacts"]
    places = {"MLFLOW_BACKEND_STORE_URI": uri}  # no argument: it may have a password
    if file is not None:
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
        server = Server(process, log, port)
        try:
            yield server
        finally:
            server.stop()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise KeyboardInterrupt."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
