"""Ctrl-C, SIGTERM and closed terminals in any command, and output that nobody reads any more.

The first signal interrupts, those that follow let it end what it began.
"""

from __future__ import annotations

import ctypes
import os
import pydoc
import signal
import sqlite3
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_lines import TIMEOUT, environment, finish, start, without_ray
from search_results import statuses

from lunar_tune.cli.search import search as COMMAND
from lunar_tune.driver.persistence import write_mirrors
from lunar_tune.signals import (
    heed_again,
    interrupted_once,
    is_interrupted,
    uninterrupted,
)
from lunar_tune.study.folder import Folder

ENDING = """
import os, signal, sys
from lunar_tune.cli.main import reporting_errors
with reporting_errors(debug=False):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        for _ in range({more}):
            os.kill(os.getpid(), signal.SIGINT)
        print("put back")
"""


TALKING = """
import os, sys
from lunar_tune.cli.main import main
main(["--help"])
with open(sys.argv[1], "w") as file:
    os.system("echo what a library prints")
    file.write("this alone")
main(["search", "--num-trials", "0"])
"""
ASKED = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


@pytest.fixture(autouse=True)
def _heeded() -> Iterator[None]:
    here = {number: signal.signal(number, handler) for number, handler in ASKED.items()}
    yield
    for number, handler in here.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("more", "is_put_back"), [(2, True), (3, False)])
def test_what_ends_is_disturbed_by_the_fourth_press_alone(more: int, is_put_back: bool) -> None:
    done = finish(start([sys.executable, "-c", ENDING.format(more=more)], cwd=Path.cwd()))
    assert done.returncode == 130
    assert ("put back" in done.stdout) is is_put_back
    assert done.stderr.count("more Ctrl-C to end at once") == 2
    assert done.stderr.endswith("interrupted\n")
    assert "Traceback" not in done.stderr


def send(*numbers: int) -> int:
    """Send signals to this process, one after another; return how many did not end it."""
    for number in numbers:
        signal.raise_signal(number)
    return len(numbers)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_and_neither_more_nor_a_closed_terminal_disturb(first: int) -> None:
    undisturbed = []

    def search() -> None:
        with interrupted_once():
            undisturbed.append(send(signal.SIGHUP) and not is_interrupted())
            try:
                send(first)
            finally:
                send(*(signal.SIGTERM, signal.SIGHUP, signal.SIGINT) * 2)
                with interrupted_once(), uninterrupted():
                    send(signal.SIGTERM)
                undisturbed.append(is_interrupted())

    with pytest.raises(KeyboardInterrupt):
        search()
    assert undisturbed == [True, True]
    assert {number: signal.getsignal(number) for number in ASKED} == ASKED


@pytest.mark.parametrize(
    ("sent", "whole"),
    [((signal.SIGTERM, signal.SIGINT, signal.SIGTERM), 3), ((signal.SIGINT,) * 4, 0)],
)
def test_what_is_not_to_be_interrupted_waits_for_its_end_but_for_the_fourth_press(
    sent: tuple[int, ...], whole: int
) -> None:
    done = [0]

    def write() -> None:
        with interrupted_once(), uninterrupted():
            done.append(send(*sent))

    with pytest.raises(KeyboardInterrupt):
        write()
    assert done[-1] == whole


def test_a_signal_that_somebody_else_handles_or_ignores_is_left_to_them() -> None:
    """`nohup` ignores SIGHUP, a shell's background SIGINT; a scheduler's SIGTERM still counts."""
    heard: list[object] = []

    def search() -> None:
        with interrupted_once():
            heard.append(send(signal.SIGINT, signal.SIGHUP))
            send(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt):
        search()
    signal.signal(signal.SIGTERM, lambda *_: heard.append("theirs"))
    search()
    assert heard == [2, 2, "theirs"]


def test_a_handler_that_c_code_takes_away_is_put_back() -> None:
    """As `ray.shutdown` does: a second SIGTERM would end the process before its report."""

    def search() -> None:
        with interrupted_once():
            libc = ctypes.CDLL(None)
            libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
            libc.signal(signal.SIGTERM, None)
            heed_again()
            send(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        search()


@pytest.mark.parametrize("lost", ["pipe", "terminal", "closed", "full"])
def test_a_command_whose_output_nobody_reads_does_its_work_in_silence(
    lost: str, tmp_path: Path
) -> None:
    """As `| head`, a terminal that is closed, and `>&-`: no traceback, the usual exit code.

    What somebody will read in a file that is not whole is an error.
    """
    reading, writing = os.openpty() if lost == "terminal" else os.pipe()
    os.close(reading)
    line = [sys.executable, "-c", TALKING, str(tmp_path / "done")]
    if lost == "closed":
        line = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *line]
    with Path("/dev/full").open("wb") as full:
        outputs = {"stdout": writing, "stderr": writing}
        if lost == "full":
            outputs = {"stdout": full, "stderr": subprocess.PIPE}
        done = subprocess.run(line, **outputs, env=environment(), timeout=TIMEOUT, check=False)
    os.close(writing)
    if lost == "full":
        assert done.stderr.endswith(b"error: the output is not whole: No space left on device\n")
    assert done.returncode == 2
    assert (tmp_path / "done").read_text() == "this alone"


def test_an_interruption_that_python_passes_over_comes_again() -> None:
    """An error in a weak reference's callback is printed and forgotten."""
    things = [set[int]()]
    reference = weakref.ref(things[0], lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), interrupted_once():
        time.sleep(60 if things.clear() is None else 0)
    assert reference() is None


POINTS = {
    "lunar_tune.driver.plan.load_space": None,
    "lunar_tune.driver.run.search_log": None,
    "lunar_tune.tracking.store.open_experiment": None,
    "lunar_tune.trial.worker.load_model": None,
    "lunar_tune.driver.session.open_study": None,
    "lunar_tune.driver.session.search_document": None,
    "lunar_tune.tracking.runs.bring": None,
    "lunar_tune.trial.worker.Worker.run": "KILLED",
    "lunar_tune.driver.session.write_best": "KILLED",
    "lunar_tune.driver.session.write_mirrors": "FINISHED",
    "lunar_tune.driver.session.print_result": "FINISHED",
}


@pytest.mark.parametrize("point", POINTS)
def test_an_interrupted_search_leaves_no_run_open_and_no_name_taken(
    point: str,
    small: list[str],
    tmp_path: Path,
    empty_store: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C when a function is called: `None` where nothing is left, else how the run ended.

    And two more signals while what there is is written.
    """
    empty_store(tmp_path / "mlflow.db")
    original = pydoc.locate(point)
    assert callable(original)

    def called(*values: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)  # in another thread it does not raise there
        return original(*values, **named)

    def ending(*values: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        write_mirrors(*values)

    monkeypatch.setattr("lunar_tune.driver.session.write_mirrors", ending)
    monkeypatch.setattr(point, called)
    options = ("--in-process", "--num-trials", "1", "--sampler", "random", "--force")
    options += ("--constrain", "retain_rouge1>=0", "--output", str(tmp_path), "--name", "n")
    done = without_ray(COMMAND, *small, *options)
    assert done.exit_code == 130, done.output
    assert "Traceback" not in done.output
    if POINTS[point] is not None:
        assert statuses(tmp_path)[0] == [POINTS[point]]
    else:
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
            active = "SELECT count(*) FROM runs WHERE lifecycle_stage = 'active'"
            assert store.execute(active).fetchone() == (0,)
    assert Folder(tmp_path / "n").is_taken is (POINTS[point] is not None)
