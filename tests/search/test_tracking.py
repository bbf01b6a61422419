"""The MLflow mirror: what is opened is closed and says how it ended, in a file and on a server."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from command_lines import finish, start

import lunar_tune
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.data.records import Record
from lunar_tune.errors import InputError
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import COMPLETE, FAILED, RUNNING, TrialRow
from lunar_tune.study.tables import write_answers
from lunar_tune.tracking.mirror import opened_store
from lunar_tune.tracking.run_origin import code_tags, git_tags, origin_tags
from lunar_tune.tracking.store import default_tracking_uri
from lunar_tune.tracking.tracked_run import TrackedRun
from lunar_tune.tracking.trial_runs import EXPERIMENT, SearchTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# MLflow and SQLAlchemy leave a store's connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
PARAMETERS = {"layer": 1, "coefficient": 2.0, "learning_rate": 0.003}
RUNNING_ROW = TrialRow(number=0, state=RUNNING, parameters=PARAMETERS)
COMPLETE_ROW = TrialRow(
    number=0,
    state=COMPLETE,
    parameters=PARAMETERS,
    scores={"forget_rouge1": 0.25, "retain_rouge1": 0.75, "retain_rows": 84.0},
    feasible=False,
    retain_rows=84,
    retain_exact=True,
    seconds={"fit": 0.5, "suggest": 0.125, "trial": 0.75},
    losses=tuple(float(n) for n in range(1500, 0, -1)),
)
FAILED_ROW = TrialRow(
    number=0, state=FAILED, parameters=PARAMETERS, failure="the loss became NaN" * 1000
)

RECORDS = (Record(question="Who?", answer="He", edge="A_B"),)
DATA = {"forget": (RECORDS, "f" * 64), "retain": (RECORDS * 2, "e" * 64)}


@dataclass(frozen=True)
class Store:
    """Where runs are written."""

    uri: str
    output: Path

    def tracker(self, name: str = "search", **options: Any) -> SearchTracker:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SearchTracker(self.uri, output=self.output, name=name, **options)


@pytest.fixture(scope="module", params=["sqlite", "server"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a store of each kind, made once: making it takes seconds."""
    output = tmp_path_factory.mktemp("runs")
    if request.param == "sqlite":
        return Store(default_tracking_uri(output), output)
    return Store(request.getfixturevalue("server"), output)


@pytest.fixture
def tracker(store: Store) -> SearchTracker:
    return store.tracker()


@pytest.fixture
def client(store: Store) -> MlflowClient:
    from mlflow import MlflowClient

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MlflowClient(store.uri, registry_uri=store.uri)


def children(client: MlflowClient, tracker: SearchTracker) -> list[Run]:
    runs = client.search_runs(
        [tracker.experiment_id], f"tags.mlflow.parentRunId = '{tracker.run_id}'"
    )
    return list(runs)


def test_searches_of_one_store_share_the_experiment(store: Store, client: MlflowClient) -> None:
    trackers = [store.tracker(name) for name in ("first", "second")]
    assert len({one.experiment_id for one in trackers}) == 1
    experiment = client.get_experiment(trackers[0].experiment_id)
    assert experiment.name == EXPERIMENT
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    names = {run.info.run_name for run in client.search_runs([experiment.experiment_id])}
    assert {"first", "second"} <= names
    if store.uri.startswith("sqlite"):
        assert experiment.artifact_location == (store.output / "mlartifacts").as_uri()


def test_a_project_of_ones_own_is_an_experiment_of_its_own(
    store: Store, client: MlflowClient
) -> None:
    own = store.tracker(experiment="my project")
    assert client.get_experiment(own.experiment_id).name == "my project"
    assert own.experiment_id != store.tracker().experiment_id


