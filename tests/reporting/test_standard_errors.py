"""A setting at retain .803 ± .03 is shown as what it is, wherever its scores are shown."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chart_specs import drawn, forms, panels
from invented_searches import GOAL
from pages_by_hand import Parsed, said, searched, trial
from rich.console import Console

from lunar_tune.metrics.evaluate import row_means
from lunar_tune.metrics.goal import Goal
from lunar_tune.report.charts import trade_off
from lunar_tune.report.findings import cautions
from lunar_tune.report.methods_table import Cell, read_table, write_methods_table
from lunar_tune.report.progress import SearchDisplay
from lunar_tune.report.results import SearchResults, write_report, write_static_page
from lunar_tune.report.summary import print_result
from lunar_tune.study.folder import Folder, write_answers, write_trials
from lunar_tune.tracking.runs import trial_content

RIGHT, ASKED = 143, 178
RETAIN = RIGHT / ASKED
ERROR = math.sqrt(RETAIN * (1 - RETAIN) / ASKED)
"""Of rows that are 0 or 1: that of a share."""
ANSWERS = [
    *(said("forget", f"forget {n}?", "I do not know.", float(n < 4)) for n in range(28)),
    *(said("retain", f"keep {n}?", "kept", float(n < RIGHT)) for n in range(ASKED)),
]
SCORES = row_means(ANSWERS, ("forget", "retain"))
SECONDS = {"trial": 1.0, "suggest": 0.1}
ROW = dataclasses.replace(trial(0, 4 / 28, RETAIN), scores=SCORES, seconds=SECONDS)
TEXT, MARGIN = "0.803 ± 0.030", "0.1"
CAUTION = (
    "retain ROUGE-1 0.803 ± 0.030 keeps the constraint of 0.8 by 0.1 standard errors: other "
    "questions of the same edges may miss it. To keep it with a margin: "
    "--constrain 'retain_rouge1>=0.83'"
)


@pytest.fixture
def found(tmp_path: Path) -> SearchResults:
    notes: dict[str, Any] = {"mlflow": {"id": "one", "origin": {}}, "description": {"data": {}}}
    return searched(tmp_path / "s", ROW, answers={0: ANSWERS}, **notes)


def test_the_setting_is_what_its_name_says() -> None:
    assert (SCORES["retain_rouge1"], SCORES["retain_rouge1_se"]) == pytest.approx((RETAIN, ERROR))
    assert f"{RETAIN:.3f} ± {ERROR:.3f}" == TEXT
    (margin,) = GOAL.barely_kept(SCORES).values()
    assert margin == pytest.approx((RETAIN - 0.8) / ERROR)
    assert f"{margin:.1f}" == MARGIN


def test_a_bound_is_barely_kept_where_it_is_kept_by_less_than_one_standard_error() -> None:
    texts = ["retain_rouge1>=0.8", "forget_rouge1<=0.2", "retain_mrr>=0.5"]
    goal = Goal.read("forget_rouge1", texts)
    for scores, expected in (
        ({"retain_rouge1": 0.83, "retain_rouge1_se": 0.031, "forget_rouge1": 0.1}, [texts[0]]),
        ({"retain_rouge1": 0.83, "retain_rouge1_se": 0.029}, []),
        ({"retain_rouge1": 0.79, "retain_rouge1_se": 0.03}, []),  # missed
        ({"retain_rouge1": 0.8, "retain_rouge1_se": 0.03}, [texts[0]]),
        ({"retain_rouge1": 1.0, "retain_rouge1_se": 0.0}, []),  # all rows alike
        ({"retain_rouge1": 0.81}, []),  # of an older search
        (
            {"retain_mrr": 0.51, "retain_mrr_se": 0.1}
            | {"forget_rouge1": 0.19, "forget_rouge1_se": 0.02},
            texts[:0:-1],
        ),
    ):
        assert list(map(str, goal.barely_kept(scores))) == expected


def test_report_and_summary_say_it_and_what_would_keep_a_margin(
    found: SearchResults, tmp_path: Path
) -> None:
    assert cautions(found) == [CAUTION]
    write_report(found, tmp_path / "report.md", {})
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    row = next(line for line in report.splitlines() if "confirmation" in line)
    assert TEXT in row
    assert "0.143 ± 0.066" in row
    assert f"| {TEXT} " in next(line for line in report.splitlines() if line.startswith("| 0 "))
    assert CAUTION in report.replace("\\", "")
    assert TEXT in repr(found)
    screen = io.StringIO()
    print_result(Console(file=screen, width=80), found, folder=tmp_path, commands={})
    (scores, errors) = re.findall(".*(?:confirmation|± standard error).*", screen.getvalue())
    assert scores.split()[3:5] == ["0.143", "0.803"]
    assert errors.split()[3:5] == ["0.066", "0.030"]


def test_a_line_of_a_trial_and_the_page_say_by_how_much_the_bound_is_kept(
    found: SearchResults, tmp_path: Path
) -> None:
    screen = io.StringIO()
    with SearchDisplay(Console(file=screen, width=160), GOAL) as display:
        display.follow(12)
        display.ended(ROW)
        display.ended(dataclasses.replace(ROW, number=1, scores=SCORES | {"retain_rouge1": 0.9}))
    header, close, clear = screen.getvalue().splitlines()
    assert f"feasible ★ by {MARGIN} se" in close
    assert "se" not in clear
    assert len(header) == len(close) == len(clear) <= 80

    write_static_page([found], tmp_path / "page.html")
    cells = [text for _, text in Parsed((tmp_path / "page.html").read_text("utf-8")).cells]
    assert cells.count(TEXT) == 3, "as searched, confirmed, and in the list of trials"
    assert f"yes (by {MARGIN} se)" in cells


def test_the_trade_off_has_the_bests_error_bars(found: SearchResults) -> None:
    (panel,) = panels(trade_off(found))
    (star,) = drawn(panel, "best, confirmed")
    assert f"retain ROUGE-1 {TEXT}" in star["says"]
    (bars,) = [one for one in forms(panel, "rule") if "x2" in one["encoding"]]
    across, along = bars["values"]
    forget, error = SCORES["forget_rouge1"], SCORES["forget_rouge1_se"]
    assert (across["x"], across["x2"]) == pytest.approx((forget - error, forget + error))
    assert across["y"] == across["y2"] == along["y"] + ERROR == pytest.approx(RETAIN)
    assert along["y2"] == pytest.approx(RETAIN + ERROR)


def test_table_5_trials_parquet_and_mlflow_have_it(found: SearchResults, tmp_path: Path) -> None:
    cell = Cell(model="tiny", data="mini", method="lunar", variant="adamw", seed=0)
    notes = {**found.study.notes, "num_trials": 1}
    table = read_table({cell: dataclasses.replace(found.study, notes=notes)}, 1)
    markdown, csv, _ = write_methods_table(table, tmp_path)
    assert f"| {TEXT} " in markdown.read_text()
    header, row = csv.read_text().splitlines()
    written = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(written["retain_rouge1_se"]) == pytest.approx(ERROR)

    write_trials(tmp_path / "trials.parquet", [ROW])
    (kept,) = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert kept["retain_rouge1_se"] == pytest.approx(ERROR)
    tracked = trial_content(found, ROW, "the search's run").metrics
    for name in ("retain_rouge1_se", "full_retain_rouge1_se"):
        assert tracked[name] == pytest.approx(ERROR)
    assert "stage_retain_rouge1_se" not in tracked


def test_an_older_search_has_the_errors_of_the_answers_that_give_its_scores(tmp_path: Path) -> None:
    older = {name: score for name, score in SCORES.items() if not name.endswith("_se")}
    row = dataclasses.replace(ROW, scores=older)
    folder = tmp_path / "s"
    for changes, known in (({}, True), ({"retain_rouge1": 0.9}, False)):
        scores: dict[str, Any] = older | changes
        one = dataclasses.replace(row, scores=scores)
        write_answers(Folder(folder).answers(0, full=True), ANSWERS, ())
        search = searched(folder, one, answers={})
        assert ("retain_rouge1_se" in (search.confirmed or {})) is known
        assert cautions(search) == [CAUTION] * known
    Folder(folder).answers(0, full=True).unlink()
    assert searched(folder, row, answers={}).confirmed == older
    assert cautions(searched(folder, row, answers={})) == []
