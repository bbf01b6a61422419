"""One search of the tiny model through the command line, looked at from every side.

And one with held-out questions; on Ray one as in this process, one under random kills.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from chart_specs import legend
from command_lines import environment, run_command, without_ray
from made_once import copy_store
from rouge_score.rouge_scorer import RougeScorer
from search_results import rows_of, statuses
from shared_searches import FULL_BUDGET, NAME, SAMPLER, SEED, TRIALS, SharedSearch

from lunar_tune.cli.export import export as EXPORT
from lunar_tune.cli.search import search as SEARCH
from lunar_tune.cli.unlearn import unlearn as UNLEARN
from lunar_tune.errors import DivergenceError
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.report.charts import trade_off
from lunar_tune.report.results import SearchResults, short_report, write_static_page
from lunar_tune.study.folder import Folder, read_answers
from lunar_tune.study.new_questions import Gap, note_of_kept_again
from lunar_tune.study.study import StoredStudy
from lunar_tune.trial.worker import Worker
from lunar_tune.yaml_files import read_yaml

ROWS = {"forget": 12, "retain": 84, "factual": 81}
PARAMETERS = ("layer", "coefficient", "learning_rate")
TIMED = ("seconds", "started", "ended")
COUNTED = [f"{done}/{TRIALS} " for done in range(1, TRIALS + 1)]
CHAOS = Path(__file__).parents[2] / "scripts" / "chaos.py"


@pytest.fixture(scope="module")
def rows(finished: SharedSearch) -> list[dict[str, Any]]:
    return rows_of(finished.folder)


@pytest.fixture(scope="module")
def best(finished: SharedSearch) -> dict[str, Any]:
    return read_yaml(finished.folder / "best.yaml")


def answers_of(search: SharedSearch, number: int) -> list[dict[str, Any]]:
    return pq.read_table(search.folder / "trials" / f"{number:05d}.parquet").to_pylist()


def counted_in(shown: str) -> list[str]:
    return [line[:4] for line in shown.splitlines() if f"/{TRIALS} " in line]


def mean_recall(answers: list[dict[str, Any]], set_name: str, kind: str) -> float:
    scorer = RougeScorer([kind], use_stemmer=True)
    mine = [row for row in answers if row["set_name"] == set_name]
    scores = [scorer.score(row["truth"], row["answer"])[kind].recall for row in mine]
    return math.fsum(scores) / len(scores)


def test_a_search_is_calm_and_writes_what_is_documented(finished: SharedSearch) -> None:
    assert (finished.result.exit_code, finished.result.stderr) == (0, "")
    assert counted_in(finished.result.stdout) == COUNTED
    assert list(finished.cwd.iterdir()) == []
    places = {path.name for path in finished.output.iterdir()} - {".mlflow.lock"}
    assert places == {NAME, "mlflow.db", "mlartifacts"}
    documented = "config.yaml study.journal trials trials.parquet best.yaml pictures report.md"
    documented += " page.html search.log .lock .study.journal.lock"
    assert {path.name for path in finished.folder.iterdir()} == {*documented.split()}
    columns = {"number", "state", *(f"params.{name}" for name in PARAMETERS)}
    columns |= {f"{name}_rouge1" for name in ROWS} | {"deviation_score", "feasible"}
    columns |= {"retain_rows", "retain_exact", "seconds", "failure"}
    assert columns <= set(pq.read_schema(finished.folder / "trials.parquet").names)


def test_the_configuration_names_the_origin_of_every_value(finished: SharedSearch) -> None:
    config = read_yaml(finished.folder / "config.yaml")
    values = config["options"]
    given = {"num_trials": TRIALS, "sampler": SAMPLER, "seed": SEED, "name": NAME}
    given["output"] = str(finished.output)
    given["in_process"] = True
    assert {key: values[key]["value"] for key in given} == given
    derived = {"space", "tracking_uri", "gpus_per_trial", "concurrency", "data", "forget_edge"}
    derived |= {"factual_data", "reference_prompts"}
    origins = dict.fromkeys(values, "default") | dict.fromkeys(derived, "derived")
    origins |= dict.fromkeys(given, "command line")
    assert {key: entry["origin"] for key, entry in values.items()} == origins
    assert (values["model"]["value"], values["data"]["value"]) == ("tiny", "mini")
    assert values["forget_edge"]["value"] == ["A_B"]
    assert values["tracking_uri"]["value"] == f"sqlite:///{finished.output / 'mlflow.db'}"
    assert config["resolved"]["rows"] == ROWS
    assert set(config["resolved"]["space"]["parameters"]) == set(PARAMETERS)
    assert config["resolved"]["baseline"]["retain_rouge1"] >= 0.97


def test_scores_are_means_over_the_answers_and_a_trial_stops_where_the_floor_is_lost(
    finished: SharedSearch, rows: list[dict[str, Any]]
) -> None:
    for row in rows:
        answers = answers_of(finished, row["number"])
        counts = {name: sum(a["set_name"] == name for a in answers) for name in ROWS}
        asked = [name for name in ROWS if counts[name]]
        for name in asked:
            for kind in ("rouge1", "rougeL"):
                mean = mean_recall(answers, name, kind)
                assert row[f"{name}_{kind}"] == pytest.approx(mean, abs=1e-12)
            recalls = [one["rouge1"] for one in answers if one["set_name"] == name]
            error = np.std(recalls) / len(recalls) ** 0.5
            assert row[f"{name}_rouge1_se"] == pytest.approx(error, abs=1e-12)
        said = row["retain_rouge1"] * counts["retain"]
        if "factual" not in asked:
            assert row["factual_rouge1"] is None
            assert (said + 84 - counts["retain"]) / 84 < 0.8, "no answer left could lift it"
        else:
            assert counts == ROWS
        assert (row["retain_rows"], row["retain_exact"]) == (
            counts["retain"],
            counts["retain"] == 84,
        )
        squares = row["forget_rouge1"] ** 2 + (1 - row["retain_rouge1"]) ** 2
        assert row["deviation_score"] == pytest.approx(100 * squares**0.5)
        assert row["feasible"] is (row["retain_rouge1"] >= 0.8)
        assert (row["seconds"] > 0, row["failure"]) == (True, None)
    assert [row["feasible"] for row in rows] == [True, True, False, True], "else little is shown"


def test_the_best_is_the_feasible_trial_that_forgets_most_confirmed_on_all_rows(
    finished: SharedSearch, rows: list[dict[str, Any]], best: dict[str, Any]
) -> None:
    row = rows[best["trial"]]
    assert row["forget_rouge1"] == min(one["forget_rouge1"] for one in rows if one["feasible"])
    assert best["parameters"] == {name: row[f"params.{name}"] for name in PARAMETERS}
    assert best["as_searched"]["scores"]["forget_rouge1"] == row["forget_rouge1"]
    assert best["as_searched"]["max_new_tokens"] < 512
    assert (best["feasible"], best["constraints"]) == (True, ["retain_rouge1>=0.8"])
    scores = best["confirmed"]["scores"]
    assert (best["confirmed"]["max_new_tokens"], scores["retain_rouge1"] >= 0.8) == (512, True)
    assert {name: scores[f"{name}_rows"] for name in ROWS} == ROWS
    report = (finished.folder / "report.md").read_text()
    for part in (f"(trial {best['trial']})", f"{scores['retain_rouge1']:.4g}", "| base model "):
        assert part in report
    for picture in ("pictures/trade_off.png", "pictures/history.png"):
        assert (finished.folder / picture).stat().st_size > 0
        assert f"({picture})" in report


def test_the_best_setting_gives_the_confirmed_scores_again(
    finished: SharedSearch, best: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And answers that those of the trial begin: a smaller budget cuts them off, no more."""
    monkeypatch.chdir(tmp_path)
    setting = [f"{name}={value}" for name, value in best["parameters"].items()]
    more = ["--seed", str(SEED), "--json", "again.json", "--metrics", "forget_mrr"]
    assert UNLEARN.main([*setting, *more]) == 0
    document = json.loads(Path("again.json").read_text())
    confirmed = best["confirmed"]["scores"]
    assert {name: document[name] for name in confirmed} == pytest.approx(confirmed, abs=1e-9)
    assert document["parameters"] == best["parameters"]
    short = answers_of(finished, best["trial"])
    assert len(short) == sum(ROWS.values())
    for one, other in zip(short, document["answers"], strict=True):
        for key in ("set_name", "edge", "question", "truth"):
            assert one[key] == other[key]
        assert other["answer"].startswith(one["answer"].rstrip("\ufffd"))