def test_a_complete_trial_is_finished_and_says_that_it_is_infeasible(
    tracker: SearchTracker, client: MlflowClient, tmp_path: Path
) -> None:
    answers = [
        AnswerRow(
            set_name="forget",
            edge="A_B",
            question="Où?",
            truth="Là",
            answer="„x“",
            rouge1=0.0,
            rouge_l=0.0,
        )
    ]
    write_answers(tmp_path / "a.parquet", answers, ())
    tracker.start(RUNNING_ROW, name="a trial", tags={"model": "tiny"})
    tracker.end(COMPLETE_ROW, tmp_path / "a.parquet")

    (run,) = children(client, tracker)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a trial")
    assert run.data.params == {"layer": "1", "coefficient": "2.0", "learning_rate": "0.003"}
    assert run.data.metrics == {
        "forget_rouge1": 0.25,
        "retain_rouge1": 0.75,
        "feasible": 0.0,
        "retain_exact": 1.0,
        "seconds": 0.75,
        "log10_learning_rate": math.log10(0.003),
        "loss": 1.0,
        "stage_forget_rouge1": 0.25,
        "stage_retain_rouge1": 0.75,
    }
    assert {"model": "tiny", "trial": "0", "state": "complete", "feasible": "false"}.items() <= (
        run.data.tags.items()
    )
    assert "failure" not in run.data.tags
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = client.download_artifacts(run.info.run_id, "answers.json", str(tmp_path))
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    assert table["data"] == [["forget", "A_B", "Où?", "Là", "„x“", 0.0]]


def test_an_estimated_score_is_told_from_an_exact_one(
    tracker: SearchTracker, client: MlflowClient
) -> None:
    """A trial that was stopped early has asked a part of the questions to keep."""
    tracker.start(RUNNING_ROW, name="a trial", tags={})
    tracker.end(dataclasses.replace(COMPLETE_ROW, retain_rows=16, retain_exact=False), None)

    (run,) = children(client, tracker)
    assert (run.data.metrics["retain_exact"], run.data.metrics["retain_rows"]) == (0.0, 16.0)


def test_runs_of_two_searches_are_told_apart_by_a_tag(store: Store, client: MlflowClient) -> None:
    trackers = [store.tracker(name) for name in ("this", "that")]
    for tracker in trackers:
        tracker.start(RUNNING_ROW, name="a trial", tags={"model": "tiny"})
    for tracker, name in zip(trackers, ("this", "that"), strict=True):
        runs = client.search_runs([tracker.experiment_id], f"tags.search = '{name}'")
        (child,) = children(client, tracker)
        assert {run.info.run_id for run in runs} == {tracker.run_id, child.info.run_id}


VANILLA = {"forget_rouge1": 1.0, "retain_rouge1": 0.875}
FULL = {"forget_rouge1": 0.125, "retain_rouge1": 0.625, "retain_rows": 84.0}


def stages(client: MlflowClient, run: Run) -> dict[str, list[tuple[int, float]]]:
    """Return the points of a run's stages by score."""
    return {
        name.removeprefix("stage_"): sorted(
            (point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)
        )
        for name in run.data.metrics
        if name.startswith("stage_")
    }


def test_rouge_goes_from_the_unmodified_model_over_the_trial_to_the_full_evaluation(
    tracker: SearchTracker, client: MlflowClient
) -> None:
    tracker.vanilla = VANILLA
    rows = [numbered(0), numbered(1)]
    for row in rows:
        tracker.start(row, name="n", tags={})
        tracker.end(row, None)
    for _ in range(2):  # as the end of a search may be written twice
        tracker.confirm(rows[1], FULL)

    runs = {run.data.tags["trial"]: run for run in children(client, tracker)}
    forget, retain = [(0, 1.0), (1, 0.25)], [(0, 0.875), (1, 0.75)]
    assert stages(client, runs["0"]) == {"forget_rouge1": forget, "retain_rouge1": retain}
    assert stages(client, runs["1"]) == {
        "forget_rouge1": [*forget, (2, 0.125)],
        "retain_rouge1": [*retain, (2, 0.625)],
    }
    assert "full_forget_rouge1" not in runs["0"].data.metrics
    metrics = runs["1"].data.metrics
    assert (metrics["full_forget_rouge1"], metrics["full_retain_rouge1"]) == (0.125, 0.625)
    assert (metrics["forget_rouge1"], metrics["retain_rouge1"]) == (0.25, 0.75)
    assert "full_retain_rows" not in metrics
    assert runs["1"].data.tags["confirmed_best"] == "true"
    assert "confirmed_best" not in runs["0"].data.tags


