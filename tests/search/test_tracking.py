"""MLflow's runs say what the study says, after whatever has happened to them or to the store."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from command_lines import finish, start, without_ray
from filelock import FileLock
from invented_searches import search_of
from made_outcomes import KilledError, complete, trial_result
from tracked_searches import (
    BEST,
    SCORES,
    TAGS,
    Store,
    begun_study,
    in_store,
    make_search,
    with_notes,
)

from lunar_tune.cli.compare import compare as COMPARE
from lunar_tune.config.options import BEST_FILTER, EXPERIMENT
from lunar_tune.errors import InputError
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import Folder
from lunar_tune.tracking.address import default_tracking_uri
from lunar_tune.tracking.store import opened_store
from lunar_tune.tracking.sync import (
    Tracker,
    check_registrable,
    code_commit,
    register_model,
    shown,
    sync,
)
from lunar_tune.tracking.ui import View, keep_views

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's
NOTE = "**A note.**\n\n| ä |\n"
WRITING = ("create", "log", "set", "update", "delete")


class Watched:
    """A client that notes which calls are made of it, and says so after each."""

    def __init__(self, client: Any, after: Callable[[int], None] = lambda _: None) -> None:
        self._client, self._after, self.calls = client, after, list[str]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            said = found(*arguments, **options)
            self.calls.append(name)
            self._after(len(self.calls) - 1)
            return said

        return call if callable(found) else found

    @property
    def written(self) -> list[str]:
        return [name for name in self.calls if name.startswith(WRITING)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SearchResults:
    output = tmp_path_factory.mktemp("searches")
    return SearchResults.read(make_search(output, "one", mirrored=False).path)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, empty_store: Callable[[Path], Path]) -> str:
    output = tmp_path_factory.mktemp("runs")
    empty_store(output / "mlflow.db")
    return default_tracking_uri(output)


@pytest.fixture
def store(uri: str, finished: SearchResults) -> Iterator[Store]:
    with in_store(uri, finished) as found:
        yield found


def with_rows(search: SearchResults, count: int) -> SearchResults:
    study = dataclasses.replace(search.study, rows=search.rows[:count])
    return with_notes(dataclasses.replace(search, study=study), confirmed=None)


# What a sync writes


def test_a_finished_search_is_a_run_with_a_run_for_each_trial(store: Store, tmp_path: Path) -> None:
    parent = sync(store.search, store.client, note=NOTE)

    (found,) = store.parents
    info = found.info
    assert (info.run_id, info.run_name, info.status) == (parent.info.run_id, "one", "FINISHED")
    assert found.data.params == {**TAGS, "seed": "3"}
    best_point = store.search.rows[BEST].parameters
    assert found.data.metrics == {
        "baseline_forget_rouge1": 1.0,
        "baseline_retain_rouge1": 0.875,
        "num_trials": 3.0,
        "best_feasible": 0.125,
        "feasible": 1.0,
        "best_forget_rouge1": 0.125,
        "best_retain_rouge1": 0.8125,
        "best_trial": 2.0,
        **{f"best_{name}": value for name, value in best_point.items()},
    }
    assert {"search": "one", **TAGS, "mlflow.note.content": NOTE}.items() <= found.data.tags.items()
    assert store.curve(found, "best_feasible") == [(0, 0.25), (1, 0.25), (2, 0.125)]
    pictures = {"pictures", "pictures/history.png", "pictures/answers"}
    assert store.files(found) == {"config.yaml", "report.md", "page.html", *pictures}
    profiles = {one.dataset.name: one.dataset.profile for one in found.inputs.dataset_inputs}
    assert profiles == {"forget": '{"rows": 1}', "retain": '{"rows": 2}'}

    for run, row in zip(store.trials, store.search.rows, strict=True):
        assert run.info.status == "FINISHED"
        times = [int(time.timestamp() * 1000) for time in (row.started, row.ended)]
        assert [run.info.start_time, run.info.end_time] == times
        assert run.data.params == {name: str(value) for name, value in row.parameters.items()}
        assert run.data.tags["mlflow.parentRunId"] == found.info.run_id
    first, infeasible, best = store.trials
    assert first.info.run_name == "L1 c2.0 lr0.003"
    rate = store.search.rows[0].parameters["learning_rate"]
    assert first.data.metrics == {
        "forget_rouge1": 0.25,
        "retain_rouge1": 0.9,
        "deviation_score": pytest.approx(100 * math.hypot(0.25, 0.1)),
        "feasible": 1.0,
        "goal": 0.25,
        "retain_exact": 1.0,
        "seconds": 0.75,
        "log10_learning_rate": math.log10(rate),
        "loss": 1.0,
        "check_forget_rouge1": 0.9,
        "check_retain_rouge1": 0.8,
        "stage_forget_rouge1": 0.25,
        "stage_retain_rouge1": 0.9,
    }
    assert store.curve(first, "loss") == [(1, 2.0), (2, 1.0)]
    assert store.curve(best, "stage_forget_rouge1") == [(0, 1.0), (1, 0.125), (2, 0.125)]
    assert best.data.metrics["full_retain_rouge1"] == 0.8125
    assert infeasible.data.metrics["feasible"] == 0.0
    assert infeasible.data.metrics["goal"] == pytest.approx(1 + 0.3), "nobody forgets less than all"
    assert {"trial": "1", "search": "one"}.items() <= infeasible.data.tags.items()
    path = store.client.download_artifacts(first.info.run_id, "answers.json", str(tmp_path))
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    assert table["columns"] == ["set", "edge", "question", "truth", "answer", "rouge1"]
    assert table["data"] == [["forget", "A_B", "Où?", "Là", "„x“", 0.0]]
    listed = json.loads(first.data.tags["mlflow.loggedArtifacts"])
    assert listed == [{"path": "answers.json", "type": "table"}]
    where = f"dataset.digest = '{'f' * 36}' and tags.`mlflow.parentRunId` = '{info.run_id}'"
    assert len(store.client.search_runs([info.experiment_id], where)) == len(SCORES)


def test_failed_trials_and_long_curves_and_estimates_are_told(store: Store, tmp_path: Path) -> None:
    study = begun_study(Folder(tmp_path / "n"))
    losses = [float(n) for n in range(1500, 0, -1)]  # more than MLflow takes at once
    worked = trial_result(0.5, 0.5, retain_rows=16, losses=tuple(losses))
    complete(study, study.ask()[0], worked)
    study.fail(study.ask()[0], "the loss became NaN" * 1000, deterministic=True)
    study.ask()
    search = dataclasses.replace(store.search, study=study.stored)
    search = with_notes(search, mlflow=store.search.study.notes["mlflow"])
    sync(search, store.client, status="RUNNING")

    (parent,) = store.parents
    assert (parent.info.status, "feasible" in parent.data.metrics) == ("RUNNING", False)
    estimated, failed = store.trials  # the third still runs
    assert store.curve(estimated, "loss") == [(n, 1501.0 - n) for n in range(1, 1501)]
    told = [estimated.data.metrics[name] for name in ("retain_exact", "retain_rows")]
    assert told == [0.0, 16.0]
    assert failed.info.status == "FAILED"
    assert failed.data.tags["failure"].startswith("the loss became NaN")

    sync(search, store.client)
    (parent,) = store.parents
    assert (parent.info.status, parent.data.metrics["feasible"]) == ("KILLED", 0.0)


# Views of it


def listed_by(store: Store, view: View) -> list[str]:
    tags = store.client.get_experiment(view.experiment).tags
    state = json.loads(json.loads(tags[f"mlflow.sharedViewState.{view.key}"])["state"])
    order = "attributes.start_time DESC"
    if "orderByKey" in state:
        order = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
    runs = store.client.search_runs([view.experiment], state["searchFilter"], order_by=[order])
    return [run.info.run_id for run in runs]


def test_views_list_the_trials_of_searches_best_first(store: Store) -> None:
    """Of all that is feasible, the order is that of the scores; failed trials come last."""
    notes, found, trials = store.search.study.notes, [], []
    about = {"description": notes["description"], "status": "FINISHED"}
    for name in "ab":
        place = {**notes["mlflow"], "id": name, "experiment": "of views"}
        search = search_of(8, seed=ord(name), folder=Path("x") / name, mlflow=place, **about)
        sync(search, store.client)
        found.append(shown(store.client, search))
        ended = (row for row in search.rows if row.scores)
        trials += list(zip(ended, found[-1].trials, strict=True))
    feasible = [one for one in trials if one[0].feasible]
    feasible.sort(key=lambda one: one[0].scores["forget_rouge1"])
    infeasible = [one for one in trials if not one[0].feasible]
    infeasible.sort(key=lambda one: -one[0].scores["retain_rouge1"])
    expected = [run.info.run_id for _, run in feasible + infeasible]

    views = keep_views(store.client, found)
    assert [view.name for view in views] == [
        *("charts of a, b", "trials of a, b", "all trials", "all searches"),
    ]
    assert listed_by(store, views[0]) == expected
    everything = listed_by(store, views[2])
    assert everything[: len(expected)] == expected
    assert len(everything) == 16, "the failed ones too"
    assert {*listed_by(store, views[3])} == {one.parent.info.run_id for one in found}
    of_a = {run.info.run_id for run in found[0].trials}
    listed = listed_by(store, keep_views(store.client, found[:1])[1])
    assert listed[:-1] == [one for one in expected if one in of_a]
    best = store.client.search_runs([views[0].experiment], BEST_FILTER)
    assert {run.info.run_id for run in best} == {
        one.trials[one.search.best.number].info.run_id for one in found if one.search.best
    }
    for view in views:
        address = view.address("https://me.some-company.example:5000/")
        place, _, query = address.partition("?")
        assert place.endswith(f":5000/#/experiments/{view.experiment}/runs")
        assert parse_qs(query)["viewStateShareKey"] == [view.key]
        assert len(address) < 180


# Again, after damage, after an interruption


def test_a_trial_costs_few_calls_however_many_there_are(store: Store) -> None:
    sync(with_rows(store.search, 0), store.client, status="RUNNING")
    for number in range(len(SCORES)):
        client = Watched(store.client)
        sync(with_rows(store.search, number + 1), client, status="RUNNING")
        assert len(client.calls) <= 12
        assert client.calls.count("create_run") == 1
        assert len(store.curve(store.parents[0], "best_feasible")) == number + 1
    client = Watched(store.client)
    sync(store.search, client)
    assert len(client.written) <= 12, "what is left is the search's own run, and which is the best"
    assert [run.data.tags.get("best") for run in store.trials] == [None, None, "true"]
    confirmed = {"number": 0, "scores": {"forget_rouge1": 0.25, "retain_rouge1": 0.9}}
    before = {run.info.run_id for run in store.runs()}
    sync(with_notes(store.search, confirmed=confirmed), store.client)
    assert {run.info.run_id for run in store.runs()} == before, "it goes on with another best"
    assert store.parents[0].data.metrics["best_trial"] == 0.0
    assert [run.data.tags.get("best") for run in store.trials] == ["true", None, None]
    for run in store.trials[:2]:
        store.client.delete_run(run.info.run_id)
    sync(store.search, store.client, trial=1)
    assert [run.data.tags["trial"] for run in store.trials] == ["1", "2"], "0 is not looked at"


def test_one_sync_repairs_what_was_lost_doubled_or_left_half_written(store: Store) -> None:
    sync(store.search, store.client, note=NOTE)
    whole, client = store.said(), store.client

    for run in (*store.parents, store.trials[1]):
        client.delete_run(run.info.run_id)
    sync(store.search, client, note=NOTE)
    assert store.said() == whole, "the search's run and a trial's were deleted"

    experiment = store.trials[0].info.experiment_id
    client.create_run(experiment, tags={**store.trials[0].data.tags, "trial": "7"})
    for run in (*store.parents, store.trials[0]):
        client.create_run(experiment, tags=run.data.tags)
    sync(store.search, client, note=NOTE)
    assert store.said() == whole, "there were second ones, and one of no trial"

    for run in (*store.parents, *store.trials):
        client.update_run(run.info.run_id, status="RUNNING")
        client.set_tag(run.info.run_id, "lunar_tune.digest", "")
        client.set_tag(run.info.run_id, "search", "?")
        client.log_metric(run.info.run_id, "feasible", 0.5)
    sync(store.search, client, note=NOTE)
    assert store.said() == whole, "they were left open, and said something else"
    watched = Watched(client)
    sync(store.search, watched, note=NOTE)
    assert watched.calls
    assert watched.written == []


def test_another_experiment_gets_all_of_it_and_a_users_own_run_is_left_alone(store: Store) -> None:
    parent = sync(store.search, store.client)
    tags = {"mlflow.parentRunId": parent.info.run_id, "trial": "0"}
    own = store.client.create_run(parent.info.experiment_id, tags=tags)
    whole = store.said()
    place = {**store.search.study.notes["mlflow"], "experiment": "my project"}
    sync(with_notes(store.search, mlflow=place), store.client)
    assert len(store.runs("my project")) == len(whole)
    sync(store.search, store.client)
    assert store.said() == whole, "the other experiment is left alone"
    assert store.client.get_run(own.info.run_id).info.lifecycle_stage == "active"
    experiment = store.client.get_experiment_by_name("my project")
    file = Path(store.uri.removeprefix("sqlite:///"))
    assert experiment.artifact_location == (file.parent / "mlartifacts").as_uri()


def test_an_interruption_leaves_whole_runs_and_a_kill_what_one_sync_completes(
    uri: str, finished: SearchResults
) -> None:
    """After a call of each kind, by the search's run or its trial's."""

    def until(store: Store, place: int, end: Callable[[], None]) -> None:
        client = Watched(store.client, lambda call: end() if call == place else None)
        sync(store.search, client, note=NOTE)

    def killed() -> None:
        raise KilledError

    search = with_rows(finished, 1)
    with in_store(uri, search) as store:
        sync(store.search, store.client, note=NOTE)  # the first one makes the experiment as well
    with in_store(uri, search) as store:
        client = Watched(store.client)
        sync(store.search, client, note=NOTE)
        whole, calls = store.said(), client.calls
    for kind in dict.fromkeys(calls):
        with in_store(uri, search) as store:
            with pytest.raises(KeyboardInterrupt):
                until(store, calls.index(kind), lambda: signal.raise_signal(signal.SIGINT))
            for run in store.runs():
                assert run.info.status == "FINISHED"
                assert "lunar_tune.digest" in run.data.tags, f"interrupted after {kind}"
        with in_store(uri, search) as store:
            with pytest.raises(KilledError):
                until(store, len(calls) - 1 - calls[::-1].index(kind), killed)
            sync(store.search, store.client, note=NOTE)
            assert store.said() == whole, f"killed after {kind}"


# The store of a search under way


def test_a_store_that_fails_costs_no_trial_and_the_next_sync_has_all(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It looks at all trials first, and again after a failure."""
    from mlflow import MlflowClient

    retries: list[str | None] = []

    def away(*_: object) -> None:
        retries.append(os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES"))
        raise OSError("http://me:s3cretpw@host: failed\nat length")

    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")  # of the open store
    sync(store.search, store.client)
    tracker, later = Tracker(store.uri, EXPERIMENT, "n"), time.monotonic() + 60
    for _ in range(2):
        store.client.delete_run(store.trials[0].info.run_id)
        assert tracker.search(store.search, status="RUNNING", trial=BEST)
        assert len(store.trials) == len(SCORES)
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "get_experiment_by_name", away)
            assert not tracker.search(store.search, status="RUNNING", trial=BEST)
            assert not tracker.search(store.search), "at the end it is tried in any case"
        assert not tracker.search(store.search, status="RUNNING"), "it is left alone for a while"
        monkeypatch.setattr("time.monotonic", lambda: later)
    assert tracker.search(store.search)
    assert retries == ["1", "0", "1", "0"], "it fails soon, and sooner where that is known"
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("MLflow cannot be written, the work goes on: ")
    assert "cannot be used: http://me:***@host: failed. Mend that" in said
    tags = store.client.get_experiment_by_name(EXPERIMENT).tags
    assert "mlflow.sharedViewState.lunar-tune-trials" in tags, "MLflow's menu of views has lists"


