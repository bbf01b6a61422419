"""MLflow's runs say what the study says, after whatever has happened to them or to the store."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_lines import finish, start
from made_outcomes import complete, trial_result
from tracked_searches import BEST, SCORES, TAGS, begun_study, make_search

import lunar_tune
from lunar_tune.config.search_config import EXPERIMENT
from lunar_tune.errors import InputError
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import Folder
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import Study
from lunar_tune.tracking.store import (
    code_commit,
    default_tracking_uri,
    open_experiment,
    opened_store,
    origin_tags,
)
from lunar_tune.tracking.sync import Tracker, sync

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# MLflow and SQLAlchemy leave a store's connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
NOTE = "**A note.**\n\n| ä |\n"
WRITING = ("create", "log", "set", "update", "delete")


@dataclasses.dataclass(frozen=True)
class Store:
    """A store, and a finished search of three trials that is not in it yet."""

    uri: str
    client: MlflowClient
    search: StoredSearch
    """With an identity of its own, so that each test has it anew."""

    def runs(self, experiment: str = EXPERIMENT) -> list[Run]:
        """Return the active runs of the search, read without the code under test."""
        found = self.client.get_experiment_by_name(experiment)
        identity = self.search.study.notes["mlflow"]["id"]
        runs = self.client.search_runs([found.experiment_id]) if found is not None else []
        return [run for run in runs if identity in run.data.tags.values()]

    @property
    def parents(self) -> list[Run]:
        return [run for run in self.runs() if "mlflow.parentRunId" not in run.data.tags]

    @property
    def trials(self) -> list[Run]:
        runs = [run for run in self.runs() if "mlflow.parentRunId" in run.data.tags]
        return sorted(runs, key=lambda run: run.data.tags["trial"])

    def curve(self, run: Run, name: str) -> list[tuple[int, float]]:
        """Return a metric's points."""
        history = self.client.get_metric_history(run.info.run_id, name)
        return sorted((point.step, point.value) for point in history)

    def said(self) -> list[dict[str, Any]]:
        """Return all that the runs say, without what differs by nature."""
        (parent,) = self.parents
        found = []
        for run in [parent, *self.trials]:
            tags = dict(run.data.tags)
            assert tags.pop("mlflow.parentRunId", parent.info.run_id) == parent.info.run_id
            tags = {name: text.replace(self.identity, "id") for name, text in tags.items()}
            found.append(
                {
                    "name": run.info.run_name,
                    "times": (run.info.start_time, run.info.end_time, run.info.status),
                    "parameters": run.data.params,
                    "tags": tags,
                    "curves": {name: self.curve(run, name) for name in run.data.metrics},
                    "data": sorted(one.dataset.digest for one in run.inputs.dataset_inputs),
                    "files": [one.path for one in self.client.list_artifacts(run.info.run_id)],
                }
            )
        return found

    @property
    def identity(self) -> str:
        return str(self.search.study.notes["mlflow"]["id"])