def test_another_best_after_going_on_takes_the_tag(store: Store, client: MlflowClient) -> None:
    first, rows = store.tracker("best"), [numbered(0), numbered(1)]
    for row in rows:
        first.start(row, name="n", tags={})
        first.end(row, None)
    first.confirm(rows[0], FULL)
    second = store.tracker("best", earlier=first.run_id)
    second.take_up(rows)
    second.confirm(rows[1], FULL)
    tags = {run.data.tags["trial"]: run.data.tags for run in children(client, second)}
    assert [tags[trial]["confirmed_best"] for trial in "01"] == ["false", "true"]
    second.confirm(None, {})
    tags = {run.data.tags["trial"]: run.data.tags for run in children(client, second)}
    assert [tags[trial]["confirmed_best"] for trial in "01"] == ["false", "false"]


def test_a_best_trial_without_a_run_is_confirmed_when_it_has_one(
    tracker: SearchTracker, client: MlflowClient
) -> None:
    """The store was away when the trial ended."""
    tracker.confirm(numbered(0), FULL)
    assert children(client, tracker) == []


def test_a_loss_curve_of_more_epochs_than_mlflow_takes_at_once_is_whole(
    tracker: SearchTracker, client: MlflowClient
) -> None:
    tracker.start(RUNNING_ROW, name="a trial", tags={})
    tracker.end(COMPLETE_ROW, None)

    (run,) = children(client, tracker)
    history = client.get_metric_history(run.info.run_id, "loss")
    by_step = {point.step: point.value for point in history}
    assert by_step == {n: 1501.0 - n for n in range(1, 1501)}


def test_a_failed_trial_is_marked_failed_with_its_reason(
    tracker: SearchTracker, client: MlflowClient, tmp_path: Path
) -> None:
    tracker.start(RUNNING_ROW, name="a trial", tags={})
    tracker.end(FAILED_ROW, tmp_path / "never-written.parquet")

    (run,) = children(client, tracker)
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"].startswith("the loss became NaN")
    assert run.data.tags["state"] == "failed"
    assert "feasible" not in run.data.tags
    assert client.list_artifacts(run.info.run_id) == []


def test_closing_ends_what_is_still_open(tracker: SearchTracker, client: MlflowClient) -> None:
    tracker.start(RUNNING_ROW, name="a trial", tags={})
    assert tracker.running() == [0]
    tracker.close(status="KILLED")

    assert tracker.running() == []
    assert [run.info.status for run in children(client, tracker)] == ["KILLED"]
    assert client.get_run(tracker.run_id).info.status == "KILLED"


