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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search.log"


def quiet_console() -> Console:
    return Console(file=io.StringIO(), quiet=True)


def lines_of(path: Path) -> list[str]:
    """Return what was said; every line must have its time."""
    found = path.read_text(encoding="utf-8").splitlines()
    assert all(STAMP.match(line) for line in found), found
    return [STAMP.sub("", line) for line in found]


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
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


def test_a_log_that_is_there_is_gone_on_with(path: Path) -> None:
    for word in ("one", "two"):
        with search_log(path, quiet_console(), [f"search {word}"]):
            RECORD.info("trial")
    assert lines_of(path) == ["search one", "trial", "search two", "trial"]


def test_warnings_of_libraries_are_logged_once_and_their_chatter_is_not(path: Path) -> None:
    """Of those that keep records from the root, too, and where a handler is formatted anew."""
    with search_log(path, quiet_console()):
        for name in ("optuna", "lunar_tune.models.loading", "a_library"):
            logger = logging.getLogger(name)
            logger.info("chatter")
            logger.warning("something about %s", name)
        for handler in logging.getLogger("ray").handlers:
            handler.setFormatter(logging.Formatter("%(lineno)d"))
        logging.getLogger("ray").error("of ray")
        with pytest.warns(UserWarning, match="careful"):
            warnings.warn("careful", stacklevel=1)
    expected = [f"something about {name}" for name in ("optuna", "lunar_tune.models.loading")]
    found = lines_of(path)
    assert found[:4] == [*expected, "something about a_library", "of ray"]


def test_pythons_warnings_are_logged_and_shown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with search_log(path, quiet_console()), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    assert shown == ["careful"]
    (line,) = lines_of(path)
    assert line.startswith("UserWarning: careful (")


def test_nothing_stays_behind(path: Path) -> None:
    before = warnings.showwarning
    console = quiet_console()
    with search_log(path, console):
        assert not RECORD.propagate
    assert RECORD.propagate
    assert warnings.showwarning is before
    names = ("ray", "optuna", "mlflow", RECORD.name, None)
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    assert not [handler for handler in handlers if str(path) in str(handler)]
    console.print("more")
    logging.getLogger("a_library").warning("more")
    assert lines_of(path) == []


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (InputError("no such model at https://me:hunter2secret@host/x"), "no such model"),
        (RuntimeError("a bug"), "RuntimeError: a bug"),
    ],
)
def test_an_error_is_logged_with_its_traceback(path: Path, error: Exception, last: str) -> None:
    with pytest.raises(type(error)), search_log(path, quiet_console()):
        raise error
    text = path.read_text(encoding="utf-8")
    assert "ERROR   ended by an error\nTraceback (most recent call last):" in text
    assert last in text.splitlines()[-1]
    assert "hunter2secret" not in text


def test_an_interruption_is_logged_without_one(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), search_log(path, quiet_console()):
        raise KeyboardInterrupt
    assert lines_of(path) == ["interrupted"]


def test_a_disk_that_is_full_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Linux has a file that is always full."""
    with search_log(Path("/dev/full"), quiet_console()):
        RECORD.info("lost")
        RECORD.info("lost, too")
    assert capsys.readouterr().err == ""
