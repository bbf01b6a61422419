"""What is seen while a search runs: a line a trial in a file, a bar on a terminal, time left."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
from collections.abc import Sequence

import pytest
from rich.cells import cell_len
from rich.console import Console

from lunar_tune.report.log_file import RECORD
from lunar_tune.report.progress import SearchDisplay, TimeLeft, shown_duration
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow


def row(number: int, forget: float, retain: float) -> TrialRow:
    return TrialRow(
        number=number,
        state=COMPLETE,
        parameters={"layer": number, "coefficient": 2.0, "learning_rate": 0.003},
        scores={"forget_rouge1": forget, "retain_rouge1": retain},
        feasible=retain >= 0.8,
        seconds={"trial": 1.0},
    )


FAILURE = TrialRow(
    number=2, state=FAILED, parameters={"layer": 2}, failure="the loss became NaN [step 3]"
)


def shown(
    *rows: TrialRow,
    terminal: bool,
    quiet: bool = False,
    width: int = 160,
    earlier: Sequence[TrialRow] = (),
) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, quiet=quiet)
    with SearchDisplay(console) as display:
        display.follow(3, earlier)
        for one in rows:
            display.ended(one)
    return text.getvalue()


def test_a_file_gets_one_line_a_trial_with_the_best_feasible_so_far() -> None:
    lines = shown(row(0, 0.5, 0.9), row(1, 0.1, 0.4), FAILURE, terminal=False).splitlines()

    assert len(lines) == 3
    assert lines[0].startswith(
        "1/3  trial 0  L0 c2.0 lr0.003  forget 0.500  retain 0.900  feasible"
    )
    assert "infeasible" in lines[1]
    assert "best forget 0.500 at retain 0.900 (L0" in lines[1]
    assert "failed: the loss became NaN [step 3]" in lines[2]
    assert "1 failed" in lines[2]
    assert lines[2].endswith("1 failed"), "no time is left, and what comes then takes some"


def test_a_search_without_a_feasible_trial_says_so() -> None:
    assert "none feasible yet" in shown(row(0, 0.1, 0.4), terminal=False)


def test_a_terminal_gets_a_bar_with_the_same_facts() -> None:
    text = shown(row(0, 0.5, 0.9), FAILURE, terminal=True)

    assert "2/3" in text
    assert "best forget 0.500 at retain 0.900" in text
    assert "1 failed" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_when_quiet(terminal: bool) -> None:
    assert shown(row(0, 0.5, 0.9), FAILURE, terminal=terminal, quiet=True) == ""


def last_line(text: str) -> str:
    """Return what stands on the screen at the end, without colours and movements."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line for line in re.split(r"[\r\n]", plain) if line.strip()][-1].rstrip()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_bar_is_one_line_on_terminals_of_any_width_and_stays(width: int) -> None:
    """What is redrawn is one line: a second one would be left behind or make the screen jump."""
    text = shown(row(0, 0.5, 0.9), FAILURE, terminal=True, width=width)

    assert "\x1b[1A" not in text, "the cursor never moves up"
    assert text.endswith("\x1b[?25h"), "the cursor is seen again"
    line = last_line(text)
    assert cell_len(line) <= width
    assert line.strip().startswith("trials ━" if width >= 120 else "━")
    if width >= 80:
        assert "2/3" in line
        assert "1 failed · " in line
        assert "0.500" in line
        assert "0.900" in line
    if width >= 120:
        assert "best forget 0.500 at retain 0.900 (L0 c2" in line


def test_the_whole_setting_can_be_read_on_80_columns() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80)
    parameters = {"layer": 14, "coefficient": 2.25, "learning_rate": 3.1e-3}
    best = dataclasses.replace(row(0, 0.5, 0.9), parameters=parameters)
    with SearchDisplay(console) as display:
        display.follow(100, [best] * 11)
        display.ended(FAILURE)
    line = last_line(text.getvalue())
    assert "12/100" in line
    assert "1 failed" in line
    assert line.endswith("forget 0.500 retain 0.900 L14 c2.25 lr0.0031")