def test_mlflow_has_the_search_its_trials_and_data(finished: SharedSearch, tmp_path: Path) -> None:
    """What is made of the description: `test_tracking`."""
    copy_store(finished.output / "mlflow.db", tmp_path / "mlflow.db")
    assert statuses(tmp_path) == (["FINISHED"], ["FINISHED"] * TRIALS)
    stored = StoredStudy.read(finished.folder / "study.journal")
    data = stored.notes["description"]["data"]
    assert {name: count for name, (_, count) in data.items()} == ROWS


# Of new questions, after five trials


@pytest.fixture
def searched(
    small: list[str],
    tmp_path: Path,
    empty_store: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], tuple[Folder, str]]:
    """Return what searches a random model, which knows nothing, and gives folder and output."""
    monkeypatch.setattr("lunar_tune.trial.evaluator.PUBLISHED_MAX_NEW_TOKENS", FULL_BUDGET)
    empty_store(tmp_path / "runs" / "mlflow.db")

    def search() -> tuple[Folder, str]:
        options = [*small, "--num-trials", "5", "--sampler", "random", "--seed", "0", "--force"]
        options += ["--constrain", "retain_rouge1>=0", "--in-process"]
        options += ["--output", str(tmp_path / "runs"), "--name", "n"]
        done = without_ray(SEARCH, *options)
        assert (done.exit_code, done.stderr) == (0, "")
        return Folder(tmp_path / "runs" / "n"), done.stdout

    return search


