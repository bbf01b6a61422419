"""What is seen while a search runs: a line a trial and one that moves; and its log."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
from invented_searches import GOAL, trial
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from lunar_tune.display import Screen, encodable, say, shown_duration, warn
from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal
from lunar_tune.report.progress import RECORD, SearchDisplay, search_log, working
from lunar_tune.study.rows import FAILED, TrialRow


def row(number: int, forget: float, retain: float, **more: float) -> TrialRow:
    parameters = {"layer": number, "coefficient": 2.0, "learning_rate": 0.0031}
    one = trial(number, forget, retain, parameters)
    return dataclasses.replace(one, scores={**one.scores, **more}, seconds={"trial": 1.25})


FAILURE = TrialRow(
    number=2, state=FAILED, parameters={"layer": 2}, failure="the loss became NaN [step 3]"
)
LOST = dataclasses.replace(FAILURE, again=True, failure="a worker was lost")


def shown(
    *rows: TrialRow,
    terminal: bool = False,
    width: int = 160,
    total: int = 3,
    earlier: Sequence[TrialRow] = (),
    goal: Goal = GOAL,
    encoding: str = "utf-8",
) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", newline="")
    console = Console(file=file, force_terminal=terminal, width=width)
    with SearchDisplay(console, goal) as display:
        display.follow(total, earlier)
        for one in rows:
            display.ended(one)
    file.seek(0)
    return re.sub(r"\x1b\[[0-9;?]*[B-Zac-z]", "", file.read())  # without colours; moves stay


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in re.split(r"[\r\n]", text) if line.strip()]


def test_every_ended_trial_has_a_line_with_what_it_reached_or_missed() -> None:
    rows = (row(0, 0.5, 0.9), row(1, 0.1, 0.4), LOST, row(3, 0.4, 0.85), FAILURE)
    assert shown(*rows, total=4).splitlines() == [
        "done  trial  setting               forget  retain  constraints           time",
        "1/4      0  L0 c2.0 lr0.0031       0.500   0.900  feasible ★           1.2 s",
        "2/4      1  L1 c2.0 lr0.0031       0.100   0.400  retain 0.400 below   1.2 s",
        "2/4      2  L2                    failed, runs again: a worker was lost",
        "3/4      3  L3 c2.0 lr0.0031       0.400   0.850  feasible ★           1.2 s",
        "4/4      2  L2                    failed: the loss became NaN [step 3]",
    ]


def test_another_goal_has_its_own_score_and_bounds_in_the_line() -> None:
    goal = Goal.read("forget_mrr", ["retain_rouge1>=0.8", "forget_log_prob<=-9", "factual_mrr>=1"])
    one = row(0, 0.1, 0.7, forget_mrr=0.25, forget_log_prob=-8.5)
    header, line = shown(one, goal=goal).splitlines()
    assert re.search(r"retain +forget MRR +constraints", header)
    assert re.search(r"0\.700 +0\.250 +factual MRR not measured …", line)
    line = shown(dataclasses.replace(one, scores={**one.scores, "factual_mrr": 1.0}), goal=goal)
    assert "forget log prob 0.500 above …" in line


@pytest.mark.parametrize("width", [40, 120])
def test_a_terminal_has_one_moving_line_and_the_trials_above_it(width: int) -> None:
    """What is redrawn is one line: a second one would be left behind or make the screen jump."""
    parameters = {"layer": 14, "coefficient": 12.34, "learning_rate": 3.1e-4}
    long = dataclasses.replace(row(999, 0.1, 0.4), parameters=parameters, seconds={"trial": 99})
    text = shown(row(0, 0.5, 0.9), long, FAILURE, terminal=True, width=width, total=100)
    lines = lines_of(text)
    assert "\x1b[1A" not in text, "the cursor never moves up"
    assert all(cell_len(line) <= width for line in lines)
    moving = lines[-1].strip()
    assert re.match("trials [━╸]" if width >= 100 else "[━╸]", moving)
    if width >= 80:
        assert "3/100" in moving
        assert moving.endswith("1 failed · best trial 0: forget 0.500, retain 0.900")
        staying = [line for line in lines if "━" not in line]
        piped = shown(row(0, 0.5, 0.9), long, FAILURE, total=100).splitlines()
        assert staying == piped, "whole on 80 columns, and the same everywhere"


def test_what_is_shown_is_what_the_console_can_show() -> None:
    assert "feasible * " in shown(row(0, 0.5, 0.9), encoding="cp1252")
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert encodable("a\x1b[2J\r\nb\u202e  ß 日\ud800", console) == "a [2J b ß ?"


STEERING = "a\x1b[2J\x9b31m\u202eb\x07"


def test_no_text_steers_the_terminal_or_forges_a_line_of_the_log(tmp_path: Path) -> None:
    """Colours and moves of the program's own are left."""
    file = io.StringIO()
    console = Screen(file=file, width=60, force_terminal=True, emoji=False)
    opening = [f"data: {STEERING}\n2026-01-01 INFO    forged"]
    with search_log(tmp_path / "l", console, opening), working(console, f"[/b]{STEERING}"):
        say(console, STEERING)
        warn(console, STEERING)
        console.print(f"[red]{escape(STEERING)}[/red]", Panel(STEERING), Table(STEERING))
        logging.getLogger("any").warning("%s\nERROR forged", STEERING)
    shown = file.getvalue()
    for text in (shown, log := (tmp_path / "l").read_text("utf-8")):
        raw = re.findall("[\x00-\x09\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u202e]|\x1b.2J", text)
        assert raw == []
        assert text.count("a\\x1b[2J") >= 5
    assert "\x1b[31m" in shown
    assert "\x1b" not in log
    assert [line for line in log.splitlines() if line.startswith(("2026-01-01", "ERROR"))] == []


