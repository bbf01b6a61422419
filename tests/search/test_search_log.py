"""A search's log: what is printed and what is not, with the time and without secrets."""

from __future__ import annotations

import io
import logging
import re
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from lunar_tune.errors import InputError
from lunar_tune.report.log_file import RECORD, search_log
from lunar_tune.report.progress import build_progress

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} (INFO|WARNING|ERROR) +")
QUIET = Console(file=io.StringIO(), quiet=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search.log"


def lines_of(path: Path) -> list[str]:
    """Return what was said; every line must have its time."""
    found = path.read_text(encoding="utf-8").splitlines()
    assert all(STAMP.match(line) for line in found), found
    return [STAMP.sub("", line) for line in found]


@pytest.mark.parametrize(("quiet", "terminal"), [(True, False), (False, True)])
def test_what_is_printed_is_logged_whole_and_without_colours(
    path: Path, quiet: bool, terminal: bool
) -> None:
    """Also on a narrow screen, in the middle of a moving display, and where nothing is shown."""
    text = io.StringIO()
    console = Console(file=text, width=30, quiet=quiet, force_terminal=terminal)
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]model[/bold]", "a name that is longer than the screen is wide")
    with search_log(path, console), build_progress(console) as bar:
        bar.add_task("trials", total=2, note="")
        console.print(table)
        console.print("[red]no[/red] room for this on one line of the screen, \\[kept]", end="\n\n")
        bar.refresh()
    console.print("after it")

    assert lines_of(path) == [
        "model  a name that is longer than the screen is wide",
        "no room for this on one line of the screen, [kept]",
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
    assert lines_of(path) == ["search one", "trial", "search two", "trial"]


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
    assert (lines[1:2] == ["Traceback (most recent call last):"]) is (first != last)
    assert "hunter2secret" not in text


def test_a_disk_that_is_full_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Linux has a file that is always full."""
    with search_log(Path("/dev/full"), QUIET):
        RECORD.info("lost")
        RECORD.info("lost, too")
    assert capsys.readouterr().err == ""
