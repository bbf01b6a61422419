"""One search of the tiny model through the command line, looked at from every side."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_lines import finish, start
from made_once import shared_folder
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image
from rouge_score.rouge_scorer import RougeScorer
from tiny_search import NAME, SEED, TRIALS, TinySearch, tiny_search

from lunar_tune.cli.unlearn import COMMAND
from lunar_tune.yaml_files import read_yaml

pytestmark = pytest.mark.slow  # a search of its own

BUDGET = 40  # enough for every answer of the tiny model that ends at all
SETS = ("forget", "retain", "factual")


class Finished(TinySearch):
    """The search, with readers for what it has left."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        return pq.read_table(self.folder / "trials.parquet").to_pylist()

    @property
    def best(self) -> dict[str, Any]:
        return read_yaml(self.folder / "best.yaml")

    def answers(self, number: int) -> list[dict[str, Any]]:
        return pq.read_table(self.folder / "trials" / f"{number:05d}.parquet").to_pylist()

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        storage = JournalStorage(JournalFileBackend(str(self.folder / "study.journal")))
        return optuna.load_study(study_name=NAME, storage=storage).get_trials()


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tiny_search(shared_folder(tmp_path_factory)).place)


@pytest.fixture(scope="module")
def again(search: Finished) -> Path:
    """Run the best setting on its own; return the results' folder."""
    setting = [f"{name}={value}" for name, value in search.best["parameters"].items()]
    more = ["--seed", str(SEED), "--json", "again.json", "--metrics", "forget_mrr"]
    with pytest.MonkeyPatch.context() as changes:
        changes.chdir(search.cwd)
        assert COMMAND.main([*setting, *more]) == 0
    return search.cwd


@pytest.fixture(scope="module")
def exported(search: Finished) -> dict[str, Any]:
    """Run the command that the search printed for its winner; return what it says of itself."""
    line = next(line for line in search.done.stdout.splitlines() if "lunar_tune.export" in line)
    done = finish(start(shlex.split(line), cwd=search.cwd))
    assert done.returncode == 0, done.stderr
    return json.loads((search.folder / "model" / "export.json").read_text())


def mean_recall(answers: list[dict[str, Any]], set_name: str, kind: str = "rouge1") -> float:
    scorer = RougeScorer([kind], use_stemmer=True)
    mine = [row for row in answers if row["set_name"] == set_name]
    scores = [scorer.score(row["truth"], row["answer"])[kind].recall for row in mine]
    return math.fsum(scores) / len(scores)


def test_a_search_that_finds_a_feasible_setting_exits_with_0(search: Finished) -> None:
    assert search.done.returncode == 0, search.done.stderr
    assert search.best["feasible"] is True


def test_a_search_is_calm(search: Finished) -> None:
    """Nothing on standard error, no table of Ray's, a line for each trial."""
    assert search.done.stderr == ""
    lines = search.done.stdout.splitlines()
    assert [line[:4] for line in lines if f"/{TRIALS} " in line] == [
        f"{done}/{TRIALS} " for done in range(1, TRIALS + 1)
    ]
    assert "Trial status" not in search.done.stdout
    assert "Logical resource usage" not in search.done.stdout


def test_nothing_is_written_outside_the_output_folder(search: Finished) -> None:
    before_again = {"again.json"}
    assert {path.name for path in search.cwd.iterdir()} <= before_again
    assert {path.name for path in search.output.iterdir()} - {".mlflow.lock"} == {
        NAME,
        "mlflow.db",
        "mlartifacts",
    }
    assert {path.name for path in search.folder.iterdir()} - {"model"} == {
        ".lock",
        ".study.journal.lock",
        "search.log",
        "config.yaml",
        "study.journal",
        "trials",
        "trials.parquet",
        "best.yaml",
        "pictures",
        "report.md",
        "page.html",
    }