def test_a_store_that_is_slow_is_left_in_time(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(store.uri, EXPERIMENT, "n")
    monkeypatch.setattr("lunar_tune.tracking.sync._PATIENCE", -1.0)
    assert not tracker.search(store.search)
    assert "and the rest waits" in caplog.text
    monkeypatch.undo()
    assert tracker.search(store.search)


def test_a_place_has_an_identity_and_no_password(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    tracker = Tracker(store.uri, "mine", "n")
    assert "MLFLOW_RUN_ID" not in os.environ, "it is no search"
    first = tracker.place(None)
    assert first["uri"] == store.uri
    assert first["origin"]["mlflow.source.type"] == "LOCAL"
    assert first["origin"]["mlflow.source.name"] == "lunar_tune"
    assert first["origin"]["version.torch"] == importlib.metadata.version("torch")
    assert tracker.place({**first, "uri": "http://other", "experiment": "x"}) == first
    assert tracker.place(None)["id"] != first["id"]
    tracker.uri = "http://me:s3cretpw@host:5000"
    assert tracker.place(None)["uri"] == "http://me:***@host:5000"


def test_two_processes_can_open_a_new_store_at_once(tmp_path: Path) -> None:
    """Without the lock one of them died in the store's migration."""
    uri = default_tracking_uri(tmp_path)
    code = f"from lunar_tune.tracking.sync import Tracker; Tracker({uri!r}, 'x', 'x')"
    both = [start([sys.executable, "-c", code], cwd=tmp_path) for _ in range(2)]
    assert [(done.returncode, done.stderr) for done in map(finish, both)] == [(0, "")] * 2
    with opened_store(uri) as client:
        assert client.get_experiment_by_name("x") is not None


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


# On a server as in a file: runs, views, and versions of registered models


@pytest.fixture(params=["uri", "server"])
def search(request: pytest.FixtureRequest, tmp_path: Path) -> SearchResults:
    """Return a search that is mirrored in a file, or on a server."""
    place = request.getfixturevalue(request.param)
    return SearchResults.read(make_search(tmp_path, "one", place).path)


def test_a_server_has_what_a_file_has_and_no_more_is_written(
    uri: str, server: str, finished: SearchResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for place in (uri, server):
        with in_store(place, finished) as store, monkeypatch.context() as patch:
            sync(store.search, store.client, note=NOTE)
            said.append(store.said())
            patch.setattr(type(store.client), "set_tag", None)
            sync(store.search, store.client, note=NOTE)
    assert said[0] == said[1]


def test_searches_on_a_server_are_compared_there(server: str, tmp_path: Path) -> None:
    """Nothing is started: the command prints addresses and is over."""
    folders = [
        make_search(tmp_path, name, server, mirrored=name == "two") for name in ("one", "two")
    ]
    with FileLock(folders[0].lock):  # the search still runs, and writes its runs itself
        result = without_ray(COMPARE, folders[0].path, "--tracking-uri", server)
    assert result.exit_code == 2
    assert f"one: {server} does not have its runs" in result.stderr
    result = without_ray(COMPARE, *(one.path for one in folders), "--tracking-uri", server)
    assert result.exit_code == 0, result.output
    pages = dict(re.findall(r"^(.+): (http\S+)$", result.stdout, flags=re.MULTILINE))
    assert list(pages) == ["charts of one, two", "trials of one, two", "all trials", "all searches"]
    assert all(page.startswith(f"{server}/#/experiments/") for page in pages.values())


def test_each_registration_is_a_version_the_alias_is_the_best(
    search: SearchResults, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    (exported / "part").mkdir(parents=True)
    (exported / "adapter.bin").write_bytes(b"weights")
    (exported / "part" / "config.json").write_text("{}")
    name = f"forgets {tmp_path.name}"

    def registered(number: int) -> int:
        row = search.trial(number)
        facts: dict[str, Any] = {"row": row, "scores": row.scores, "form": "adapter"}
        facts["tracking_uri"] = search.study.notes["mlflow"]["uri"]
        return register_model(search, exported, name, **facts)

    assert registered(BEST) == 1
    (exported / "adapter.bin").write_bytes(b"other weights")
    assert registered(BEST) == 2
    assert registered(0) == 3
    with opened_store(search.study.notes["mlflow"]["uri"]) as client:
        best = client.get_model_version_by_alias(name, "best")
        other = client.get_model_version(name, "3")
        uris = [client.get_model_version_download_uri(name, n) for n in ("1", "2")]
        places = [uri[uri.rindex("model/trial-") :] for uri in uris]
        first, second = (
            Path(client.download_artifacts(best.run_id, place, str(tmp_path))) for place in places
        )
        assert "lunar_tune.search" in client.get_run(best.run_id).data.tags
        client.delete_run(best.run_id)
        found = client.get_model_version(name, str(registered(BEST)))
        assert found.run_id != best.run_id, "a search that has lost its run gets it again"

    assert int(best.version) == 2
    assert all(re.fullmatch(rf"model/trial-{BEST}-adapter-[0-9a-f]{{8}}", one) for one in places)
    told = {"search": "one", "trial": str(BEST), "model": "tiny", "forget_edge": "A_B"}
    told |= {"layer": str(search.trial(BEST).parameters["layer"]), "on_held_out": "false"}
    told |= {"forget_rouge1": "0.125", "retain_rouge1": "0.85", "feasible": "true"}
    assert told.items() <= best.tags.items()
    assert (first / "adapter.bin").read_bytes() == b"weights"
    assert (second / "adapter.bin").read_bytes() == b"other weights"
    assert (second / "part" / "config.json").read_text() == "{}"
    assert other.tags["trial"] == "0"
    assert (other.tags["feasible"], other.tags["retain_exact"]) == ("true", "true")
    assert other.tags["forget_rouge1"] == f"{SCORES[0][0]:.6g}"


def test_a_name_that_the_registry_does_not_take_is_said_beforehand(store: Store) -> None:
    check_registrable(store.search, "forgets")
    for name in ("", " ", "a/b", "a:b", "a'b", ".."):
        with pytest.raises(InputError, match="--register"):
            check_registrable(store.search, name)
    with pytest.raises(InputError, match="2 things are wrong") as caught:
        check_registrable(store.search, "a/b", tracking_uri="http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in str(caught.value)
