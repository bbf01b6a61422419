"""What is seen while a search runs: a line a trial in a file, a bar on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lunar_tune.reporting.rows import COMPLETE, FAILED, TrialRow
from lunar_tune.search.progress import SearchProgress


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


def shown(*rows: TrialRow, terminal: bool, quiet: bool = False) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160, quiet=quiet)
    with SearchProgress(console, 3) as progress:
        for one in rows:
            progress.ended(one)
    return text.getvalue()


def test_a_file_gets_one_line_a_trial_with_the_best_feasible_so_far() -> None:
    lines = shown(row(0, 0.5, 0.9), row(1, 0.1, 0.4), FAILURE, terminal=False).splitlines()

    assert len(lines) == 3
    assert lines[0].startswith("trial 1/3  L0 c2.0 lr3e-3  forget 0.500  retain 0.900  feasible")
    assert "infeasible" in lines[1]
    assert "best forget 0.500 at retain 0.900 (L0" in lines[1]
    assert "failed: the loss became NaN [step 3]" in lines[2]
    assert "1 failed" in lines[2]
    assert lines[2].endswith("about 0 s left")


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
