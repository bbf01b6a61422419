"""A machine within this machine: a network, processes and folders that no other one sees.

Made of Linux namespaces, without a container engine: everything of a node ends with its first
process, which ends when its input closes, also where the tests are killed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

__all__ = ["Node", "connected", "node", "why_not"]

TOOLS = ("ip", "nsenter", "unshare")
NAMESPACES = ("--mount", "--net", "--pid")


def why_not() -> str | None:
    """Return why there can be no nodes here; None where there can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"there is no {', '.join(missing)} (packages iproute2, util-linux)"
    if os.geteuid() != 0:
        return "only root may make networks"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Node:
    """A node that runs."""

    pid: int
    """Its first process, as this machine counts."""
    environment: Mapping[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def path(self, inside: Path) -> Path:
        """Return where this machine finds a file of the node."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def start(self, command: Sequence[str], *, log: Path, cwd: Path) -> subprocess.Popen[bytes]:
        """Start a program on the node."""
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
        """Run a short command on the node."""
        subprocess.run([*self._entering, *shlex.split(command)], timeout=30, check=True)

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the node's processes whose command line, as they show it now, holds a text."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                here = _namespace(process.pid) == _namespace(self.pid)
                if here and title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill_all(self) -> None:
        """Kill every process of the node but the first, which keeps its folders to be looked at."""
        self.call("sh -c 'kill -KILL -1'")

    @property
    def _entering(self) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *NAMESPACES]


def _namespace(pid: int) -> Path:
    return Path(f"/proc/{pid}/ns/pid").readlink()


@contextmanager
def node(private: Path, environment: Mapping[str, str]) -> Iterator[Node]:
    """Give a node for a while.

    Args:
        private: A folder that has content of its own on every node, as shared memory has.
        environment: Of its programs.
    """
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
        if first.stdout is None or first.stdout.readline() != b"ready\n":
            raise RuntimeError("the node has not begun")
        yield Node(psutil.Process(first.pid).children()[0].pid, environment, started)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate(timeout=30)
        for program in started:
            program.wait(timeout=30)


def connected(first: Node, second: Node, addresses: tuple[str, str]) -> None:
    """Join two nodes by a cable; each reaches the other and nothing else."""
    cable = f"ip link add eth0 netns {first.pid} type veth peer name eth0 netns {second.pid}"
    subprocess.run(cable.split(), timeout=30, check=True)
    for one, address in zip((first, second), addresses, strict=True):
        one.call(f"ip address add {address}/24 dev eth0")
        one.call("ip link set eth0 up")
        one.call("ip link set lo up")
