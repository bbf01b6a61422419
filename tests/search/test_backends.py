"""Who runs a search's tasks, what can go wrong there, and who may use Ray."""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import filelock
import psutil
import pytest
from command_lines import environment
from made_outcomes import base_model, ended, failed
from test_loop import Heard

from lunar_tune.config.options import SearchConfig
from lunar_tune.driver import backends
from lunar_tune.driver.backends import BackendLostError, on_ray, run_in_process
from lunar_tune.driver.backends.cluster import own_session, ray_session, refusal, users_token
from lunar_tune.driver.backends.on_ray import (
    HANDED_OVER,
    LoopCallback,
    LoopSearcher,
    UnlearningTrainable,
    Watchdog,
    crash_reason,
    watched,
)
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.signals import interrupted_once
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import COMPLETE
from lunar_tune.trial.tasks import BASE_MODEL, CONFIRMATION, TRIAL, Outcome, Task


def test_an_outcome_is_handed_over_once_and_its_warnings_said_without_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the order of Ray 2.60, which keeps every report to the end and pickles both."""
    loop, trial = Heard(tmp_path).loop, SimpleNamespace(trial_id="1")
    searcher, callback = LoopSearcher(loop), LoopCallback(loop, Folder(tmp_path))
    searcher.suggest("1")
    handed = [base_model(warnings=("read from http://me:secret@host",))]
    callback.on_trial_result(1, [], trial, {HANDED_OVER: handed})
    searcher.on_trial_complete("1", {HANDED_OVER: handed})
    callback.on_trial_complete(1, [], trial)
    assert handed == []
    assert caplog.messages == ["a worker: read from http://me:***@host"]
    for one in (searcher, callback):
        assert vars(pickle.loads(pickle.dumps(one))) == {}, "without the study"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    runner = MagicMock()
    monkeypatch.setattr(backends, "TaskRunner", lambda _spec: runner)
    return runner


def test_this_process_runs_a_search_to_its_end(tmp_path: Path, runner: MagicMock) -> None:
    heard = Heard(tmp_path, num_trials=2)
    runner.run.side_effect = [base_model(), ended(0.3), failed("the loss became NaN"), ended(0.3)]
    run_in_process(heard.loop, object())
    kinds = [call.args[0].kind for call in runner.run.call_args_list]
    assert kinds == [BASE_MODEL, TRIAL, TRIAL, CONFIRMATION]
    assert ("holds", 0) in heard.news
    assert runner.close.call_count == 1


def test_a_crash_in_this_process_is_an_attempt_with_a_new_runner(
    tmp_path: Path, runner: MagicMock
) -> None:
    heard = Heard(tmp_path, num_trials=1)
    runner.run.side_effect = [base_model(), RuntimeError("a kernel died"), ended(), ended()]
    run_in_process(heard.loop, object())
    crashed, again = heard.study.rows()
    assert (crashed.failure, crashed.again) == ("RuntimeError: a kernel died", True)
    assert (again.state, again.parameters) == (COMPLETE, crashed.parameters)
    assert runner.close.call_count == 2


@pytest.mark.parametrize("made", [RuntimeError("in a hook"), failed("RuntimeError: in a hook")])
def test_an_interruption_that_a_library_makes_a_failure_of_ends_the_search(
    tmp_path: Path, runner: MagicMock, made: Exception | Outcome
) -> None:
    heard, tasks = Heard(tmp_path, num_trials=1), iter([base_model(), made])

    def run(_task: Task) -> Outcome:
        if (outcome := next(tasks)) is made:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    runner.run.side_effect = run
    with pytest.raises(KeyboardInterrupt), interrupted_once():
        run_in_process(heard.loop, object())
    assert heard.study.running() == [0], "it is the search's to say that it runs again"


@contextmanager
def sleeping() -> Iterator[psutil.Process]:
    with subprocess.Popen(["sleep", "100"]) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def test_the_end_of_rays_process_interrupts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the end of the search ends the watch, whatever becomes of Ray then."""

    def wait_while_it_dies(process: psutil.Process, *sent: int) -> None:
        with interrupted_once(), watched(Folder(tmp_path), [process]):
            process.kill()
            try:
                for number in sent:
                    signal.raise_signal(number)
                time.sleep(60)
            except KeyboardInterrupt:  # as `ray.wait` does it
                raise (RuntimeError if sent else KeyboardInterrupt) from None

    monkeypatch.setattr(on_ray, "_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(on_ray, "_GRACE_SECONDS", 3.0)  # time to react, on any machine
    before = signal.getsignal(signal.SIGVTALRM)
    with sleeping() as process, pytest.raises(BackendLostError, match="Ray's sleep has ended"):
        wait_while_it_dies(process)
    with sleeping() as process, pytest.raises(KeyboardInterrupt) as told:
        wait_while_it_dies(process, signal.SIGTERM)
    assert told.type is KeyboardInterrupt, "who was told to end was not lost"
    with sleeping() as process:
        with watched(Folder(tmp_path), [process]):
            pass
        process.kill()
        time.sleep(0.1)
    assert signal.getsignal(signal.SIGVTALRM) == before


ENDING = """
import signal, subprocess, sys, time
from pathlib import Path
import psutil
from lunar_tune.driver.backends import on_ray
from lunar_tune.study.folder import Folder

def search_that_hangs_in_a_dead_ray():
    on_ray._EVERY_SECONDS = on_ray._GRACE_SECONDS = 0.05
    process = subprocess.Popen(["sleep", "100"])
    with on_ray.watched(Folder(Path(sys.argv[1])), [psutil.Process(process.pid)]):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGVTALRM])  # a call that does not return
        process.kill()
        time.sleep(60)

def trial_that_hangs():
    dog = on_ray.Watchdog(Folder(Path(sys.argv[1])), 0.5)
    dog.begin(3, False)
    dog.end()
    dog.begin(4, False)
    time.sleep(100)

"""


@pytest.mark.slow
def test_what_hangs_ends_its_process_with_a_last_word(tmp_path: Path) -> None:
    names = ("search_that_hangs_in_a_dead_ray", "trial_that_hangs")
    lines = ([sys.executable, "-c", f"{ENDING}{name}()", str(tmp_path)] for name in names)
    both = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for line in lines]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert "error: Ray's sleep has ended. What was computed is kept: resume" in said[0]
    folder = Folder(tmp_path)
    assert not folder.stack(3).exists(), "it ended in time"
    assert "trial_that_hangs" in folder.stack(4).read_text()
    reason = crash_reason(folder, 4, "ActorDiedError: unexpectedly")
    assert reason.startswith("took longer than 0.5 s (--trial-timeout)")
    assert "00004-stack.txt" in reason

    dog, killed = Watchdog(folder, 100.0), "ActorDiedError: killed"
    dog.begin(5, full=False)
    assert crash_reason(folder, 5, killed) == killed, "before its limit it does not hang"
    dog.end()
    assert crash_reason(folder, 6, killed) == killed