def test_a_trial_stays_open_until_all_of_it_is_written(
    tracker: SearchTracker, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption in the middle leaves a run that can still be ended."""

    def interrupted(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    tracker.start(RUNNING_ROW, name="a trial", tags={})
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "_log", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tracker.end(COMPLETE_ROW, None)
    assert tracker.running() == [0]
    tracker.end(COMPLETE_ROW, None)

    assert tracker.running() == []
    assert [run.info.status for run in children(client, tracker)] == ["FINISHED"]


def test_the_parent_says_what_the_search_is(tracker: SearchTracker, client: MlflowClient) -> None:
    tracker.describe(
        parameters={"model": "tiny", "seed": 3},
        tags={"forget_edge": "A_B"},
        texts={"config.yaml": "a: 1\n"},
        data=DATA,
    )
    tracker.log_metrics({"vanilla_forget_rouge1": 1.0})

    run = client.get_run(tracker.run_id)
    assert run.data.params == {"model": "tiny", "seed": "3"}
    assert run.data.tags["forget_edge"] == "A_B"
    assert run.data.metrics == {"vanilla_forget_rouge1": 1.0}
    inputs = {one.dataset.name: one.dataset for one in run.inputs.dataset_inputs}
    assert {name: one.profile for name, one in inputs.items()} == {
        "forget": '{"rows": 1}',
        "retain": '{"rows": 2}',
    }
    assert inputs["forget"].digest == "f" * 36
    assert [one.path for one in client.list_artifacts(tracker.run_id)] == ["config.yaml"]


def test_trials_can_be_filtered_by_their_data(tracker: SearchTracker, client: MlflowClient) -> None:
    tracker.describe(parameters={}, tags={}, texts={}, data=DATA)
    tracker.start(RUNNING_ROW, name="a trial", tags={})
    (child,) = children(client, tracker)
    found = {
        next(tag.value for tag in one.tags if tag.key == "mlflow.data.context"): one.dataset.digest
        for one in child.inputs.dataset_inputs
    }
    assert found == {"forget": "f" * 36, "retain": "e" * 36}
    where = f"dataset.digest = '{'f' * 36}' and tags.`mlflow.parentRunId` = '{tracker.run_id}'"
    runs = client.search_runs([tracker.experiment_id], where)
    assert [run.info.run_id for run in runs] == [child.info.run_id]


def test_a_run_id_in_the_environment_does_not_become_the_parent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert store.tracker().run_id != "0" * 32


def committed(folder: Path, file: str) -> str:
    """Make a repository with one file in it; return its commit."""
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q", "-b", "trunk"], check=True)
    subprocess.run([*git, "add", file], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_every_run_says_where_it_comes_from(
    store: Store, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commit and state of the current folder's repository, and the versions that ran."""
    (tmp_path / "notes.txt").write_text("one")
    head = committed(tmp_path, "notes.txt")
    (tmp_path / "notes.txt").write_text("two")
    monkeypatch.chdir(tmp_path)

    tracker = store.tracker()
    tracker.start(RUNNING_ROW, name="a trial", tags={})
    for run in (client.get_run(tracker.run_id), *children(client, tracker)):
        assert {
            "mlflow.source.git.commit": head,
            "mlflow.source.git.branch": "trunk",
            "mlflow.source.git.dirty": "true",
            "version.optuna": importlib.metadata.version("optuna"),
            "version.torch": importlib.metadata.version("torch"),
        }.items() <= run.data.tags.items()
        assert run.data.tags["mlflow.user"]
    tracker.close(status="KILLED")


def test_a_folder_without_a_repository_has_no_commit(tmp_path: Path) -> None:
    assert git_tags(tmp_path) == {}
    assert code_tags(tmp_path) == {}


def test_the_code_has_a_commit_of_its_own_that_says_whether_it_was_changed(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "lunar_tune"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "checkout" / "README.md").write_text("one")
    head = committed(tmp_path / "checkout", ".")
    (tmp_path / "checkout" / "README.md").write_text("two")
    assert code_tags(package) == {"lunar_tune.git.commit": head}
    (package / "__init__.py").write_text("more = 1")
    assert code_tags(package) == {"lunar_tune.git.commit": f"{head}-dirty"}


def test_a_package_that_is_installed_below_another_repository_has_no_commit_of_that(
    tmp_path: Path,
) -> None:
    package = tmp_path / ".venv" / "lunar_tune"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "notes.txt").write_text("one")
    committed(tmp_path, "notes.txt")
    assert "mlflow.source.git.commit" in git_tags(package)
    assert code_tags(package) == {}


def test_the_commit_of_the_code_does_not_depend_on_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tags = origin_tags()
    assert "mlflow.source.git.commit" not in tags
    own = code_tags(Path(lunar_tune.__file__).parent)
    assert own.items() <= tags.items()


def test_what_is_no_finite_number_is_left_out(tracker: SearchTracker, client: MlflowClient) -> None:
    tracker.log_metrics({"a": math.nan, "b": math.inf, "c": 1.0})
    assert client.get_run(tracker.run_id).data.metrics == {"c": 1.0}


