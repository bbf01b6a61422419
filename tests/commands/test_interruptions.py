"""Ctrl-C in any command: the first interrupts, those that follow let it end what it began."""

from __future__ import annotations

import pydoc
import signal
import sqlite3
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_lines import finish, start, without_ray
from search_results import statuses

from lunar_tune.cli.search import search as COMMAND
from lunar_tune.signals import interrupted_once
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


@pytest.fixture(autouse=True)
def _heeded() -> Iterator[None]:
    here = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, here)


@pytest.mark.parametrize(("more", "is_put_back"), [(0, True), (2, True), (3, False)])
def test_what_ends_is_disturbed_by_the_fourth_press_alone(more: int, is_put_back: bool) -> None:
    done = finish(start([sys.executable, "-c", ENDING.format(more=more)], cwd=Path.cwd()))
    assert done.returncode == 130
    assert ("put back" in done.stdout) is is_put_back
    assert done.stderr.count("more Ctrl-C to end at once") == min(more, 2)
    assert done.stderr.endswith("interrupted\n")
    assert "Traceback" not in done.stderr


def test_the_handler_is_put_back_and_another_one_is_left_alone() -> None:
    with interrupted_once():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupted_once():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


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
    """Ctrl-C when a function is called: `None` where nothing is left, else how the run ended."""
    empty_store(tmp_path / "mlflow.db")
    original = pydoc.locate(point)
    assert callable(original)

    def called(*values: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)  # in another thread it does not raise there
        return original(*values, **named)

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