def test_a_search_that_goes_on_begins_where_it_stopped() -> None:
    before = [row(0, 0.5, 0.9), FAILURE]
    told, line = shown(row(1, 0.1, 0.4), terminal=False, earlier=before).splitlines()

    assert told == "going on after 2 trials"
    assert line.startswith("3/3  trial 1  L1")
    assert "best forget 0.500 at retain 0.900 (L0" in line
    assert "1 failed" in line
    nothing_new = last_line(shown(terminal=True, earlier=before))
    assert "2/3" in nothing_new
    assert "left …" in nothing_new
    assert "best forget 0.500" in nothing_new


def test_a_trial_that_runs_again_is_a_failure_and_not_a_step() -> None:
    lost = dataclasses.replace(FAILURE, again=True, failure="a worker was lost")
    text = shown(row(0, 0.5, 0.9), lost, row(1, 0.1, 0.4), terminal=False).splitlines()

    assert [line.split("  ")[0] for line in text] == ["1/3", "1/3", "2/3"]
    assert "failed, runs again: a worker was lost" in text[1]
    assert "1 failed" in text[2]
    bar = last_line(shown(row(0, 0.5, 0.9), lost, terminal=True))
    assert "1/3" in bar
    assert "1 failed" in bar


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("lunar_tune.report.progress.time.monotonic", lambda: self.now)

    def ended(self, left: TimeLeft, *moments: float) -> None:
        for moment in moments:
            self.now = 1000.0 + moment
            left.ended()


def test_time_left_is_the_pace_since_the_first_trial_and_counts_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first takes 60 s, of which loading is a part, the next two 10 s each: seven are 70 s."""
    clock = Clock(monkeypatch)
    left = TimeLeft(10)
    assert left() is None
    clock.ended(left, 60)
    assert left() is None
    clock.ended(left, 70, 80)
    assert left() == pytest.approx(70)
    clock.now += 4
    assert left() == pytest.approx(66)
    clock.now += 1000
    assert left() == 0
    clock.ended(left, *range(2000, 2007))
    assert left() == 0


def test_time_left_of_a_search_that_goes_on_counts_only_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 100 trials 90 are done, in no time at all; the ones here take 5 s: eight are 40 s."""
    clock = Clock(monkeypatch)
    left = TimeLeft(100, done=90)
    clock.ended(left, 5, 10)
    assert left() == pytest.approx(40)
    assert TimeLeft(10, done=12)() == 0


def test_time_left_is_no_longer_than_the_budget_and_the_trial_that_runs_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """98 trials of 10 s would take 980 s; after 100 s none starts, of which 80 s are left."""
    clock = Clock(monkeypatch)
    left = TimeLeft(100, budget=100.0)
    clock.ended(left, 10, 20)
    assert left() == pytest.approx(80 + 10)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (7500, "2 h 05 min")],
)
def test_durations_are_no_more_exact_than_they_are_known(seconds: float, text: str) -> None:
    assert shown_duration(seconds) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_done_beside_trials_takes_the_place_of_what_was_shown(terminal: bool) -> None:
    text = io.StringIO()
    with SearchDisplay(Console(file=text, force_terminal=terminal, width=100)) as display:
        display.doing("looking")
        display.doing(None)
        display.follow(2, [row(0, 0.5, 0.9)], None)
        display.ended(row(1, 0.1, 0.9))
        display.doing("confirming")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert plain.count("looking") >= 1
    assert plain.count("confirming") >= 1
    if not terminal:
        assert plain.splitlines()[0] == "looking"
        assert plain.splitlines()[-1] == "confirming"
    assert "going on after 1 trials" in plain
    assert "2/2" in plain


@pytest.mark.parametrize("terminal", [True, False])
def test_every_trial_has_a_line_in_the_log(
    terminal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """On a terminal directly; elsewhere it is printed, which the log hears of."""
    with caplog.at_level(logging.INFO, logger=RECORD.name):
        printed = shown(row(0, 0.5, 0.9), FAILURE, terminal=terminal)
    lines = caplog.messages if terminal else printed.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["1/3", "2/3"]
    assert "failed: the loss became NaN [step 3]" in lines[1]