def test_the_configuration_names_the_origin_of_every_value(search: Finished) -> None:
    config = read_yaml(search.folder / "config.yaml")
    values = config["options"]
    given = {"num_trials": TRIALS, "seed": SEED, "output": str(search.output), "name": NAME}

    assert {key for key, entry in values.items() if entry["origin"] == "command line"} == set(given)
    assert {key: values[key]["value"] for key in given} == given
    derived = {
        "space",
        "tracking_uri",
        "gpus_per_trial",
        "concurrency",
        "data",
        "forget_edge",
    }
    assert {key for key, entry in values.items() if entry["origin"] == "derived"} == derived
    assert {e["origin"] for k, e in values.items() if k not in derived | set(given)} == {"default"}
    assert values["model"]["value"] == "tiny"
    assert values["data"]["value"] == "mini"
    assert values["forget_edge"]["value"] == ["A_B"]
    assert values["tracking_uri"]["value"] == f"sqlite:///{search.output / 'mlflow.db'}"
    assert config["resolved"]["rows"] == {"forget": 12, "retain": 84, "factual": 81}
    assert set(config["resolved"]["space"]["parameters"]) == {
        "layer",
        "coefficient",
        "learning_rate",
    }
    assert config["resolved"]["baseline"]["retain_rouge1"] >= 0.97


def test_every_trial_of_the_study_is_complete_and_constrained(search: Finished) -> None:
    trials = search.trials()
    assert [trial.number for trial in trials] == list(range(TRIALS))
    for trial in trials:
        assert trial.state == optuna.trial.TrialState.COMPLETE
        scores = trial.user_attrs["scores"]
        assert trial.value == scores["forget_rouge1"]
        assert list(trial.constraints.values()) == [0.8 - scores["retain_rouge1"]]


def test_the_starting_point_comes_first(search: Finished) -> None:
    params = search.trials()[0].params
    assert params == {"layer": 1, "coefficient": 2.0, "learning_rate": 0.003}


def test_answers_are_those_whose_digest_the_study_keeps(search: Finished) -> None:
    for trial in search.trials():
        content = (search.folder / "trials" / f"{trial.number:05d}.parquet").read_bytes()
        assert hashlib.sha256(content).hexdigest() == trial.user_attrs["answers_digest"]


def test_the_table_has_the_documented_columns(search: Finished) -> None:
    names = pq.read_schema(search.folder / "trials.parquet").names
    documented = ["number", "state", "params.layer", "params.coefficient", "params.learning_rate"]
    documented += ["forget_rouge1", "retain_rouge1", "factual_rouge1", "deviation_score"]
    documented += ["feasible", "retain_rows", "retain_exact", "seconds", "failure"]
    assert set(documented) <= set(names)
    assert [row["number"] for row in search.rows] == list(range(TRIALS))


def test_scores_are_means_over_the_answers(search: Finished) -> None:
    for row in search.rows:
        answers = search.answers(row["number"])
        counts = {name: sum(a["set_name"] == name for a in answers) for name in SETS}
        stopped = counts["factual"] == 0
        for name in SETS[: 2 if stopped else 3]:
            for kind in ("rouge1", "rougeL"):
                mean = mean_recall(answers, name, kind)
                assert row[f"{name}_{kind}"] == pytest.approx(mean, abs=1e-12)
        assert row["retain_rows"] == counts["retain"]
        assert row["retain_exact"] is (counts["retain"] == 84)
        if stopped:
            assert row["factual_rouge1"] is None
            said = row["retain_rouge1"] * counts["retain"]
            assert (said + 84 - counts["retain"]) / 84 < 0.8, "no answer left could lift it"
        else:
            assert counts == {"forget": 12, "retain": 84, "factual": 81}


def test_deviation_and_feasibility_follow_from_the_scores(search: Finished) -> None:
    for row in search.rows:
        squares = row["forget_rouge1"] ** 2 + (1 - row["retain_rouge1"]) ** 2
        assert row["deviation_score"] == pytest.approx(100 * squares**0.5)
        assert row["feasible"] is (row["retain_rouge1"] >= 0.8)
        assert row["seconds"] > 0
        assert row["failure"] is None


def test_the_best_is_the_feasible_trial_that_forgets_most(search: Finished) -> None:
    feasible = [row for row in search.rows if row["feasible"]]
    best = search.best
    row = search.rows[best["trial"]]
    assert row["forget_rouge1"] == min(one["forget_rouge1"] for one in feasible)
    assert best["parameters"] == {
        name: row[f"params.{name}"] for name in ("layer", "coefficient", "learning_rate")
    }
    assert best["as_searched"]["scores"]["forget_rouge1"] == row["forget_rouge1"]
    assert best["constraints"] == ["retain_rouge1>=0.8"]
    assert best["confirmed"]["scores"]["retain_rouge1"] >= 0.8


def test_the_best_is_confirmed_on_all_rows_with_the_published_budget(search: Finished) -> None:
    confirmed = search.best["confirmed"]
    assert confirmed["max_new_tokens"] == 512
    assert {name: confirmed["scores"][f"{name}_rows"] for name in SETS} == {
        "forget": 12,
        "retain": 84,
        "factual": 81,
    }
    assert search.best["as_searched"]["max_new_tokens"] < 512