class Watched:
    """A client that notes which calls are made of it, and fails where it is told to."""

    def __init__(self, client: MlflowClient, after: Callable[[str], None] = lambda _: None) -> None:
        self._client, self._after, self.calls = client, after, list[str]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            said = found(*arguments, **options)
            self.calls.append(name)
            self._after(name)
            return said

        return call

    @property
    def written(self) -> list[str]:
        return [name for name in self.calls if name.startswith(WRITING)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StoredSearch:
    output = tmp_path_factory.mktemp("searches")
    folder = make_search(output, "one", mirrored=False)
    for name in ("report.md", "pictures/history.png", "pictures/answers/a.svg"):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text(name)
    return SearchResults.read(folder.path)


@pytest.fixture(scope="module")
def sqlite_uri(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Callable[[Path], Path]
) -> str:
    output = tmp_path_factory.mktemp("runs")
    empty_store(output / "mlflow.db")
    return default_tracking_uri(output)


def with_notes(search: StoredSearch, **notes: Any) -> StoredSearch:
    study = dataclasses.replace(search.study, notes={**search.study.notes, **notes})
    return dataclasses.replace(search, study=study)


_NUMBERS = itertools.count()


def opened(uri: str, search: StoredSearch) -> Iterator[Store]:
    place = {**search.study.notes["mlflow"], "id": f"id-{next(_NUMBERS)}"}
    with opened_store(uri) as client:
        yield Store(uri, client, with_notes(search, mlflow=place))


@pytest.fixture
def store(sqlite_uri: str, finished: StoredSearch) -> Iterator[Store]:
    yield from opened(sqlite_uri, finished)


@pytest.fixture(params=["sqlite", "server"])
def any_store(
    request: pytest.FixtureRequest, sqlite_uri: str, finished: StoredSearch
) -> Iterator[Store]:
    uri = sqlite_uri if request.param == "sqlite" else request.getfixturevalue("server")
    yield from opened(uri, finished)


def as_begun(search: StoredSearch, study: Study) -> StoredSearch:
    """Return a search under way as its process sees it."""
    return dataclasses.replace(search, study=study.stored)


# What a sync writes


def test_a_finished_search_is_a_run_with_a_run_for_each_trial(any_store: Store) -> None:
    parent = sync(any_store.search, any_store.client, note=NOTE)

    (found,) = any_store.parents
    assert (found.info.run_id, found.info.run_name, found.info.status) == (
        *(parent.info.run_id, "one", "FINISHED"),
    )
    assert found.data.params == {**TAGS, "seed": "3"}
    best = any_store.search.rows[BEST].parameters
    assert found.data.metrics == {
        "baseline_forget_rouge1": 1.0,
        "baseline_retain_rouge1": 0.875,
        "num_trials": 3.0,
        "best_feasible": 0.125,
        "feasible": 1.0,
        "best_forget_rouge1": 0.125,
        "best_retain_rouge1": 0.8125,
        "best_trial": 2.0,
        **{f"best_{name}": value for name, value in best.items()},
    }
    said = {"search": "one", **TAGS, "feasible": "true", "mlflow.note.content": NOTE}
    assert said.items() <= found.data.tags.items()
    assert any_store.curve(found, "best_feasible") == [(0, 0.25), (1, 0.25), (2, 0.125)]
    at = [(found.info.run_id, ""), (found.info.run_id, "pictures")]
    files = {one.path for place in at for one in any_store.client.list_artifacts(*place)}
    pictures = {"pictures", "pictures/history.png", "pictures/answers"}
    assert files == {"config.yaml", "report.md", *pictures}
    profiles = {one.dataset.name: one.dataset.profile for one in found.inputs.dataset_inputs}
    assert profiles == {"forget": '{"rows": 1}', "retain": '{"rows": 2}'}

    for run, row in zip(any_store.trials, any_store.search.rows, strict=True):
        assert run.info.status == "FINISHED"
        assert row.started is not None
        assert row.ended is not None
        times = [int(time.timestamp() * 1000) for time in (row.started, row.ended)]
        assert [run.info.start_time, run.info.end_time] == times
        assert run.data.params == {name: str(value) for name, value in row.parameters.items()}
        assert run.data.tags["mlflow.parentRunId"] == found.info.run_id
        assert run.data.tags["confirmed_best"] == str(row.number == BEST).lower()


def test_a_trials_run_has_its_scores_curves_stages_and_answers(
    any_store: Store, tmp_path: Path
) -> None:
    sync(any_store.search, any_store.client)
    first, infeasible, best = any_store.trials
    rate = any_store.search.rows[0].parameters["learning_rate"]
    assert first.data.metrics == {
        "forget_rouge1": 0.25,
        "retain_rouge1": 0.9,
        "deviation_score": pytest.approx(100 * math.hypot(0.25, 0.1)),
        "feasible": 1.0,
        "retain_exact": 1.0,
        "seconds": 0.75,
        "log10_learning_rate": math.log10(rate),
        "loss": 1.0,
        "check_forget_rouge1": 0.9,
        "check_retain_rouge1": 0.8,
        "stage_forget_rouge1": 0.25,
        "stage_retain_rouge1": 0.9,
    }
    assert any_store.curve(first, "loss") == [(1, 2.0), (2, 1.0)]
    assert any_store.curve(first, "stage_forget_rouge1") == [(0, 1.0), (1, 0.25)]
    assert any_store.curve(best, "stage_forget_rouge1") == [(0, 1.0), (1, 0.125), (2, 0.125)]
    assert best.data.metrics["full_retain_rouge1"] == 0.8125
    assert {"trial": "1", "state": "complete", "feasible": "false", "search": "one"}.items() <= (
        infeasible.data.tags.items()
    )
    path = any_store.client.download_artifacts(first.info.run_id, "answers.json", str(tmp_path))
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    assert table["columns"] == ["set", "edge", "question", "truth", "answer", "rouge1"]
    assert table["data"] == [["forget", "A_B", "Où?", "Là", "„x“", 0.0]]
    shown = json.loads(first.data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "answers.json", "type": "table"}]
    where = f"dataset.digest = '{'f' * 36}' and tags.`mlflow.parentRunId` = '"
    where += first.data.tags["mlflow.parentRunId"] + "'"
    assert len(any_store.client.search_runs([first.info.experiment_id], where)) == len(SCORES)