def test_a_search_that_goes_on_begins_where_it_stopped() -> None:
    before = [row(0, 0.5, 0.9), FAILURE]
    told, _, line = shown(row(1, 0.1, 0.4), earlier=before).splitlines()
    assert told == "resuming after 2 trials"
    assert line.startswith("3/3      1  L1")
    assert "feasible" not in line
    nothing_new = lines_of(shown(terminal=True, earlier=before))[-1]
    for part in ("2/3", "left …", "1 failed · best trial 0: forget 0.500"):
        assert part in nothing_new
    assert "none feasible yet" in shown(row(0, 0.1, 0.4), terminal=True)


def test_time_left_is_the_pace_since_the_first_trial() -> None:
    durations = {0.4: "0 s", 99: "99 s", 100: "2 min", 3600: "60 min", 7500: "2 h 05 min"}
    assert {one: shown_duration(one) for one in durations} == durations
    for done, moments, budget, left in (
        # The first takes 60 s, of which loading is a part, the next two 10 s each: seven are 70 s.
        (0, (60, 70, 80), None, "left 70 s"),
        (0, (60,), None, "left …"),
        # Four were done before, in no time at all; the ones here take 5 s: four are 20 s.
        (4, (5, 10), None, "left 20 s"),
        # Eight of 10 s would take 80 s; after 30 s none starts: 10 s are left, and that trial's.
        (0, (10, 20), 30.0, "left 20 s"),
    ):
        clock = MagicMock(return_value=1000.0)
        text = io.StringIO()
        console = Console(file=text, force_terminal=True, width=160, get_time=clock)
        with patch("time.monotonic", clock), SearchDisplay(console, GOAL) as display:
            display.follow(10, [row(n, 0.5, 0.9) for n in range(done)], budget)
            for number, moment in enumerate(moments, done):
                clock.return_value = 1000.0 + moment
                display.ended(row(number, 0.5, 0.9))
        assert left in lines_of(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()))[-1]


def test_what_is_done_beside_trials_replaces_what_was_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    said = []
    for terminal in (True, False):
        console = Console(file=(text := io.StringIO()), force_terminal=terminal, width=100)
        with SearchDisplay(console, GOAL) as display:
            display.doing("looking")
            display.doing(None)
            display.follow(2)
            display.ended(row(0, 0.5, 0.9))
            display.doing("confirming")
        said.append(text.getvalue())
    assert "1/1" in said[0], "a search that ends early has done all that it was to do"
    assert caplog.messages == ["looking", "confirming"], "the log of a moving line"
    assert said[0].index("looking") < said[0].index("confirming")
    assert [said[1].splitlines()[place] for place in (0, -1)] == ["looking", "confirming"]


STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} (INFO|WARNING|ERROR) +")
QUIET = Console(file=io.StringIO(), quiet=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search.log"


def logged_in(path: Path) -> list[str]:
    """Return what was said; every line must have its time."""
    found = path.read_text(encoding="utf-8").splitlines()
    assert all(STAMP.match(line) for line in found), found
    return [STAMP.sub("", line) for line in found]


@pytest.mark.parametrize(("quiet", "terminal"), [(True, False), (False, True)])
def test_what_is_shown_is_logged_without_colours(path: Path, quiet: bool, terminal: bool) -> None:
    """Also on a narrow screen, in the middle of a moving display, and where nothing is shown."""
    text = io.StringIO()
    console = Console(file=text, width=30, quiet=quiet, force_terminal=terminal)
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]model[/bold]", "a name that is longer than the screen is wide")
    with search_log(path, console), SearchDisplay(console, GOAL) as display:
        console.print(table)
        display.follow(3)
        display.ended(row(0, 0.5, 0.9))
        console.print("[red]no[/red] room for this on one line of the screen, \\[kept]", end="\n\n")
        display.ended(FAILURE)
    console.print("after it")
    header, first, second = shown(row(0, 0.5, 0.9), FAILURE).splitlines()
    assert logged_in(path) == [
        *("model  a name that is longer than the screen is wide", header, first),
        *("no room for this on one line of the screen, [kept]", second),
    ]
    assert ("after it" in text.getvalue()) is not quiet


def test_warnings_are_logged_once_and_the_chatter_of_libraries_is_not(path: Path) -> None:
    """Of those that keep records from the root, too, and where a handler is formatted anew."""
    names = ("optuna", "lunar_tune.models.loading", "a_library")
    with search_log(path, QUIET), warnings.catch_warnings():
        warnings.simplefilter("always")
        for logger in map(logging.getLogger, names):
            logger.info("chatter")
            logger.warning("something about %s", logger.name)
        for handler in logging.getLogger("ray").handlers:
            handler.setFormatter(logging.Formatter("%(lineno)d"))
        logging.getLogger("ray").error("of ray")
        warnings.warn("careful", stacklevel=1)
    *logged, warned, line = path.read_text(encoding="utf-8").splitlines()
    assert [STAMP.sub("", one) for one in logged] == [
        *(f"something about {name}" for name in names),
        "of ray",
    ]
    assert warned.endswith("UserWarning: careful")
    assert 'warnings.warn("careful"' in line


def test_a_log_that_is_there_is_gone_on_with_and_nothing_stays_behind(path: Path) -> None:
    before = warnings.showwarning
    for word in ("one", "two"):
        with search_log(path, QUIET, [f"search {word}"]):
            assert not RECORD.propagate
            RECORD.info("trial")
    assert RECORD.propagate
    assert warnings.showwarning is before
    QUIET.print("more")
    logging.getLogger("a_library").warning("more")
    RECORD.warning("more")
    assert logged_in(path) == ["search one", "trial", "search two", "trial"]


@pytest.mark.parametrize(
    ("error", "first", "last"),
    [
        (InputError("no model at https://me:hunter2secret@host/x"), "ended by an error", "no mod"),
        (KeyboardInterrupt(), "interrupted", "interrupted"),
    ],
)
def test_an_error_is_logged_with_its_traceback_and_an_interruption_without(
    path: Path, error: BaseException, first: str, last: str
) -> None:
    with pytest.raises(type(error)), search_log(path, QUIET):
        raise error
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert STAMP.sub("", lines[0]) == first
    assert last in lines[-1]
    assert (lines[1:2] == ["  Traceback (most recent call last):"]) is (first != last)
    assert "hunter2secret" not in text


def test_a_disk_that_is_full_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Linux has a file that is always full."""
    with search_log(Path("/dev/full"), QUIET):
        RECORD.info("lost")
        RECORD.info("lost, too")
    assert capsys.readouterr().err == ""