def test_the_printed_command_writes_a_model_with_the_confirmed_answers(
    search: Finished, exported: dict[str, Any]
) -> None:
    assert exported["proven"] is True
    assert exported["differing_rows"] == 0
    expected = {**search.best["confirmed"]["scores"]}
    assert expected.pop("forget_mrr") < 1, "measured, and not what an export is proven by"
    assert exported["scores"] == pytest.approx(expected, abs=1e-9)


def test_the_best_setting_gives_the_confirmed_scores_again(search: Finished, again: Path) -> None:
    document = json.loads((again / "again.json").read_text())
    confirmed = search.best["confirmed"]["scores"]
    assert {name: document[name] for name in confirmed} == pytest.approx(confirmed, abs=1e-9)
    assert document["parameters"] == search.best["parameters"]


def test_answers_of_the_trial_begin_the_answers_in_full(search: Finished, again: Path) -> None:
    """A smaller token budget cuts an answer off and changes nothing before that."""
    full = json.loads((again / "again.json").read_text())["answers"]
    short = search.answers(search.best["trial"])
    assert len(full) == len(short) == 12 + 84 + 81
    for one, other in zip(short, full, strict=True):
        assert [one[k] for k in ("set_name", "edge", "question", "truth")] == [
            other[k] for k in ("set_name", "edge", "question", "truth")
        ]
        assert other["answer"].startswith(one["answer"].rstrip("\ufffd"))


