"""Who may use Ray: a session that is started here is its starter's alone, a cluster is found."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from command_lines import environment

from lunar_tune.driver.backends.cluster import own_session, refusal, users_token

AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
INSIDE = """
import json, os, sys
from pathlib import Path
import psutil
from lunar_tune.driver.backends.cluster import ray_session
from lunar_tune.config.options import SearchConfig
with ray_session(SearchConfig(address=None)):
    import ray
    token = os.environ["RAY_AUTH_TOKEN"]
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    lines = [" ".join(process.cmdline()) for process in family]
    listening = [
        connection.laddr.ip
        for process in family
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    print(json.dumps({
        "shown": sum(token in line for line in lines),
        "everywhere": sum(address in ("::", "0.0.0.0") for address in listening),
        "mode": folder.parent.parent.stat().st_mode,
        "private": str(folder.parent.parent),
        "address": ray.get_runtime_context().gcs_address,
        "token": token,
    }), flush=True)
    sys.stdin.readline()
print(json.dumps(sorted(name for name in os.environ if name.startswith("RAY_AUTH"))))
"""
JOIN = """
import sys
from lunar_tune.errors import InputError
from lunar_tune.driver.backends.cluster import ray_session
from lunar_tune.config.options import SearchConfig
try:
    with ray_session(SearchConfig(address=sys.argv[1])):
        print("joined")
except InputError as error:
    print(error)
"""


def clean(home: Path, **more: str) -> dict[str, str]:
    """Return an environment without tokens, with a home of its own."""
    kept = {name: value for name, value in environment().items() if name not in AUTH}
    kept.pop("RAY_ADDRESS")
    return kept | {"HOME": str(home), **more}


def join(address: str, home: Path, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", JOIN, address],
        env=clean(home, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.ray
@pytest.mark.slow
def test_a_session_is_its_starters_alone(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INSIDE],
        env=clean(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    inside = json.loads(process.stdout.readline())
    try:
        assert inside["shown"] == 0, "no command line has the token"
        assert inside["everywhere"] > 0, (
            "if Ray keeps to loopback one day, SECURITY.md is to say so"
        )
        assert stat.S_IMODE(inside["mode"]) == 0o700
        assert "wants a token" in join(inside["address"], tmp_path)
        wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
        assert "wants a token" in join(inside["address"], tmp_path, **wrong)
        assert join(inside["address"], tmp_path, RAY_AUTH_TOKEN=inside["token"]) == "joined"
    finally:
        output, _ = process.communicate("\n", timeout=60)
    assert json.loads(output) == [], "the environment is as it was"
    assert not Path(inside["private"]).exists()
    assert not (tmp_path / ".ray").exists(), "the token is in no file"


@pytest.fixture
def without_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in AUTH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lunar_tune.driver.backends.cluster.Path.home", lambda: tmp_path)
    return tmp_path


def test_a_kept_token_is_shown_to_this_machine_only(
    without_tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """192.0.2.1 is an address for documentation, of no machine."""
    (without_tokens / ".ray").mkdir()
    (without_tokens / ".ray/auth_token").write_text("0" * 64)
    for address, variables, shown in (
        ("127.0.0.1:6379", {}, True),
        ("auto", {}, True),
        ("192.0.2.1:6379", {}, False),
        ("192.0.2.1:6379", {"RAY_AUTH_TOKEN": "a" * 64}, True),
        ("127.0.0.1:6379", {"RAY_AUTH_MODE": "disabled"}, False),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with users_token(address):
                assert (os.environ.get("RAY_AUTH_MODE") == "token") is shown
            assert {name: os.environ[name] for name in AUTH if name in os.environ} == variables


def test_what_a_killed_process_left_is_removed_by_the_next_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lives stays, and so does what has begun so late that its lock may not be held yet."""
    monkeypatch.setattr("lunar_tune.driver.backends.cluster._TEMP", tmp_path)
    for name, age in (("dead", 3600), ("alive", 3600), ("new", 0)):
        lock = tmp_path / f"lt-ray-{name}" / "alive"
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    (tmp_path / "lt-ray-of-an-older-version").mkdir()
    with filelock.FileLock(tmp_path / "lt-ray-alive" / "alive"):
        os.utime(tmp_path / "lt-ray-alive" / "alive", (time.time() - 3600,) * 2)
        with own_session() as folder:
            left = {one.name for one in tmp_path.iterdir()} - {folder.parent.name}
    assert left == {"lt-ray-alive", "lt-ray-new", "lt-ray-of-an-older-version"}


def test_a_refused_token_is_told_from_a_cluster_that_does_not_answer() -> None:
    refused = ConnectionError("Failed to connect to Ray cluster")
    refused.__cause__ = RuntimeError("ray.exceptions.AuthenticationError: InvalidAuthToken")
    assert "the cluster wants a token" in refusal("head:1", refused)
    assert "no Ray cluster answers there (no)" in refusal("head:1", ConnectionError("no\nmore"))
