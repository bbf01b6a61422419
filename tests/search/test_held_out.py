"""Questions that no trial is judged on: the base model answers them, too."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from chart_specs import legend
from made_search import made_search

from lunar_tune.cli.export import COMMAND
from lunar_tune.config.run_options import NONE, RunOptions
from lunar_tune.report.charts import trade_off
from lunar_tune.report.page import write_static_page
from lunar_tune.report.results import SearchResults, short_report
from lunar_tune.study.answers import read_answers
from lunar_tune.study.folder import Folder
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.tasks import CONFIRMATION, Task, TaskRunner

SETTING = {"layer": 1, "coefficient": 2.0, "ridge": 0.01}


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never ends an answer."""
    monkeypatch.setattr("lunar_tune.trial.evaluator.PUBLISHED_MAX_NEW_TOKENS", 6)


@pytest.fixture(scope="module")
def options(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]
) -> RunOptions:
    folder = tmp_path_factory.mktemp("data")
    pairs = [
        {"edge": edge, "question": f"What is {n} of {edge}?", "answer": f"Kettle {n} of {edge}"}
        for edge, size in (("A_B", 4), ("B_C", 6))
        for n in range(size)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    (folder / "prompts.txt").write_text("What is nowhere?\n", encoding="utf-8")
    return RunOptions(
        model=str(checkpoint("qwen2")),
        data=str(folder / "pairs.json"),
        factual_data=NONE,
        reference_prompts=str(folder / "prompts.txt"),
        device="cpu",
        max_new_tokens=6,
        solver="closed_form",
        cache_limit=0,
        holdout=True,
    )


@pytest.fixture
def search(tmp_path: Path, options: RunOptions) -> Folder:
    return Folder(made_search(tmp_path / "runs", "half", options, SETTING))


def questions(path: Path) -> set[tuple[str, str, int | None]]:
    return {(row.set_name, row.question, row.row) for row in read_answers(path)}


def test_the_task_that_confirms_asks_the_base_model_the_held_out_questions(
    options: RunOptions,
) -> None:
    spec = assemble(options)
    runner = TaskRunner(spec)
    told = runner.run(Task(kind=CONFIRMATION, number=3, parameters=SETTING))
    runner.close()

    assert spec.data.held_out is not None
    assert told.result is not None
    assert told.baseline is not None
    rows, scores = told.baseline.evaluation.rows, told.baseline.evaluation.scores
    asked = {(row.set_name, row.question, row.row) for row in rows}
    again = told.result.evaluation.rows
    assert asked == {(row.set_name, row.question, row.row) for row in again}
    assert {question for name, question, _ in asked if name == "retain"} == {
        record.question for record in spec.data.held_out.retain
    }
    for name in ("forget", "retain"):
        recalls = [row.rouge1 for row in rows if row.set_name == name]
        assert scores[f"{name}_rouge1"] == pytest.approx(math.fsum(recalls) / len(recalls))


def test_full_answers_stand_beside_the_base_model_to_the_same_questions(
    search: Folder,
) -> None:
    results = SearchResults.read(search.path)
    table = results.answers(full=True)
    kept = {
        (row.set_name, row.row): row.answer for row in read_answers(search.answers(None, full=True))
    }
    assert table["base_model"].tolist() == [
        kept[name, row] for name, row in zip(table["set"], table["row"], strict=True)
    ]
    assert results.answers()["rouge1_before"].notna().all()
    search.answers(None, full=True).unlink()  # as an earlier version leaves it
    assert SearchResults.read(search.path).answers(full=True)["rouge1_before"].isna().all()


def test_page_note_and_picture_say_what_was_held_out(search: Folder, tmp_path: Path) -> None:
    results = SearchResults.read(search.path)
    assert results.held_out
    assert list(results.compared) == [
        "base model",
        "trial 0, as searched",
        "base model, held-out questions",
        "trial 0, held-out questions",
    ]
    assert "| trial 0, held-out questions " in short_report(results)
    assert "base model, held out" in legend(trade_off(results))
    page = tmp_path / "page.html"
    write_static_page([SearchResults.read(search.path)], page)
    assert "confirmed on held-out questions" in page.read_text()
    assert "all questions" not in page.read_text().split("<main>")[1].split("<h3>Charts")[0]
    assert "got worse is not known" not in page.read_text()
    search.answers(None, full=True).unlink()
    write_static_page([SearchResults.read(search.path)], page)
    assert "got worse is not known" in page.read_text()
    assert "No question to keep got worse" not in page.read_text()


def test_a_card_shows_the_base_model_scores_on_the_held_out_questions(
    search: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    arguments = [str(search.path), "--save", str(output)]
    assert COMMAND.main(arguments) == 0
    document = json.loads((output / "export.json").read_text())
    rows = [
        row for row in read_answers(search.answers(None, full=True)) if row.set_name == "retain"
    ]
    mean = math.fsum(row.rouge1 for row in rows) / len(rows)
    assert document["baseline_scores"]["retain_rouge1"] == pytest.approx(mean)
    card = (output / "README.md").read_text()
    assert "* scores are on held-out questions" in card
    assert "as the search reported it, on held-out questions" in card
    assert "≈" not in card
    assert (document["on_held_out"], document["retain_exact"]) == (True, True)
    assert "scores are on held-out questions" in capsys.readouterr().out


def test_the_card_of_another_trial_says_that_its_scores_are_not_of_held_out_questions(
    tmp_path: Path, options: RunOptions
) -> None:
    search = made_search(tmp_path / "runs", "half", options, SETTING, confirmed=False)
    output = tmp_path / "model"
    arguments = [str(search), "--trial", "0", "--save", str(output)]
    assert COMMAND.main(arguments) == 0
    assert json.loads((output / "export.json").read_text())["on_held_out"] is False
    card = (output / "README.md").read_text()
    assert "* scores are on the questions of the trials, not on held-out questions" in card
    assert "| as the search reported it |" in card
