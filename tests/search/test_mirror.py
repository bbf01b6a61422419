"""Where MLflow has a search: from the study's note, or why it cannot be said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import Folder
from lunar_tune.study.study import StoredStudy
from lunar_tune.tracking.mirror import Mirror, find_mirror, opened_store
from lunar_tune.tracking.store import default_tracking_uri


def search_in(folder: Path, uri: str | None) -> SearchResults:
    """Return a search without trials that notes a store."""
    notes: dict[str, Any] = {}
    if uri is not None:
        notes["mlflow"] = {"uri": uri, "experiment_id": "1", "run_id": "r"}
    goal = Goal.read("forget_rouge1", ("retain_rouge1>=0.8",))
    study = StoredStudy(rows=(), notes=notes, goal=goal)
    return SearchResults(folder=Folder(folder / "one"), study=study, goal=goal)


def test_a_server_is_found_where_it_was(tmp_path: Path) -> None:
    mirror = find_mirror(search_in(tmp_path, "http://host:5000"))
    assert (mirror.uri, mirror.experiment_id, mirror.run_id) == ("http://host:5000", "1", "r")


def test_a_store_that_was_moved_with_its_search_is_found_beside_it(tmp_path: Path) -> None:
    results = search_in(tmp_path, "sqlite:////no/such/folder/mlflow.db")
    (tmp_path / "mlflow.db").touch()
    assert find_mirror(results).uri == default_tracking_uri(tmp_path)


def test_an_address_that_is_given_wins(tmp_path: Path) -> None:
    results = search_in(tmp_path, "sqlite:////no/such/folder/mlflow.db")
    assert find_mirror(results, "http://host:1").uri == "http://host:1"


def test_a_password_is_taken_from_the_environment_if_the_rest_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = search_in(tmp_path, "http://me:***@host:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    assert find_mirror(results).uri == "http://me:secret@host:5000"
    assert find_mirror(results, "http://me:***@host:5000").uri == "http://me:secret@host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@other:5000")
    with pytest.raises(InputError, match="wants a password"):
        find_mirror(results)


def run_of(status: str, failure: str | None = None) -> SimpleNamespace:
    """Return what a test needs of MLflow's run."""
    tags = {} if failure is None else {"failure": failure}
    return SimpleNamespace(info=SimpleNamespace(status=status), data=SimpleNamespace(tags=tags))


@pytest.mark.parametrize(
    ("status", "trials", "said"),
    [
        ("RUNNING", [], "one: MLflow has no trial with scores yet."),
        (
            "RUNNING",
            [run_of("FAILED", "diverged"), run_of("RUNNING")],
            "one: MLflow has no trial with scores yet; 1 of 2 trials failed, most often with: "
            "diverged.",
        ),
        (
            "FINISHED",
            [run_of("FAILED", "x"), *[run_of("FAILED", "the loss is NaN.\nTraceback")] * 2],
            "one: there is nothing to compare: all 3 trials failed, most often with: the loss is "
            "NaN. search.log in its folder says more, and --static FILE writes a page without "
            "MLflow.",
        ),
        (
            "KILLED",
            [run_of("KILLED")],
            "one: there is nothing to compare: no trial was completed. search.log in its folder "
            "says more, and --static FILE writes a page without MLflow.",
        ),
    ],
)
def test_a_search_without_scores_says_whether_they_may_still_come(
    status: str, trials: list[Any], said: str
) -> None:
    class Runs(list[Any]):
        token = None

    client: Any = SimpleNamespace(
        get_run=lambda _: run_of(status), search_runs=lambda *_, **__: Runs(trials)
    )
    with pytest.raises(InputError) as caught:
        Mirror(search="one", uri="http://host:1", experiment_id="1", run_id="r").trials(client)
    assert str(caught.value) == said


def test_a_mistyped_file_is_refused_and_not_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mflow.db'}"
    with pytest.raises(InputError, match="there is no such file") as caught:
        find_mirror(search_in(tmp_path, "http://host:5000"), uri)
    assert uri in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_does_not_answer_is_no_store_that_lost_its_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = find_mirror(search_in(tmp_path, "http://127.0.0.1:9"))
    with (
        pytest.raises(InputError, match=r"http://127\.0\.0\.1:9 cannot be used") as caught,
        opened_store(mirror.uri) as client,
    ):
        mirror.trials(client)
    assert "has no run" not in str(caught.value)
    assert caplog.text == "", "it is told once"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (None, "does not say where its MLflow runs are"),
        ("sqlite:////no/such/folder/mlflow.db", "is gone; name it with --tracking-uri"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_do(
    tmp_path: Path, uri: str | None, said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        find_mirror(search_in(tmp_path, uri))
    assert "--static FILE" in str(caught.value)
