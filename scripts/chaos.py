"""A search whose workers, driver and tracking server are killed at random, and what is left of it.

Covers: one search on the tiny model, gone on with until it is finished, with an MLflow server on
loopback; SIGKILL at random to a worker, to the driver and to the server; damage to the activation
cache; afterwards the three records (study, MLflow, tables) held against each other, number by
number, and a look for processes that were left.
Does not cover: lost nodes, full disks. Local processes and loopback only; bounded by --time-limit.

    scripts/chaos.py --trials 60 --kills 30 --json chaos.json

Exit codes: 0 everything is there exactly once, 1 it is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import psutil
import pyarrow.parquet as pq
import requests
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from rich.console import Console

from lunar_tune.finetuning.tiny import ensure_tiny
from lunar_tune.report.results import SearchResults
from lunar_tune.study.rows import COMPLETE, RUNNING, TrialRow, best_first
from lunar_tune.yaml_files import read_yaml

NAME = "chaos"
MARK = "LUNAR_TUNE_CHAOS"
WORKER = "ray::"
KINDS = ("worker", "driver", "server")
WEIGHTS = (5, 3, 2)
EXPERIMENT = "lunar-tune"
PARENT = "mlflow.parentRunId"


class Chaos:
    """A search, its server, and what is done to them.

    Args:
        folder: Where everything lies.
        trials: Of the search.
        kills: How many there are to be.
        seed: Of what is killed when.
    """

    def __init__(self, folder: Path, *, trials: int, kills: int, seed: int) -> None:
        self.folder, self.trials, self.wanted = folder, trials, kills
        self.kills: Counter[str] = Counter()
        self.damaged = 0
        self._size = 0
        self._random = random.Random(seed)  # noqa: S311  # kills, keeps no secret
        self._mark = uuid.uuid4().hex
        self._port = _free_port()
        self._server: subprocess.Popen[bytes] | None = None
        self._model = str(ensure_tiny())
        self._cache = folder / "cache"

    @property
    def uri(self) -> str:
        """Of the tracking server."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def search(self) -> Path:
        """The search's folder."""
        return self.folder / "runs" / NAME

    def run(self, time_limit: float, console: Console) -> int:
        """Run the search to its end, killing; return the last exit code of its driver."""
        end = time.monotonic() + time_limit
        self._start_server()
        code = -1
        while time.monotonic() < end:
            with self._driver() as driver:
                code = self._harass(driver, end, console)
            if code not in {0, 3}:
                continue
            if self.kills.total() >= self.wanted:
                break
            # finished too early: there is more to kill
            self.trials += max(2, self.trials // 10)
            console.print(f"finished after {self.kills.total()} kills; {self.trials} trials")
        return code

    def _harass(self, driver: subprocess.Popen[bytes], end: float, console: Console) -> int:
        """Kill something whenever the search has got on; return the driver's exit code."""
        while driver.poll() is None and time.monotonic() < end:
            if self.kills.total() >= self.wanted or not self._has_got_on(driver):
                time.sleep(0.2)
                continue
            time.sleep(self._random.uniform(0, 1.5))
            kind = self._random.choices(KINDS, WEIGHTS)[0]
            if self._kill(kind, driver):
                self.kills[kind] += 1
                console.print(f"kill {self.kills.total()}: {kind}", highlight=False)
        if driver.poll() is None:
            driver.kill()
        return driver.wait()

    def _has_got_on(self, driver: subprocess.Popen[bytes]) -> bool:
        """Say whether the journal has grown by a trial since it was looked at, or a time passed."""
        journal = self.search / "study.journal"
        size = journal.stat().st_size if journal.is_file() else 0
        grown, self._size = size > self._size, size
        return grown and driver.poll() is None

    def _kill(self, kind: str, driver: subprocess.Popen[bytes]) -> bool:
        if kind == "server":
            self._stop_server()
            time.sleep(self._random.uniform(0, 2))
            self._start_server()
            return True
        self._damage_cache()
        if kind == "driver":
            driver.kill()
            driver.wait()
            return True
        workers = [one for one in self._processes() if _name(one).startswith(WORKER)]
        for worker in self._random.sample(workers, min(1, len(workers))):
            with contextlib.suppress(psutil.Error):
                worker.kill()
                return True
        return False

    def _damage_cache(self) -> None:
        """Put a damaged copy in the place of a cached file, so that nobody's mapping changes."""
        files = sorted(self._cache.glob("activations/**/*.safetensors"))
        if not files or self._random.random() < 0.5:
            return
        file = self._random.choice(files)
        content = bytearray(file.read_bytes())
        if self._random.random() < 0.3:
            content = content[: len(content) // 2]
        else:
            place = self._random.randrange(len(content))
            content[place : place + 8] = self._random.randbytes(8)
        copy = file.with_suffix(".damaged")
        copy.write_bytes(content)
        copy.replace(file)
        self.damaged += 1

    @contextlib.contextmanager
    def _driver(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start the search, or go on with it."""
        begun = (self.search / "study.journal").is_file()
        options = ["--output", str(self.folder / "runs"), "--num-trials", str(self.trials)]
        options += ["--tracking-uri", self.uri, "--stop", "never"]
        if begun:
            options += ["--resume", NAME]
        else:
            options += ["--name", NAME, "--model", self._model, "--data", "mini"]
            options += ["--sampler", "random"]
        with (self.folder / "driver.log").open("ab") as log:
            driver = subprocess.Popen(
                [sys.executable, "-m", "lunar_tune.search", *options],
                env=self._environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                self._wait_for_size()
                yield driver
            finally:
                if driver.poll() is None:
                    driver.kill()
                    driver.wait()

    def _wait_for_size(self) -> None:
        journal = self.search / "study.journal"
        self._size = journal.stat().st_size if journal.is_file() else 0

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            MARK: self._mark,
            "LUNAR_TUNE_CACHE": str(self._cache),
            "LUNAR_TUNE_VERIFY_WEIGHTS": "1",
            "OMP_NUM_THREADS": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def _processes(self) -> list[psutil.Process]:
        """Return the processes that the search and its server have started, themselves included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def left_running(self, patience: float = 30.0) -> list[str]:
        """Return the names of processes that do not end by themselves."""
        end = time.monotonic() + patience
        while (left := self._processes()) and time.monotonic() < end:
            time.sleep(0.5)
        names = [_name(process) for process in left]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return names

    def _start_server(self) -> None:
        store = f"sqlite:///{self.folder / 'server.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self._server = subprocess.Popen(
                command, env=self._environment(), stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.uri}/health", timeout=2).ok:
                    return
            time.sleep(0.2)
        raise RuntimeError("the tracking server does not answer; see server.log")

    def _stop_server(self) -> None:
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()

    # What is left

    def check(self) -> dict[str, Any]:
        """Hold the records against each other; the server runs meanwhile.

        It may have been away when a trial ended: what catches up is the command that says so.
        """
        try:
            compare = [sys.executable, "-m", "lunar_tune.compare", str(self.search)]
            compare += ["--tracking-uri", self.uri]
            with (self.folder / "compare.log").open("ab") as log:
                subprocess.run(compare, env=self._environment(), stdout=log, stderr=log, check=True)
            return self._checked(SearchResults.read(self.search))
        finally:
            self._stop_server()

    def _checked(self, results: SearchResults) -> dict[str, Any]:
        rows = results.rows
        counted = [row for row in rows if not row.again]
        runs = _mlflow_children(self.uri)
        table = pq.read_table(results.folder.trials).to_pylist()
        disagreements = [
            *_against_table(rows, table),
            *_against_mlflow(rows, runs["children"]),
            *_best_disagrees(results),
        ]
        running = [row.number for row in rows if row.state == RUNNING]
        return {
            "trials_expected": self.trials,
            "trials_found": len(counted),
            "trials_complete": sum(row.state == COMPLETE for row in counted),
            "trials_run_again": len(rows) - len(counted),
            "duplicates": _duplicates(rows, runs["children"]),
            "left_running": [f"trial {n}" for n in running] + runs["running"],
            "disagreements": disagreements,
        }


def _against_table(rows: tuple[TrialRow, ...], table: list[dict[str, Any]]) -> list[str]:
    """Compare `trials.parquet` with the study, cell by cell."""
    if len(table) != len(rows):
        return [f"trials.parquet has {len(table)} rows, the study {len(rows)}"]
    wrong = []
    for row, line in zip(rows, table, strict=True):
        for name, value in row.flat().items():
            if line.get(name) != value:
                wrong.append(f"trial {row.number}: {name} {line.get(name)} in the table, {value}")
    return wrong


def _against_mlflow(rows: tuple[TrialRow, ...], children: dict[int, list[Any]]) -> list[str]:
    """Compare MLflow's child runs with the study: parameters, scores, states."""
    wrong = []
    for row in rows:
        for run in children.get(row.number, [])[:1]:
            parameters = {name: str(value) for name, value in row.parameters.items()}
            shown = {name: run.data.params.get(name) for name in parameters}
            if shown != parameters:
                wrong.append(f"trial {row.number}: parameters {shown} in MLflow, {parameters}")
            told = {n: value for n, value in row.scores.items() if not n.endswith("_rows")}
            scores = {name: run.data.metrics.get(name) for name in told}
            if scores != told:
                wrong.append(f"trial {row.number}: scores {scores} in MLflow, {told}")
            status = "FINISHED" if row.state == COMPLETE else "FAILED"
            if run.info.status != status:
                wrong.append(f"trial {row.number}: {run.info.status} in MLflow, {row.state}")
        if row.number not in children:
            wrong.append(f"trial {row.number}: is not in MLflow")
    wrong += [f"trial {n}: is in MLflow alone" for n in children if n >= len(rows)]
    return wrong


def _best_disagrees(results: SearchResults) -> list[str]:
    """Compare `best.yaml` with the best of the table."""
    best = best_first(list(results.rows))
    said = read_yaml(results.folder.best) if results.folder.best.exists() else None
    if said is None:
        return ["there is no best.yaml"] if best else []
    if not best:
        return ["best.yaml names a trial, and none is feasible"]
    row = results.rows[said["trial"]]
    if (row.objective, row.parameters) != (best[0].objective, said["parameters"]):
        return [f"best.yaml has trial {row.number}, the table trial {best[0].number}"]
    return []


def _duplicates(rows: tuple[TrialRow, ...], children: dict[int, list[Any]]) -> list[str]:
    """Return trials that stand twice: in MLflow, or as settings that were drawn once."""
    twice = [f"trial {n}: {len(runs)} runs in MLflow" for n, runs in children.items() if runs[1:]]
    counted = Counter(json.dumps(row.parameters, sort_keys=True) for row in rows if not row.again)
    return twice + [f"{count} times {setting}" for setting, count in counted.items() if count > 1]


def _mlflow_children(uri: str) -> dict[str, Any]:
    """Return the search's child runs by trial, and which runs are still open."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found: list[Any] = []
    token = None
    while experiment is not None:
        page = client.search_runs([experiment.experiment_id], max_results=500, page_token=token)
        found += page
        if (token := page.token) is None:
            break
    children: dict[int, list[Any]] = {}
    for run in found:
        if PARENT in run.data.tags:
            children.setdefault(int(run.data.tags["trial"]), []).append(run)
    parents = [run for run in found if PARENT not in run.data.tags]
    running = [f"run {run.info.run_name}" for run in found if run.info.status == "RUNNING"]
    running += [f"{len(parents)} parent runs"] if len(parents) > 1 else []
    return {"children": children, "running": running}


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:80] or process.name()
    return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(
    *,
    trials: PositiveInt = 60,
    kills: NonNegativeInt = 30,
    seed: int = 0,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    output: Path | None = None,
    time_limit: float = 3000.0,
) -> None:
    """Kill a search at random until it is done, and look at what is left.

    Args:
        trials: Trials of the search.
        kills: Processes to kill.
        seed: Of what is killed when.
        json_file: Write what came out.
        output: Folder to keep everything in; else it is temporary.
        time_limit: Seconds after which it gives up.
    """
    console = Console()
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        chaos = Chaos(folder.resolve(), trials=trials, kills=kills, seed=seed)
        code = chaos.run(time_limit, console)
        outcome = chaos.check()
        outcome["left_running"] += chaos.left_running()
    outcome |= {
        "kills": chaos.kills.total(),
        "kills_by_kind": dict(chaos.kills),
        "cache_files_damaged": chaos.damaged,
        "exit_code": code,
        "seconds": round(time.monotonic() - begin, 1),
    }
    console.print_json(data=outcome)
    if json_file is not None:
        json_file.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    holds = (
        outcome["trials_found"] == outcome["trials_expected"]
        and outcome["kills"] >= kills
        and code in {0, 3}
        and not any(outcome[name] for name in ("duplicates", "left_running", "disagreements"))
    )
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    cyclopts.run(main)
