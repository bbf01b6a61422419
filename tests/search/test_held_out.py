"""Questions that no trial is judged on: the base model answers them, too."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
from chart_specs import legend
from shared_searches import FULL_BUDGET, SharedSearch

from lunar_tune.cli.export import export as COMMAND
from lunar_tune.report.charts import trade_off
from lunar_tune.report.page import write_static_page
from lunar_tune.report.results import SearchResults, short_report
from lunar_tune.study.folder import Folder, read_answers
from lunar_tune.yaml_files import read_yaml

pytestmark = pytest.mark.slow  # a search of its own


@pytest.fixture
def copy(held_out: SharedSearch, tmp_path: Path) -> Folder:
    return Folder(held_out.copied(tmp_path))


def test_the_confirmation_asks_the_base_model_the_held_out_questions(copy: Folder) -> None:
    """And no trial was asked one of them. Which they are: `test_tasks`."""
    before, after = (read_answers(copy.answers(number, full=True)) for number in (None, 0))
    asked = {(row.set_name, row.question, row.row) for row in before}
    assert asked == {(row.set_name, row.question, row.row) for row in after}
    searched = {row.question for row in read_answers(copy.answers(0))}
    assert searched.isdisjoint(question for _, question, _ in asked)
    table = SearchResults.read(copy.path).answers(full=True)
    kept = {(row.set_name, row.row): row.answer for row in before}
    places = zip(table["set"], table["row"], strict=True)
    assert table["base_model"].tolist() == [kept[place] for place in places]


def test_page_note_and_picture_say_what_was_held_out(copy: Folder, tmp_path: Path) -> None:
    results = SearchResults.read(copy.path)
    assert list(results.compared) == [
        *("base model", "trial 0, as searched"),
        *("base model, held-out questions", "trial 0, held-out questions"),
    ]
    assert "| trial 0, held-out questions " in short_report(results)
    assert "base model, held out" in legend(trade_off(results))
    page = tmp_path / "page.html"
    write_static_page([results], page)
    assert "confirmed on held-out questions" in page.read_text()
    assert "all questions" not in page.read_text().split("<main>")[1].split("<h3>Charts")[0]
    assert "got worse is not known" not in page.read_text()
    copy.answers(None, full=True).unlink()
    write_static_page([SearchResults.read(copy.path)], page)
    of_best = page.read_text().split('data-number="2"')[0]
    assert "got worse is not known" in of_best
    assert "No question to keep got worse" not in of_best


@pytest.mark.parametrize("printed", [True, False], ids=["best", "another trial"])
def test_a_card_says_whether_its_scores_are_on_held_out_questions(
    copy: Folder, held_out: SharedSearch, monkeypatch: pytest.MonkeyPatch, printed: bool
) -> None:
    """The printed command writes the best one; another trial was never asked those questions."""
    monkeypatch.setattr("lunar_tune.trial.evaluator.PUBLISHED_MAX_NEW_TOKENS", FULL_BUDGET)
    monkeypatch.chdir(held_out.cwd)
    lines = held_out.result.stdout.splitlines()
    (line,) = [line for line in lines if "lunar_tune.export" in line]
    name = f"../runs/{held_out.name}"
    arguments = [word.replace(name, str(copy.path)) for word in shlex.split(line)[3:]]
    assert COMMAND.main(arguments + ([] if printed else ["--trial", "2"])) == 0
    document = json.loads((copy.path / "model" / "export.json").read_text())
    card = (copy.path / "model" / "README.md").read_text()
    assert document["proven"] is True
    assert document["on_held_out"] is printed
    if not printed:
        assert "* scores are on the questions of the trials, not on held-out questions" in card
        assert "| as the search reported it |" in card
        return
    rows = [row for row in read_answers(copy.answers(None, full=True)) if row.set_name == "retain"]
    mean = math.fsum(row.rouge1 for row in rows) / len(rows)
    assert document["baseline_scores"]["retain_rouge1"] == pytest.approx(mean)
    confirmed = read_yaml(copy.best)["confirmed"]["scores"]
    scores = {name: confirmed[name] for name in document["scores"]}
    assert document["scores"] == pytest.approx(scores, abs=1e-9)
    assert {"forget_rouge1", "retain_rouge1"} <= scores.keys()
    assert "* scores are on held-out questions" in card
    assert "as the search reported it, on held-out questions" in card
    assert "≈" not in card