def test_failed_trials_and_long_curves_and_estimates_are_told(store: Store, tmp_path: Path) -> None:
    study = begun_study(Folder(tmp_path / "n"))
    losses = [float(n) for n in range(1500, 0, -1)]  # more than MLflow takes at once
    worked = trial_result(0.5, 0.5, retain_rows=16, losses=tuple(losses))
    complete(study, study.ask()[0], worked)
    study.fail(study.ask()[0], "the loss became NaN" * 1000, deterministic=True)
    study.ask()
    search = with_notes(as_begun(store.search, study), mlflow=store.search.study.notes["mlflow"])
    sync(search, store.client, status="RUNNING")

    assert [run.info.status for run in store.parents] == ["RUNNING"]
    assert "feasible" not in store.parents[0].data.metrics
    estimated, failed = store.trials  # the third still runs
    assert store.curve(estimated, "loss") == [(n, 1501.0 - n) for n in range(1, 1501)]
    assert estimated.data.metrics["retain_exact"] == 0.0
    assert estimated.data.metrics["retain_rows"] == 16.0
    assert (failed.info.status, failed.data.tags["state"]) == ("FAILED", "failed")
    assert failed.data.tags["failure"].startswith("the loss became NaN")

    sync(search, store.client)
    (parent,) = store.parents
    assert (parent.info.status, parent.data.metrics["feasible"]) == ("KILLED", 0.0)


def test_every_run_says_where_it_comes_from() -> None:
    tags = origin_tags()
    assert tags["mlflow.source.name"] == "lunar_tune"
    assert tags["version.lunar_tune"] == lunar_tune.__version__
    for package in ("torch", "optuna"):
        assert tags[f"version.{package}"] == importlib.metadata.version(package)