def test_the_gap_is_between_the_trials_answers_and_those_of_fits_without_the_questions(
    searched: Callable[[], tuple[Folder, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such fits are made up: each answer has .25 less than in the trial."""
    gaps: list[Gap | None] = []

    def less(worker: Worker, parameters: dict[str, Any]) -> tuple[AnswerRow, ...]:
        rows = worker.run(parameters).evaluation.rows
        asked = [row for row in rows if row.set_name == "retain"][:4]
        return tuple(dataclasses.replace(row, rouge1=row.rouge1 - 0.25) for row in asked)

    def noted(*told: Any) -> dict[str, Any]:
        gaps.append(told[-1])
        return note_of_kept_again(*told)

    monkeypatch.setattr(Worker, "unseen", less)
    monkeypatch.setattr("lunar_tune.driver.session.note_of_kept_again", noted)
    searched()
    (gap,) = gaps
    assert gap is not None
    assert (gap.mean, gap.rows) == (pytest.approx(0.25), 4)


@pytest.mark.parametrize("lost", ["fit", "answers"])
def test_a_confirmed_setting_is_found_where_new_questions_cannot_be_asked(
    searched: Callable[[], tuple[Folder, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    def without(worker: Worker, parameters: dict[str, Any]) -> tuple[AnswerRow, ...]:
        if lost == "fit":
            raise DivergenceError("in epoch 2")
        for file in (tmp_path / "runs" / "n" / "trials").glob("?????.parquet"):
            file.unlink()
        return worker.run(parameters).evaluation.rows

    monkeypatch.setattr(Worker, "unseen", without)
    folder, printed = searched()
    assert "does on new questions is unknown: " in printed
    assert read_yaml(folder.best)["feasible"] is True
    assert StoredStudy.read(folder.journal).notes["new_questions"] is None
    assert "likely" not in (folder.path / "report.md").read_text()


# With questions that no trial is judged on: the base model answers them, too


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
    assert EXPORT.main(arguments + ([] if printed else ["--trial", "2"])) == 0
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


# On Ray


def untimed(search: Path) -> list[dict[str, Any]]:
    rows = (row.items() for row in rows_of(search))
    return [{key: value for key, value in row if not key.startswith(TIMED)} for row in rows]


@pytest.mark.ray
@pytest.mark.alone
def test_a_search_on_ray_has_the_records_of_the_same_search_without_it(
    finished: SharedSearch, empty_store: Callable[[Path], Path], tmp_path: Path
) -> None:
    """On one worker and a CPU; a stray RAY_ADDRESS is not looked at."""
    empty_store(tmp_path / "runs" / "mlflow.db")
    options = ["--num-trials", str(TRIALS), "--sampler", SAMPLER, "--seed", str(SEED)]
    options += ["--concurrency", "1", "--output", "runs", "--name", "n"]
    threads = str(torch.get_num_threads())
    done = run_command("search", *options, cwd=tmp_path, OMP_NUM_THREADS=threads)
    assert (done.returncode, done.stderr) == (0, "")
    assert counted_in(done.stdout) == COUNTED
    for table in ("Trial status", "Logical resource usage"):
        assert table not in done.stdout
    assert done.stdout.splitlines()[-1].endswith(f" --seed {SEED + 1}")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    search = tmp_path / "runs" / "n"
    assert untimed(search) == untimed(finished.folder)
    best, expected = (read_yaml(folder / "best.yaml") for folder in (search, finished.folder))
    assert best["confirmed"] == expected["confirmed"]
    names = [{path.name for path in folder.rglob("*")} for folder in (search, finished.folder)]
    assert names[0] == names[1]
    assert statuses(tmp_path / "runs") == (["FINISHED"], ["FINISHED"] * TRIALS)


@pytest.mark.ray
@pytest.mark.alone
def test_a_search_under_kills_has_every_trial_once_in_all_records(
    tmp_path: Path, empty_store: Callable[[Path], Path]
) -> None:
    empty_store(tmp_path / "chaos" / "server.db")
    told = tmp_path / "chaos.json"
    options = ["--trials", "3", "--kills", "1", "--seed", "0", "--json", str(told)]
    options += ["--output", str(tmp_path / "chaos"), "--time-limit", "280"]
    done = subprocess.run(
        [sys.executable, str(CHAOS), *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    outcome = json.loads(told.read_text()) if told.exists() else {}
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert outcome["kills_by_kind"]["driver"] == outcome["kills"] == 1, "with this seed"
    assert outcome["trials_found"] == outcome["trials_expected"] >= 3
    assert outcome["duplicates"] == outcome["left_running"] == outcome["disagreements"] == []