@pytest.mark.usefixtures("exported")
def test_the_saved_model_answers_the_same_in_plain_transformers(
    search: Finished, again: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(search.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(search.folder / "model").eval()
    rows = json.loads((again / "again.json").read_text())["answers"]
    rows = [*rows[:12], *rows[12::5]]  # all of the forget set, some of the others
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": row["question"]}] for row in rows],
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        generated = model.generate(**batch, max_new_tokens=BUDGET, do_sample=False)
    for row, new in zip(rows, generated[:, batch["input_ids"].shape[1] :], strict=True):
        text = tokenizer.decode(new, skip_special_tokens=True)
        assert row["answer"].startswith(text.rstrip("\ufffd"))
        if tokenizer.eos_token_id in new:
            assert row["answer"] == text


@pytest.mark.parametrize("name", ["pictures/trade_off.png", "pictures/history.png"])
def test_pictures_show_something(search: Finished, name: str) -> None:
    pixels = np.asarray(Image.open(search.folder / name).convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    colours = {tuple(pixel) for pixel in pixels.reshape(-1, 3)[::3].tolist()}
    assert len(colours) > 20
    assert pixels.std() > 0.05 * 255


def test_the_report_names_the_best_trial_and_its_scores(search: Finished) -> None:
    text = (search.folder / "report.md").read_text()
    best = search.best
    assert f"(trial {best['trial']})" in text
    assert f"{best['confirmed']['scores']['retain_rouge1']:.4g}" in text
    assert "| base model " in text
    for picture in ("pictures/trade_off.png", "pictures/history.png"):
        assert (search.folder / picture).is_file()
        assert f"({picture})" in text


class Tracked:
    """What MLflow has of the search."""

    def __init__(self, search: Finished) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlflow import MlflowClient

            self.client = MlflowClient(f"sqlite:///{search.output / 'mlflow.db'}")
            self.experiment = self.client.get_experiment_by_name("lunar-tune")
            every = [one.experiment_id for one in self.client.search_experiments()]
            self.runs = list(self.client.search_runs(every))
        children = [run for run in self.runs if "mlflow.parentRunId" in run.data.tags]
        self.parents = [run for run in self.runs if run not in children]
        self.children = sorted(children, key=lambda run: int(run.data.tags["trial"]))

    def artifacts(self, run_id: str, path: str | None = None) -> set[str]:
        return {one.path for one in self.client.list_artifacts(run_id, path)}

    def table(self, run_id: str, folder: Path) -> dict[str, Any]:
        path = self.client.download_artifacts(run_id, "answers.json", str(folder))
        return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def tracked(search: Finished) -> Iterator[Tracked]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield Tracked(search)


def test_mlflow_has_one_parent_and_a_child_for_each_trial_and_nothing_else(
    tracked: Tracked,
) -> None:
    assert len(tracked.parents) == 1
    parent = tracked.parents[0]
    assert parent.info.run_name == NAME
    assert [run.data.tags["trial"] for run in tracked.children] == [str(n) for n in range(TRIALS)]
    assert {run.data.tags["mlflow.parentRunId"] for run in tracked.children} == {parent.info.run_id}
    assert {run.info.status for run in tracked.runs} == {"FINISHED"}
    assert {run.info.experiment_id for run in tracked.runs} == {tracked.experiment.experiment_id}


def test_the_parent_has_baseline_and_confirmed_scores_data_and_configuration(
    search: Finished, tracked: Tracked
) -> None:
    parent = tracked.parents[0]
    for prefix, scores in (
        ("baseline", search.best["baseline"]),
        ("best", search.best["confirmed"]["scores"]),
    ):
        shown = {name: value for name, value in scores.items() if not name.endswith("_rows")}
        recorded = {name: parent.data.metrics[f"{prefix}_{name}"] for name in shown}
        assert recorded == pytest.approx(shown)
    assert {one.dataset.name for one in parent.inputs.dataset_inputs} == set(SETS)
    assert {json.loads(i.dataset.profile)["rows"] for i in parent.inputs.dataset_inputs} == {
        12,
        84,
        81,
    }
    expected = {"config.yaml", "best.yaml", "report.md", "page.html", "pictures"}
    assert tracked.artifacts(parent.info.run_id) == expected
    pictures = tracked.artifacts(parent.info.run_id, "pictures")
    assert pictures == {f"pictures/{path.name}" for path in search.folder.glob("pictures/*")}


def test_the_parent_has_the_best_setting_and_how_it_was_found(
    search: Finished, tracked: Tracked
) -> None:
    parent, best = tracked.parents[0], search.best
    assert parent.data.metrics["best_trial"] == best["trial"]
    for name, value in best["parameters"].items():
        assert parent.data.metrics[f"best_{name}"] == value
    assert parent.data.metrics["feasible"] == 1.0
    assert "**Best feasible setting**" in parent.data.tags["mlflow.note.content"]
    history = tracked.client.get_metric_history(parent.info.run_id, "best_feasible")
    ended = sorted(search.rows, key=lambda row: row["ended"])
    feasible = [(n, row["forget_rouge1"]) for n, row in enumerate(ended) if row["feasible"]]
    running = {n: min(f for m, f in feasible if m <= n) for n in range(feasible[0][0], TRIALS)}
    assert {point.step: point.value for point in history} == running


def test_children_agree_with_the_study(search: Finished, tracked: Tracked, tmp_path: Path) -> None:
    for trial, run in zip(search.trials(), tracked.children, strict=True):
        assert {k: float(v) for k, v in run.data.params.items()} == trial.params
        scores = trial.user_attrs["scores"]
        shown = {name: value for name, value in scores.items() if not name.endswith("_rows")}
        assert {name: run.data.metrics[name] for name in shown} == pytest.approx(shown)
        feasible = scores["retain_rouge1"] >= 0.8
        assert run.data.metrics["feasible"] == float(feasible)
        expected = {
            "model": "tiny",
            "data": "mini",
            "forget_edge": "A_B",
            "method": "lunar",
            "solver": "adamw",
        }
        assert expected.items() <= run.data.tags.items()
        history = tracked.client.get_metric_history(run.info.run_id, "loss")
        losses = [point.value for point in sorted(history, key=lambda point: point.step)]
        assert [point.step for point in history] == list(range(1, 21))
        assert losses == pytest.approx(trial.user_attrs["losses"])
        assert run.data.metrics["seconds"] == trial.user_attrs["seconds"]["trial"]
    number = search.best["trial"]
    table = tracked.table(tracked.children[number].info.run_id, tmp_path)
    answers = search.answers(number)
    place = table["columns"].index("answer")
    assert [row[place] for row in table["data"]] == [row["answer"] for row in answers]


def test_artifacts_lie_under_the_output_folder(search: Finished, tracked: Tracked) -> None:
    for run in tracked.runs:
        assert run.info.artifact_uri.startswith((search.output / "mlartifacts").as_uri())


def test_loss_curves_are_in_the_answers_file_too(search: Finished) -> None:
    trial = search.trials()[0]
    schema: pa.Schema = pq.read_schema(search.folder / "trials" / "00000.parquet")
    assert json.loads(schema.metadata[b"lunar_tune.losses"]) == trial.user_attrs["losses"]
    assert len(trial.user_attrs["losses"]) == 20