def test_the_commit_is_that_of_the_repository_that_has_the_package(tmp_path: Path) -> None:
    """An installed package may lie below the repository of something else."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert code_commit(package) is None
    subprocess.run([*git, "add", "package"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert code_commit(package) == done.stdout.strip()


def test_a_search_that_goes_on_is_the_same_run_with_another_best(store: Store) -> None:
    sync(store.search, store.client)
    before = {run.info.run_id for run in store.runs()}
    scores = {"forget_rouge1": 0.25, "retain_rouge1": 0.9}
    confirmed = {"number": 0, "scores": scores, "max_new_tokens": 512}
    description = {**store.search.study.notes["description"], "num_trials": 5}
    search = with_notes(store.search, confirmed=confirmed, description=description)
    sync(search, store.client)
    assert {run.info.run_id for run in store.runs()} == before
    assert store.parents[0].data.metrics["num_trials"] == 5.0
    assert store.parents[0].data.metrics["best_trial"] == 0.0
    assert [run.data.tags["confirmed_best"] for run in store.trials] == ["true", "false", "false"]


# Again, after damage, after an interruption


def test_a_second_sync_writes_nothing(any_store: Store) -> None:
    sync(any_store.search, any_store.client, note=NOTE)
    client: Any = Watched(any_store.client)
    sync(any_store.search, client, note=NOTE)
    assert client.written == []
    assert client.calls


def test_a_trial_costs_few_calls_however_many_there_are(store: Store) -> None:
    """Nothing is written again of trials that were written before."""

    def with_rows(count: int) -> StoredSearch:
        study = dataclasses.replace(store.search.study, rows=store.search.rows[:count])
        notes = {**store.search.study.notes, "confirmed": None}
        return dataclasses.replace(store.search, study=dataclasses.replace(study, notes=notes))

    sync(with_rows(0), store.client, status="RUNNING")
    counts = []
    for number in range(len(SCORES)):
        client: Any = Watched(store.client)
        sync(with_rows(number + 1), client, status="RUNNING")
        counts.append(len(client.calls))
        assert client.calls.count("create_run") == 1
        assert len(store.curve(store.parents[0], "best_feasible")) == number + 1
    assert max(counts) <= 12
    client = Watched(store.client)
    sync(store.search, client)
    assert len(client.written) <= 12, "what is left is the search's own run, and which is the best"


def test_of_one_trial_nothing_else_is_looked_at(store: Store) -> None:
    sync(store.search, store.client)
    for run in store.trials[:2]:
        store.client.delete_run(run.info.run_id)
    sync(store.search, store.client, trial=1)
    assert [run.data.tags["trial"] for run in store.trials] == ["1", "2"]


def test_a_tracker_looks_at_all_trials_first_and_after_a_failure(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What MLflow lacked before, or while it was away, is there after the next trial."""
    from mlflow import MlflowClient

    def away(*_: object) -> None:
        raise OSError("gone")

    sync(store.search, store.client)
    tracker, later = Tracker(store.uri, EXPERIMENT, "n"), time.monotonic() + 60
    for _ in range(2):
        store.client.delete_run(store.trials[0].info.run_id)
        assert tracker.search(store.search, status="RUNNING", trial=BEST)
        assert len(store.trials) == len(SCORES)
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "get_experiment_by_name", away)
            assert not tracker.search(store.search, status="RUNNING", trial=BEST)
        monkeypatch.setattr("time.monotonic", lambda: later)


def deleted(store: Store) -> None:
    store.client.delete_run(store.trials[1].info.run_id)


def deleted_search(store: Store) -> None:
    store.client.delete_run(store.parents[0].info.run_id)


def doubled(store: Store) -> None:
    for run in (*store.parents, store.trials[0]):
        store.client.create_run(run.info.experiment_id, tags=run.data.tags)


def left_running(store: Store) -> None:
    for run in (*store.parents, store.trials[2]):
        store.client.update_run(run.info.run_id, status="RUNNING")


def wrong_metric(store: Store) -> None:
    for run in (*store.parents, *store.trials):
        store.client.log_metric(run.info.run_id, "feasible", 0.5)


def of_no_trial(store: Store) -> None:
    tags = {**store.trials[0].data.tags, "trial": "7"}
    store.client.create_run(store.trials[0].info.experiment_id, tags=tags)


def half_written(store: Store) -> None:
    for run in (*store.parents, *store.trials):
        store.client.set_tag(run.info.run_id, "lunar_tune.digest", "")
        store.client.set_tag(run.info.run_id, "state", "?")


@pytest.mark.parametrize(
    "damage",
    [deleted, deleted_search, doubled, left_running, wrong_metric, of_no_trial, half_written],
)
def test_one_sync_repairs(store: Store, damage: Callable[[Store], None]) -> None:
    sync(store.search, store.client, note=NOTE)
    whole = store.said()
    damage(store)
    sync(store.search, store.client, note=NOTE)
    after = store.said()
    if damage is half_written:
        del after[0]["tags"]["state"]  # which a search's run does not have
    if damage is wrong_metric:
        for one in (*whole, *after):  # MLflow keeps what was once written
            one["curves"].pop("feasible")
        metrics = [run.data.metrics["feasible"] for run in (*store.parents, *store.trials)]
        assert metrics == [1.0, 1.0, 0.0, 1.0]
    assert after == whole
    client: Any = Watched(store.client)
    sync(store.search, client, note=NOTE)
    assert client.written == []


