"""Ctrl-C in any command: the first interrupts, those that follow let it end what it began."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import start

from lunar_tune.cli.running import interrupted_once

ENDING = """
import os, signal, sys
from lunar_tune.cli.running import reporting_errors
with reporting_errors(debug=False):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        for _ in range({more}):
            os.kill(os.getpid(), signal.SIGINT)
        print("put back")
"""


def ended(more: int) -> subprocess.CompletedProcess[str]:
    process = start([sys.executable, "-c", ENDING.format(more=more)], cwd=Path.cwd())
    output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.mark.parametrize(("more", "is_put_back"), [(0, True), (2, True), (3, False)])
def test_what_ends_is_disturbed_by_the_fourth_press_alone(more: int, is_put_back: bool) -> None:
    done = ended(more)
    assert done.returncode == 130
    assert ("put back" in done.stdout) is is_put_back
    assert done.stderr.count("more to end at once") == min(more, 2)
    assert done.stderr.endswith("interrupted\n")
    assert "Traceback" not in done.stderr


def test_the_handler_is_put_back_and_another_one_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with interrupted_once():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupted_once():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