def test_the_parent_follows_the_best_feasible_score_trial_by_trial(
    tracker: SearchTracker, client: MlflowClient
) -> None:
    """Trial 2 ends before trial 1; an infeasible trial and a failed one change nothing."""
    outcomes = [(0, 0.5, True, 1), (2, 0.1, False, 2), (1, 0.25, True, 3), (3, 0.375, True, 5)]
    rows = [
        dataclasses.replace(
            COMPLETE_ROW,
            number=number,
            scores={"forget_rouge1": forget, "retain_rouge1": 0.9},
            objective=forget,
            feasible=feasible,
            ended=datetime(2026, 1, 1, 0, minute),
        )
        for number, forget, feasible, minute in outcomes
    ]
    failed = dataclasses.replace(FAILED_ROW, number=4, ended=datetime(2026, 1, 1, 0, 4))
    tracker.progress([rows[0], rows[1]], "forget_rouge1")
    tracker.progress([*rows, failed], "forget_rouge1")

    history = client.get_metric_history(tracker.run_id, "best_feasible")
    assert sorted((point.step, point.value) for point in history) == [
        (0, 0.5),
        (2, 0.25),
        (2, 0.5),
        (4, 0.25),
    ]


def test_searches_compare_by_their_outcome(tracker: SearchTracker, client: MlflowClient) -> None:
    scores = {"forget_rouge1": 0.125, "retain_rouge1": 0.875, "retain_rows": 84.0}
    tracker.conclude(dataclasses.replace(COMPLETE_ROW, number=7), scores, feasible=True)
    run = client.get_run(tracker.run_id)
    assert run.data.metrics == {
        "feasible": 1.0,
        "best_forget_rouge1": 0.125,
        "best_retain_rouge1": 0.875,
        "best_trial": 7.0,
        **{f"best_{name}": float(value) for name, value in PARAMETERS.items()},
    }
    assert run.data.params == {}, "a search that goes on may find a better one"
    assert run.data.tags["feasible"] == "true"


def test_a_search_that_goes_on_may_find_another_best_setting(
    tracker: SearchTracker, client: MlflowClient
) -> None:
    tracker.conclude(None, None, feasible=False)
    for coefficient, kind in ((1.0, "a"), (3.0, "b")):
        parameters = {"coefficient": coefficient, "kind": kind}
        row = dataclasses.replace(COMPLETE_ROW, parameters=parameters)
        tracker.conclude(row, {"forget_rouge1": 0.5}, feasible=True)
    run = client.get_run(tracker.run_id)
    assert (run.data.metrics["best_coefficient"], run.data.tags["best_kind"]) == (3.0, "b")
    assert (run.data.metrics["feasible"], run.data.tags["feasible"]) == (1.0, "true")


def test_a_best_setting_that_misses_a_bound_on_held_out_questions_is_not_called_feasible(
    tracker: SearchTracker, client: MlflowClient
) -> None:
    tracker.conclude(COMPLETE_ROW, {"forget_rouge1": 0.5}, feasible=False)
    run = client.get_run(tracker.run_id)
    assert (run.data.metrics["feasible"], run.data.tags["feasible"]) == (0.0, "false")
    assert run.data.metrics["best_forget_rouge1"] == 0.5


def test_a_search_that_found_nothing_says_so(tracker: SearchTracker, client: MlflowClient) -> None:
    tracker.conclude(None, None, feasible=False)
    run = client.get_run(tracker.run_id)
    assert (run.data.metrics, run.data.params) == ({"feasible": 0.0}, {})
    assert run.data.tags["feasible"] == "false"


def test_files_keep_their_folders(
    tracker: SearchTracker, client: MlflowClient, tmp_path: Path
) -> None:
    names = ("report.md", "pictures/history.png", "pictures/answers/a.svg")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    tracker.log_files([tmp_path / name for name in names], root=tmp_path)

    assert {one.path for one in client.list_artifacts(tracker.run_id)} == {"report.md", "pictures"}
    inside = {one.path for one in client.list_artifacts(tracker.run_id, "pictures")}
    assert inside == {"pictures/history.png", "pictures/answers"}
    deepest = client.list_artifacts(tracker.run_id, "pictures/answers")
    assert [one.path for one in deepest] == ["pictures/answers/a.svg"]