def test_a_step_is_watched_and_may_take_ten_times_as_long_where_it_asks_every_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch ends with the step, also where that fails. Which part asks what: `test_tasks`."""
    limits: list[float] = []

    class Runner:
        def __init__(self, _spec: object, watch: Callable[[int, bool], None]) -> None:
            self.watch = watch

        def run(self, task: Task) -> Outcome:
            for full in (False, True):
                self.watch(task.number, full)
                assert Folder(tmp_path).stack(task.number).exists()
            if task.number:
                raise RuntimeError("a kernel died")
            return base_model()

    monkeypatch.setattr(on_ray, "TaskRunner", Runner)
    monkeypatch.setattr(
        "faulthandler.dump_traceback_later", lambda limit, **_options: limits.append(limit)
    )
    trainable = UnlearningTrainable.__new__(UnlearningTrainable)  # without Ray
    facts = {"spec": None, "folder": Folder(tmp_path), "timeout": 1000.0, "metrics": {}}
    trainable.setup({"task": Task(kind=BASE_MODEL, number=0)}, **facts)
    assert trainable.step()[HANDED_OVER].pop().failure is None
    trainable.reset_config({"task": Task(kind=TRIAL, number=1)})
    with pytest.raises(RuntimeError):
        trainable.step()
    assert limits == [1000.0, 10000.0] * 2
    assert list(tmp_path.glob("trials/*stack.txt")) == []


# Who may use Ray: a session that is started here is its starter's alone, a cluster is found

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
    connections = [one for process in family for one in process.net_connections()]
    listening = [one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN]
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
    without = {*AUTH, "RAY_ADDRESS"}
    kept = {name: value for name, value in environment().items() if name not in without}
    return kept | {"HOME": str(home), **more}


def join(address: str, home: Path, **more: str) -> str:
    arguments, own = [sys.executable, "-c", JOIN, address], clean(home, **more)
    return subprocess.check_output(arguments, env=own, text=True, timeout=120).strip()


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
    inside = json.loads(process.stdout.readline())
    try:
        assert inside["shown"] == 0, "no command line has the token"
        assert inside["everywhere"] > 0, "else SECURITY.md is to say that Ray keeps to loopback"
        assert stat.S_IMODE(inside["mode"]) == 0o700
        assert "needs a token" in join(inside["address"], tmp_path)
        wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
        assert "needs a token" in join(inside["address"], tmp_path, **wrong)
        assert join(inside["address"], tmp_path, RAY_AUTH_TOKEN=inside["token"]) == "joined"
    finally:
        output, _ = process.communicate("\n", timeout=60)
    assert json.loads(output) == [], "the environment is as it was"
    assert not Path(inside["private"]).exists()
    assert not (tmp_path / ".ray").exists(), "the token is in no file"


def test_a_kept_token_is_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.1 is an address for documentation, of no machine."""
    for name in AUTH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lunar_tune.driver.backends.cluster.Path.home", lambda: tmp_path)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("0" * 64)
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
    """What lives stays, and so does what has begun so late that its lock may not be held yet.

    As does what is another user's, or leads elsewhere: a lock there may be a link to a file.
    """
    monkeypatch.setattr("lunar_tune.files._TEMP", tmp_path)
    for name, age in (
        ("lt-ray-dead", 3600),
        ("lt-ray-alive", 3600),
        ("lt-ray-new", 0),
        ("x", 3600),
    ):
        lock = tmp_path / name / "alive"
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    (tmp_path / "lt-ray-of-an-older-version").mkdir()
    (tmp_path / "lt-ray-link").symlink_to("x")
    everything = {one.name for one in tmp_path.iterdir()}
    with filelock.FileLock(tmp_path / "lt-ray-alive" / "alive"):
        os.utime(tmp_path / "lt-ray-alive" / "alive", (time.time() - 3600,) * 2)
        for user, gone in ((os.geteuid() + 1, set()), (os.geteuid(), {"lt-ray-dead"})):
            monkeypatch.setattr(os, "geteuid", lambda user=user: user)
            with own_session() as folder:
                left = {one.name for one in tmp_path.iterdir()} - {folder.parent.name}
            assert everything - left == gone
    assert (tmp_path / "x" / "alive").exists()


@pytest.mark.parametrize(
    ("raised", "address", "error", "told"),
    [
        (SystemExit(15), None, KeyboardInterrupt, "^$"),
        (Exception("timed out during startup"), None, LunarTuneError, r"not start \(timed out"),
        (Exception("timed out"), "h:1", InputError, r"--address h:1: no Ray cluster answers"),
    ],
)
def test_a_session_that_does_not_begin_says_so_and_leaves_signals_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    address: str | None,
    error: type[BaseException],
    told: str,
) -> None:
    """SIGTERM while Ray starts meets a handler of Ray's own, which exits."""

    def start(**_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise raised

    monkeypatch.setattr("ray.init", start)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error, match=told), ray_session(SearchConfig(address=address)):
        raise AssertionError("there is no session")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_refused_token_is_told_from_a_cluster_that_does_not_answer() -> None:
    refused = ConnectionError("Failed to connect to Ray cluster")
    refused.__cause__ = RuntimeError("ray.exceptions.AuthenticationError: InvalidAuthToken")
    assert "the cluster needs a token" in refusal("head:1", refused)
    assert "no Ray cluster answers there (no)" in refusal("head:1", ConnectionError("no\nmore"))
