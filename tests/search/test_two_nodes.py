"""A search over two Ray nodes that share nothing but the network.

A node is a machine within this machine: a network, processes and folders that no other one sees,
made of Linux namespaces, without a container engine. Everything of a node ends with its first
process, which ends when its input closes, also where the tests are killed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import pytest
from command_lines import command, environment

from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import COMPLETE
from lunar_tune.study.study import StoredStudy

TOOLS = ("ip", "nsenter", "unshare")
NAMESPACES = ("--mount", "--net", "--pid")
ADDRESSES = ("192.0.2.1", "192.0.2.2")  # for documentation, of no machine
HEAD = f"{ADDRESSES[0]}:6379"
TRIALS = 5
LONGER = "epochs=1000"  # so that a node is lost in the middle of a trial
START_SECONDS, SEARCH_SECONDS = 90.0, 300.0
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
RAY += ["--object-store-memory=80000000", "--disable-usage-stats"]
STARTED, TASK = "Ray runtime started", "Trainable.train"
called = partial(subprocess.run, timeout=30, check=True)


def why_not() -> str | None:
    """Return why there can be no nodes here; None where there can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"there is no {', '.join(missing)} (packages iproute2, util-linux)"
    if os.geteuid() != 0:
        return "only root may make networks"
    command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Node:
    """A node that runs."""

    pid: int  # of its first process, as this machine counts
    environment: Mapping[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def path(self, inside: Path) -> Path:
        return Path(f"/proc/{self.pid}/root{inside}")

    def start(self, command: Sequence[str], *, log: Path, cwd: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            program = subprocess.Popen(
                [*self._entering, f"--wdns={cwd}", *command],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started.append(program)
        return program

    def call(self, command: str) -> None:
        called([*self._entering, *shlex.split(command)])

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the node's processes whose command line, as they show it now, holds a text."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                here = namespace(process.pid) == namespace(self.pid)
                if here and title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    @property
    def _entering(self) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *NAMESPACES]


def namespace(pid: int) -> Path:
    return Path(f"/proc/{pid}/ns/pid").readlink()


@contextmanager
def node(private: Path, environment: Mapping[str, str]) -> Iterator[Node]:
    """Give a node whose `private` folder has content of its own, as its shared memory has."""
    mounts = [f"mount -t tmpfs tmpfs {place}" for place in (shlex.quote(str(private)), "/dev/shm")]
    script = " && ".join([*mounts, "echo ready", "exec cat"])
    first = subprocess.Popen(
        ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    started: list[subprocess.Popen[bytes]] = []
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"ready\n", "the node has not begun"
        yield Node(psutil.Process(first.pid).children()[0].pid, environment, started)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate(timeout=30)
        for program in started:
            program.wait(timeout=30)


def connect(first: Node, second: Node) -> None:
    """Join two nodes by a cable; each reaches the other and nothing else."""
    cable = f"ip link add eth0 netns {first.pid} type veth peer name eth0 netns {second.pid}"
    called(cable.split())
    for one, address in zip((first, second), ADDRESSES, strict=True):
        one.call(f"ip address add {address}/24 dev eth0")
        one.call("ip link set eth0 up")
        one.call("ip link set lo up")


@dataclass(frozen=True)
class Cluster:
    """A head and another node, each with a folder of the same name that the other does not see."""

    head: Node
    other: Node
    private: Path


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Give a cluster of two nodes of one core each, which want a token."""
    if (reason := why_not()) is not None:
        pytest.skip(f"two nodes cannot be made: {reason}")
    with ExitStack() as stack:
        # A short name, for the paths of Ray's sockets.
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lt-", dir="/tmp")))
        own = {
            "HOME": str(private),
            "TMPDIR": str(private),
            "LUNAR_TUNE_CACHE": str(private / "cache"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "OMP_NUM_THREADS": "1",
        }
        head, other = (stack.enter_context(node(private, environment(**own))) for _ in ADDRESSES)
        connect(head, other)
        begin = ["--head", "--port=6379", "--include-dashboard=false"]
        roles = ([*begin, f"--temp-dir={private / 'ray'}"], [f"--address={HEAD}"])
        for one, address, role in zip((head, other), ADDRESSES, roles, strict=True):
            ray = [*RAY, *role, f"--node-ip-address={address}"]
            log = tmp_path / f"ray-{address}.log"
            one.start(ray, log=log, cwd=tmp_path)
            wait_for(partial(says, log, STARTED), START_SECONDS, f"there is no Ray at {address}")
        yield Cluster(head, other, private)
        assert list(private.iterdir()) == [], "nothing was written outside of the nodes"


def says(log: Path, text: str) -> bool:
    return text in log.read_text()


def wait_for(is_so: Callable[[], bool], seconds: float, failure: str) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, failure
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.alone
def test_a_search_needs_no_common_folder_and_outlives_the_loss_of_a_node(
    cluster: Cluster, small: list[str], tmp_path: Path
) -> None:
    options = [LONGER if one == "epochs=2" else one for one in small]
    options += ["--address", HEAD, "--concurrency", "2", "--num-trials", str(TRIALS), "--force"]
    options += ["--constrain", "retain_rouge1>=0", "--trial-timeout", str(SEARCH_SECONDS)]
    options += ["--output", str(cluster.private / "runs"), "--name", "two"]
    log = tmp_path / "search.log"
    search = cluster.head.start(command("search", *options), log=log, cwd=tmp_path)
    folder = Folder(cluster.head.path(cluster.private / "runs" / "two"))

    workers: dict[int, set[int]] = {cluster.head.pid: set(), cluster.other.pid: set()}

    def works(one: Node) -> bool:
        assert search.poll() is None, f"too late to lose a node\n{log.read_text()}"
        found = {process.pid for process in one.processes(TASK)}
        workers[one.pid].update(found)
        return bool(found)

    def both_work() -> bool:
        """Let a trial stand still meanwhile, for Tune starts no worker while another is free."""
        at_work = [one for one in (cluster.head, cluster.other) if works(one)]
        for process in (process for one in at_work for process in one.processes(TASK)):
            process.resume() if len(at_work) == len(ADDRESSES) else process.suspend()
        return len(at_work) == len(ADDRESSES)

    def n_complete() -> int:
        rows = StoredStudy.read(folder.journal).rows
        return sum(row.state == COMPLETE for row in rows)

    wait_for(folder.journal.exists, SEARCH_SECONDS, "the base model has no scores")
    wait_for(both_work, SEARCH_SECONDS, "only one node has a trial")
    standing = cluster.head.processes(TASK)
    for process in standing:
        process.suspend()  # what is completed from now on is the other's
    wanted = n_complete() + 1
    wait_for(lambda: n_complete() >= wanted, SEARCH_SECONDS, "the other node ends none")
    wait_for(lambda: works(cluster.other), SEARCH_SECONDS, "it has no further one")
    assert len(workers[cluster.other.pid]) == 1, "its worker is used again"
    cluster.other.call("sh -c 'kill -KILL -1'")  # all but the first, which keeps its folders
    for process in standing:
        process.resume()

    assert search.wait(SEARCH_SECONDS) == 0, log.read_text()
    stored = StoredStudy.read(folder.journal)
    counted = [row for row in stored.rows if not row.again]
    assert [row.state for row in counted] == [COMPLETE] * TRIALS
    for row in counted:
        content = folder.answers(row.number).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row.answers_digest
    assert folder.best.exists()
    assert any(row.again for row in stored.rows), "a trial was lost with the node, and run again"
    assert not cluster.other.path(cluster.private / "runs").exists()