def test_an_empty_store_and_another_experiment_get_all_of_it(store: Store) -> None:
    sync(store.search, store.client)
    whole = store.said()
    place = {**store.search.study.notes["mlflow"], "experiment": "my project"}
    sync(with_notes(store.search, mlflow=place), store.client)
    assert len(store.runs("my project")) == len(whole)
    assert store.said() == whole, "the other experiment is left alone"
    experiment = store.client.get_experiment_by_name("my project")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    file = Path(store.uri.removeprefix("sqlite:///"))
    assert experiment.artifact_location == (file.parent / "mlartifacts").as_uri()


def test_a_run_of_the_users_own_below_the_search_is_left_alone(store: Store) -> None:
    parent = sync(store.search, store.client)
    tags = {"mlflow.parentRunId": parent.info.run_id, "trial": "0"}
    own = store.client.create_run(parent.info.experiment_id, tags=tags)
    sync(store.search, store.client)
    assert store.client.get_run(own.info.run_id).info.lifecycle_stage == "active"


def test_an_interruption_after_any_call_leaves_what_one_sync_completes(
    sqlite_uri: str, finished: StoredSearch
) -> None:
    store = next(opened(sqlite_uri, finished))
    client: Any = Watched(store.client)
    sync(store.search, client, note=NOTE)
    whole, n_calls = store.said(), len(client.calls)
    for place in range(n_calls):
        store = next(opened(sqlite_uri, finished))
        calls = itertools.count()

        def interrupt(_: str, place: int = place, calls: Iterator[int] = calls) -> None:
            if next(calls) == place:
                raise KeyboardInterrupt

        client = Watched(store.client, interrupt)
        with pytest.raises(KeyboardInterrupt):
            sync(store.search, client, note=NOTE)
        assert client.calls[-1] == "create_run" or "RUNNING" not in {
            run.info.status for run in store.runs()
        }
        sync(store.search, store.client, note=NOTE)
        assert store.said() == whole, f"after {client.calls[-1]}, the call {place}"


# The store of a search under way