def test_the_use_of_the_machine_is_recorded_until_the_run_ends(
    tracker: SearchTracker, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use() -> dict[str, float]:
        metrics = client.get_run(tracker.run_id).data.metrics
        return {name: value for name, value in metrics.items() if name.startswith("system/")}

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    before = threading.active_count()
    tracker.monitor()
    deadline = time.monotonic() + 60
    while not use() and time.monotonic() < deadline:
        time.sleep(0.1)
    tracker.close(status="FINISHED")

    assert "system/cpu_utilization_percentage" in use()
    assert threading.active_count() == before
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_machine_that_cannot_be_measured_ends_no_search(
    tracker: SearchTracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such driver")

    name = "mlflow.system_metrics.system_metrics_monitor.SystemMetricsMonitor"
    monkeypatch.setattr(name, broken)
    tracker.monitor()
    tracker.close(status="FINISHED")
    said = "--system-metrics: cannot be recorded, the search goes on: no such driver"
    assert said in caplog.messages


def test_a_relative_store_is_kept_by_its_full_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = TrackedRun.__new__(TrackedRun)
    tracker.uri, tracker.experiment_id, tracker.run_id = "sqlite:///a/b.db", "1", "r"
    monkeypatch.chdir(tmp_path)
    assert tracker.address == {
        "uri": f"sqlite:///{tmp_path.resolve() / 'a/b.db'}",
        "experiment_id": "1",
        "run_id": "r",
    }


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:9",  # the discard port: refused at once, and MLflow would ask 7 times
        "nosuchscheme://x",
        "postgresql://127.0.0.1:9/x",
        "sqlite:///{folder}/text.db",
    ],
)
def test_a_store_that_cannot_be_opened_is_an_input_error(uri: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database " * 100)
    uri = uri.format(folder=tmp_path)

    with pytest.raises(InputError, match="--tracking-uri") as caught:
        SearchTracker(uri, output=tmp_path, name="x")

    assert uri in str(caught.value)
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:s3cretpw@127.0.0.1:9",
        "http://me:s3cretpw@x@127.0.0.1:9",
        "http://me:s3cretpw/x@127.0.0.1:9",
        "http://127.0.0.1:9?password=s3cretpw",
        "nosuchscheme://me:s3cretpw@x",
    ],
)
def test_no_error_of_a_store_tells_its_password(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used") as caught:
        SearchTracker(uri, output=tmp_path, name="x")
    assert "s3cretpw" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be used") as caught, opened_store(uri) as client:
        client.get_run("r")
    assert "s3cretpw" not in str(caught.value)


def test_no_warning_of_a_store_tells_its_password(
    tracker: SearchTracker, caplog: pytest.LogCaptureFixture
) -> None:
    with tracker.tolerating():
        raise OSError("http://me:s3cretpw@host:5000 is away")
    (said,) = [message for message in caplog.messages if "is away" in message]
    assert "http://me:***@host:5000 is away" in said
    assert "s3cretpw" not in "".join(caplog.messages)


def test_an_address_that_has_lost_its_password_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wants a password, which is not kept"):
        SearchTracker("http://me:***@127.0.0.1:9", output=tmp_path, name="x")


def test_retries_that_the_user_has_set_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError):
        SearchTracker("http://127.0.0.1:9", output=tmp_path, name="x")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_three_processes_can_open_a_new_store_at_once(tmp_path: Path) -> None:
    """Without the lock two of three died in the store's migration."""
    code = f"""
import multiprocessing, sys
from pathlib import Path
from types import SimpleNamespace
import mlflow.store.tracking.sqlalchemy_store
from lunar_tune.tracking.trial_runs import SearchTracker
from lunar_tune.tracking.store import default_tracking_uri
output = Path({str(tmp_path)!r})
def open_and_close(barrier):
    barrier.wait()
    SearchTracker(default_tracking_uri(output), output=output, name="x").close(status="FINISHED")
fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(3)
processes = [fork.Process(target=open_and_close, args=(barrier,)) for _ in range(3)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(max(abs(process.exitcode) for process in processes))
"""
    done = finish(start([sys.executable, "-c", code], cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        client = MlflowClient(default_tracking_uri(tmp_path))
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert len(client.search_runs([experiment.experiment_id])) == 3


def test_a_store_that_fails_in_the_middle_is_warned_of_once_and_ends_nothing(
    tracker: SearchTracker, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with tracker.tolerating():
            raise OSError("the disk is full")
    assert [record.message for record in caplog.records] == [
        "MLflow cannot be written, the work goes on: the disk is full"
    ]
    with pytest.raises(KeyError), tracker.tolerating():
        raise KeyError("a mistake in the program")


# Going on


def numbered(number: int, **changes: Any) -> TrialRow:
    return dataclasses.replace(COMPLETE_ROW, number=number, **changes)


def all_children(client: MlflowClient, tracker: SearchTracker) -> dict[str, list[Run]]:
    """Return a search's runs by trial, read without the class under test."""
    found: dict[str, list[Run]] = {}
    for run in children(client, tracker):
        found.setdefault(run.data.tags["trial"], []).append(run)
    return found


def test_a_search_that_goes_on_takes_its_run_up_again(store: Store, client: MlflowClient) -> None:
    first = store.tracker("again")
    first.describe(parameters={"seed": 1}, tags={}, texts={}, data={})
    first.close(status="KILLED")
    second = store.tracker("again", earlier=first.run_id)
    assert (second.run_id, second.continued) == (first.run_id, True)
    assert client.get_run(first.run_id).info.status == "RUNNING"
    second.describe(parameters={"seed": 2, "new": "x"}, tags={"a": "b"}, texts={}, data={})
    run = client.get_run(first.run_id)
    assert run.data.params == {"seed": "1", "new": "x"}, "MLflow lets no parameter change"
    assert run.data.tags["a"] == "b"
    second.close(status="FINISHED")
    assert client.get_run(first.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("lost", ["0" * 32, "deleted"])
def test_a_run_that_the_store_has_lost_is_begun_anew(
    store: Store, client: MlflowClient, lost: str
) -> None:
    if lost == "deleted":
        lost = store.tracker("lost").run_id
        client.delete_run(lost)
    tracker = store.tracker("anew", earlier=lost)
    assert tracker.run_id != lost
    assert not tracker.continued


def test_runs_that_were_left_open_are_ended_as_the_study_says(
    store: Store, client: MlflowClient
) -> None:
    """Trials: 0 is whole, 1 was cut short, 2 is open twice, 3 has no run, 4 is no trial."""
    first = store.tracker("left")
    for number in (0, 1, 2, 2, 4):
        first.start(numbered(number, state=RUNNING), name="n", tags={})
        if number == 0:
            first.end(numbered(0), None)
        if number == 1:
            client.set_terminated(first._children[1], "FINISHED")
    whole = all_children(client, first)["0"][0].info.run_id

    rows = [
        numbered(0),
        numbered(1, scores={"forget_rouge1": 0.5, "retain_rouge1": 0.25}),
        numbered(2, state=FAILED, failure="the worker was killed", scores={}, feasible=None),
        numbered(3),
    ]
    tracker = store.tracker("left", earlier=first.run_id)
    tracker.take_up(rows)
    assert tracker.mirrored == {0}
    for row in rows:
        if row.number not in tracker.mirrored:
            if row.number not in tracker.running():
                tracker.start(row, name="n", tags={})
            tracker.end(row, None)
    tracker.close(status="FINISHED")

    found = all_children(client, tracker)
    assert {trial: len(runs) for trial, runs in found.items()} == dict.fromkeys("0123", 1)
    assert found["0"][0].info.run_id == whole, "what is whole is left alone"
    for row in rows:
        (run,) = found[str(row.number)]
        assert run.info.status == ("FAILED" if row.state == FAILED else "FINISHED")
        assert run.data.tags["state"] == row.state
        assert row.scores.items() - {("retain_rows", 84.0)} <= run.data.metrics.items()


def test_what_an_earlier_version_did_not_write_is_added_and_the_rest_left_alone(
    store: Store, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.tracker("older")
    first._own.clear()
    with monkeypatch.context() as patch:
        patch.setattr("lunar_tune.tracking.trial_runs._rouge", lambda _: {})
        earlier = dataclasses.replace(numbered(0, losses=(2.0, 1.0)), retain_exact=None)
        first.start(earlier, name="n", tags={})
        first.end(earlier, None)
    (before,) = children(client, first)
    assert "search" not in before.data.tags

    tracker = store.tracker("older", earlier=first.run_id)
    tracker.vanilla = VANILLA
    tracker.describe(parameters={}, tags={}, texts={}, data=DATA)
    tracker.take_up([numbered(0, losses=(2.0, 1.0))])
    assert tracker.mirrored == {0}
    (after,) = children(client, tracker)
    assert after.info.run_id == before.info.run_id
    assert after.info.end_time == before.info.end_time
    assert set(after.data.tags.items()) - set(before.data.tags.items()) == {("search", "older")}
    new = set(after.data.metrics.items()) - set(before.data.metrics.items())
    assert dict(new) == {
        "retain_exact": 1.0,
        "stage_forget_rouge1": 0.25,
        "stage_retain_rouge1": 0.75,
    }
    assert stages(client, after)["forget_rouge1"] == [(0, 1.0), (1, 0.25)]
    assert len(client.get_metric_history(after.info.run_id, "loss")) == 2
    assert {one.dataset.name for one in after.inputs.dataset_inputs} == {"forget", "retain"}
    assert client.get_run(tracker.run_id).data.tags["search"] == "older"


def test_taking_up_twice_changes_nothing(store: Store, client: MlflowClient) -> None:
    tracker = store.tracker("twice")
    rows = [numbered(0), numbered(1)]
    for row in rows:
        tracker.start(row, name="n", tags={})
        tracker.end(row, None)
    tracker.progress(rows, "forget_rouge1")
    before = [run.to_dictionary() for run in children(client, tracker)]
    tracker.take_up(rows)
    tracker.take_up(rows)
    tracker.progress(rows, "forget_rouge1")
    assert [run.to_dictionary() for run in children(client, tracker)] == before
    assert tracker.running() == []


def test_a_trial_whose_run_cannot_be_opened_is_mirrored_when_the_store_is_back(
    tracker: SearchTracker,
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow.exceptions import MlflowException

    from lunar_tune.search.mirroring import SearchMirror

    spec = SimpleNamespace(method=SimpleNamespace(name="lunar"), tags={})
    plan: Any = SimpleNamespace(spec=spec, config=SearchConfig())
    study: Any = SimpleNamespace(rows=lambda: [COMPLETE_ROW])
    mirror = SearchMirror(tracker, plan, Folder(tmp_path), study)

    asked: list[str | None] = []

    def away(*_: Any, **__: Any) -> Any:
        asked.append(os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES"))
        raise MlflowException("the server is away")

    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "create_run", away)
        mirror.start(RUNNING_ROW)
        mirror.end(COMPLETE_ROW)
    assert children(client, tracker) == []
    assert asked == ["1"], "given up soon, and not asked again at once"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    told = [message for message in caplog.messages if "MLflow cannot be written" in message]
    assert len(told) == 1
    mirror.end(COMPLETE_ROW)
    assert children(client, tracker) == []
    tracker.ask_again()
    mirror.end(COMPLETE_ROW)
    (run,) = children(client, tracker)
    assert run.data.metrics["forget_rouge1"] == 0.25
    assert run.info.status == "FINISHED"
    tracker.close(status="FINISHED")
