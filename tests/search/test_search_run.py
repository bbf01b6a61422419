"""One search of the tiny model through the command line, looked at from every side."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import warnings
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
from made_once import copy_store
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rouge_score.rouge_scorer import RougeScorer
from search_results import rows_of
from shared_searches import NAME, SEED, TRIALS, SharedSearch

from lunar_tune.cli.unlearn import unlearn as UNLEARN
from lunar_tune.yaml_files import read_yaml

pytestmark = pytest.mark.slow  # a search of the tiny model, and two runs of its best setting

ROWS = {"forget": 12, "retain": 84, "factual": 81}
PARAMETERS = ("layer", "coefficient", "learning_rate")


@pytest.fixture(scope="module")
def rows(finished: SharedSearch) -> list[dict[str, Any]]:
    return rows_of(finished.folder)


@pytest.fixture(scope="module")
def best(finished: SharedSearch) -> dict[str, Any]:
    return read_yaml(finished.folder / "best.yaml")


@pytest.fixture(scope="module")
def trials(finished: SharedSearch) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(finished.folder / "study.journal")))
    return optuna.load_study(study_name=NAME, storage=storage).get_trials()


def answers_of(search: SharedSearch, number: int) -> list[dict[str, Any]]:
    return pq.read_table(search.folder / "trials" / f"{number:05d}.parquet").to_pylist()


def mean_recall(answers: list[dict[str, Any]], set_name: str, kind: str) -> float:
    scorer = RougeScorer([kind], use_stemmer=True)
    mine = [row for row in answers if row["set_name"] == set_name]
    scores = [scorer.score(row["truth"], row["answer"])[kind].recall for row in mine]
    return math.fsum(scores) / len(scores)


def test_a_search_is_calm_and_writes_what_is_documented_in_its_folder_alone(
    finished: SharedSearch,
) -> None:
    assert (finished.result.exit_code, finished.result.stderr) == (0, "")
    lines = [line[:4] for line in finished.result.stdout.splitlines() if f"/{TRIALS} " in line]
    assert lines == [f"{done}/{TRIALS} " for done in range(1, TRIALS + 1)]
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


def test_every_trial_of_the_study_is_complete_constrained_and_has_its_answers(
    finished: SharedSearch, trials: list[optuna.trial.FrozenTrial]
) -> None:
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert trials[0].params == {"layer": 1, "coefficient": 1.0, "learning_rate": 0.003}
    for trial in trials:
        assert trial.state == optuna.trial.TrialState.COMPLETE
        scores = trial.user_attrs["scores"]
        assert trial.value == scores["forget_rouge1"]
        assert list(trial.constraints.values()) == [0.8 - scores["retain_rouge1"]]
        file = finished.folder / "trials" / f"{trial.number:05d}.parquet"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == trial.user_attrs["answers_digest"]
        losses = json.loads(pq.read_schema(file).metadata[b"lunar_tune.losses"])
        assert losses == trial.user_attrs["losses"]
        assert len(losses) == 20


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
    finished: SharedSearch,
    best: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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


def test_mlflow_has_the_search_with_its_files_and_its_trials(
    finished: SharedSearch, best: dict[str, Any], tmp_path: Path
) -> None:
    store = copy_store(finished.output / "mlflow.db", tmp_path / "mlflow.db")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = MlflowClient(f"sqlite:///{store}")
        runs = list(client.search_runs([one.experiment_id for one in client.search_experiments()]))
        runs.sort(key=lambda run: int(run.data.tags.get("trial", "-1")))
        artifacts = {one.path for one in client.list_artifacts(runs[0].info.run_id)}
    parent, *children = runs
    assert (parent.info.run_name, len(children)) == (NAME, TRIALS)
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith((finished.output / "mlartifacts").as_uri())
    assert parent.data.tags["mlflow.source.name"] == "lunar_tune"
    assert parent.data.tags["version.torch"] == importlib.metadata.version("torch")
    confirmed = best["confirmed"]["scores"]["retain_rouge1"]
    assert parent.data.metrics["best_retain_rouge1"] == pytest.approx(confirmed)
    data = [one.dataset for one in parent.inputs.dataset_inputs]
    assert {one.name: json.loads(one.profile)["rows"] for one in data} == ROWS
    assert artifacts == {"config.yaml", "best.yaml", "report.md", "page.html", "pictures"}