def test_a_store_that_fails_costs_no_trial_and_the_next_sync_has_all(
    sqlite_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow import MlflowClient

    study = begun_study(Folder(tmp_path / "n"))
    tracker = Tracker(sqlite_uri, EXPERIMENT, "n")
    retries: list[str | None] = []

    def away(*_: object) -> None:
        retries.append(os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES"))
        raise OSError("http://me:s3cretpw@host: failed\nat length")

    def wrong(*_: object) -> None:
        raise KeyError("a mistake in the program")

    for number, (forget, retain) in enumerate(SCORES):
        complete(study, study.ask()[0], trial_result(forget, retain))
        search = StoredSearch(folder=Folder(tmp_path / "n"), study=study.stored)
        with monkeypatch.context() as patch:
            if number < BEST:
                patch.setattr(MlflowClient, "get_experiment_by_name", away)
            written = tracker.search(search, status="RUNNING")
        assert not written, "it is left alone for a while"
    assert retries == ["1"], "it fails soon"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("MLflow is not written, the work goes on: ")
    assert said.endswith("cannot be used: http://me:***@host: failed")
    assert tracker.search(search), "at the end it is tried in any case"
    with opened_store(sqlite_uri) as client:
        assert len(Store(sqlite_uri, client, search).trials) == len(SCORES)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", wrong)
    with pytest.raises(KeyError):
        tracker.search(search)


def test_a_place_keeps_its_identity_and_tells_no_password(store: Store) -> None:
    tracker = Tracker(store.uri, "mine", "n")
    first = tracker.place(None)
    assert first["uri"] == store.uri
    assert tracker.place({"id": first["id"], "uri": "http://other", "experiment": "x"}) == first
    assert tracker.place(None)["id"] != first["id"]
    tracker.uri = "http://me:s3cretpw@host:5000"
    assert tracker.place(None)["uri"] == "http://me:***@host:5000"


def test_a_run_id_in_the_environment_is_no_search(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    Tracker(store.uri, EXPERIMENT, "n")
    assert "MLFLOW_RUN_ID" not in os.environ


# What a store cannot do is found before the work


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:9",  # the discard port: refused at once, and MLflow would ask 7 times
        "nosuchscheme://x",
        "postgresql://127.0.0.1:9/x",
        "sqlite:///{folder}/text.db",
        "http://me:s3cretpw@127.0.0.1:9",
        "http://me:s3cretpw/x@127.0.0.1:9",
        "http://127.0.0.1:9?password=s3cretpw",
        "nosuchscheme://me:s3cretpw@x",
    ],
)
def test_a_store_that_cannot_be_opened_is_an_input_error(uri: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database " * 100)
    uri = uri.format(folder=tmp_path)
    with pytest.raises(InputError, match=r"(?s)cannot be used: .*--tracking-uri") as caught:
        Tracker(uri, EXPERIMENT, "x")
    assert "s3cretpw" not in str(caught.value)
    assert uri in str(caught.value) or "***" in str(caught.value)
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_database_that_wants_a_migration_is_an_input_error(
    tmp_path: Path, empty_store: Callable[[Path], Path]
) -> None:
    database = sqlite3.connect(empty_store(tmp_path / "mlflow.db"))
    with database:
        database.execute("update alembic_version set version_num = '451aebb31d03'")
    database.close()
    with pytest.raises(InputError, match="mlflow db upgrade"):
        Tracker(default_tracking_uri(tmp_path), EXPERIMENT, "x")


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("s3://bucket/x", "No module named 'boto"),
        ("nosuchscheme://bucket", "nosuchscheme"),
        ("file://{file}/x", "is a file, not a folder"),
    ],
)
def test_artifacts_that_cannot_be_kept_are_an_input_error(
    store: Store, location: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    location = location.format(file=tmp_path / "file")
    name = f"at {location}"
    if store.client.get_experiment_by_name(name) is None:
        store.client.create_experiment(name, artifact_location=location)
    with pytest.raises(InputError, match=said) as caught:
        Tracker(store.uri, name, "x")
    assert f"MLflow experiment {name}: its artifacts lie in {location}" in str(caught.value)


def test_a_deleted_experiment_is_an_input_error(store: Store) -> None:
    experiment = open_experiment(store.client, "deleted")
    store.client.delete_experiment(experiment.experiment_id)
    with pytest.raises(InputError, match=r"it was deleted in MLflow\. Restore it"):
        Tracker(store.uri, "deleted", "x")


def test_an_address_that_has_lost_its_password_is_not_used() -> None:
    with pytest.raises(InputError, match="wants a password, which is not kept"):
        Tracker("http://me:***@127.0.0.1:9", EXPERIMENT, "x")


def test_retries_that_the_user_has_set_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError):
        Tracker("http://127.0.0.1:9", EXPERIMENT, "x")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_three_processes_can_open_a_new_store_at_once(tmp_path: Path) -> None:
    """Without the lock two of three died in the store's migration."""
    code = f"""
import multiprocessing, sys
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from lunar_tune.tracking.store import default_tracking_uri
from lunar_tune.tracking.sync import Tracker
uri = default_tracking_uri(Path({str(tmp_path)!r}))
def open_store(barrier):
    barrier.wait()
    Tracker(uri, "x", "x")
fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(3)
processes = [fork.Process(target=open_store, args=(barrier,)) for _ in range(3)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(max(abs(process.exitcode) for process in processes))
"""
    done = finish(start([sys.executable, "-c", code], cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings(), opened_store(default_tracking_uri(tmp_path)) as client:
        warnings.simplefilter("ignore")
        assert client.get_experiment_by_name("x") is not None
