"""One search of the tiny model through the command line, looked at from every side.

And searches on Ray: one as in this process, one under random kills (`scripts/chaos.py` in short).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from command_lines import environment, run_command
from made_once import copy_store
from rouge_score.rouge_scorer import RougeScorer
from search_results import rows_of, statuses
from shared_searches import NAME, SEED, TRIALS, SharedSearch

from lunar_tune.cli.unlearn import unlearn as UNLEARN
from lunar_tune.study.study import StoredStudy
from lunar_tune.yaml_files import read_yaml

pytestmark = pytest.mark.slow  # a search of the tiny model, and two runs of its best setting

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
    given = {"num_trials": TRIALS, "seed": SEED, "output": str(finished.output), "name": NAME}
    given["in_process"] = True
    assert {key: values[key]["value"] for key in given} == given
    derived = {"space", "tracking_uri", "gpus_per_trial", "concurrency", "data", "forget_edge"}
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
    options = ["--num-trials", str(TRIALS), "--seed", str(SEED), "--concurrency", "1"]
    options += ["--output", "runs", "--name", "n"]
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
