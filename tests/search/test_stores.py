"""What a store cannot do is found before the work, by a dry run too; where a store is."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import chdir, closing
from pathlib import Path

import pytest
from command_lines import refused, small_options, succeeded, without_ray
from made_once import copy_store

from lunar_tune.cli.compare import compare as COMPARE
from lunar_tune.cli.search import search as COMMAND
from lunar_tune.config.options import EXPERIMENT, SearchConfig
from lunar_tune.errors import InputError
from lunar_tune.tracking.address import default_tracking_uri, kept_uri, sqlite_file
from lunar_tune.tracking.artifacts import check_addresses
from lunar_tune.tracking.store import find_experiment, look_at, open_experiment, opened_store
from lunar_tune.tracking.sync import Tracker
from lunar_tune.tracking.ui import served

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's
ODD = "a b%41?c#d;é'\":e"
OLDER = "451aebb31d03"  # MLflow 1.0's first migration
DATABASES = {
    "older": (f"update alembic_version set version_num = '{OLDER}'", "mlflow db upgrade sqlite:"),
    "newer": ("update alembic_version set version_num = 'ffffffffffff'", "of a newer MLflow than"),
    "another program's": ("drop table experiments", "of another program"),
}


@pytest.mark.parametrize("kind", DATABASES)
def test_a_database_of_another_version_or_program_is_left_as_it_is(
    kind: str, tmp_path: Path, empty_store: Callable[[Path], Path]
) -> None:
    """MLflow 3.17 makes 40 tables in what is another program's, and migrates an older one."""
    change, said = DATABASES[kind]
    file = empty_store(tmp_path / f"{kind}.db")
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("pragma foreign_keys = off")
        database.execute(change)
        if kind != "newer":
            database.execute("drop table spans")
        if kind == "another program's":
            database.execute("delete from alembic_version")
    before = file.read_bytes()
    uri = f"sqlite:///{file}".replace(" ", "%20").replace("'", "%27")
    for opening in (lambda: look_at(uri, "x"), lambda: Tracker(uri, "x", "x")):
        with pytest.raises(InputError, match=said):
            opening()
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nosuchscheme://me:s3cretpw@x", "unsupported URI 'nosuchscheme://me:***@x'"),
        ("http://me:s3cretpw@127.0.0.1:9", "Connection refused"),  # the discard port
        ("http://s3cretpw@127.0.0.1:9", "store http://***@127.0.0.1:9 cannot be used"),
        ("postgresql://me:s3cretpw@127.0.0.1:9/db", "pip install 'psycopg[binary]'"),
        ("sqlite:///{}/folder", "unable to open database file"),
        ("sqlite:///{}/text", "file is not a database"),
        ("http://me:***@127.0.0.1:9", "needs a password, which is not kept"),
    ],
)
def test_a_store_that_cannot_be_opened_is_an_input_error(
    uri: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retries that the user has set are left alone; MLflow would ask 7 times, a database 10."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no database" * 1000)
    with pytest.raises(InputError) as caught:
        Tracker(uri.format(tmp_path), EXPERIMENT, "x")
    assert said in str(caught.value)
    assert "--tracking-uri" in str(caught.value)
    assert "s3cretpw" not in str(caught.value)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    if "***" not in uri:
        with pytest.raises(InputError) as dry:
            look_at(uri.format(tmp_path), EXPERIMENT)
        assert str(dry.value) == str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        *("sqlite://", "sqlite:///:memory:", "sqlite:///a.db?mode=ro", "sqlite://a/b"),
        *("SQLITE:///a", "mlruns", "/tmp/x", "file:///tmp/x", "http://:5000", "http://host:x"),
    ],
)
def test_an_address_that_keeps_no_runs_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="must be an MLflow server"):
        SearchConfig(tracking_uri=uri).check()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, empty_store: Callable[[Path], Path]) -> str:
    output = tmp_path_factory.mktemp("runs")
    empty_store(output / "mlflow.db")
    return default_tracking_uri(output)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("nosuchscheme://x", "registered artifact repository"),
        ("s3://bucket/x", "pip install boto3"),
        ("gs://bucket/x", "pip install google-cloud-storage"),
        ("ftp://me:s3cretpw@127.0.0.1:9/x", "Connection refused"),
        ("file://{}/file/x", "ot a "),  # not a directory, not a folder
    ],
)
def test_artifacts_that_cannot_be_written_are_an_input_error(
    uri: str, location: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    name, location = f"at {tmp_path.name}", location.format(tmp_path)
    with opened_store(uri) as client:
        client.create_experiment(name, artifact_location=location)
    for opening in (lambda: Tracker(uri, name, "x"), lambda: look_at(uri, name)):
        with pytest.raises(InputError, match=said) as caught:
            opening()
        shown = location.replace("s3cretpw", "***")
        assert f"experiment {name}: its artifacts lie in {shown}" in str(caught.value)


def test_a_deleted_experiment_says_how_to_restore_it_and_nothing_tried_is_left(uri: str) -> None:
    with opened_store(uri) as client:
        experiment = open_experiment(client, "deleted")
        client.delete_experiment(experiment.experiment_id)
    folder = Path(experiment.artifact_location.removeprefix("file://"))
    assert list(folder.glob("*.txt")) == []
    said = f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {experiment.experiment_id}"
    for opening in (lambda: Tracker(uri, "deleted", "x"), lambda: look_at(uri, "deleted")):
        with pytest.raises(InputError, match=said):
            opening()


@pytest.mark.parametrize(
    "address",
    [
        "http://evil/x",
        " http://evil/x",
        "HTTPS://evil/x",
        "ht\ttp:/evil",
        "mlflow-artifacts://evil",
    ],
)
@pytest.mark.parametrize("kept", ["experiments set artifact_location", "runs set artifact_uri"])
def test_a_store_in_a_file_names_no_server_that_is_sent_the_token(
    uri: str, tmp_path: Path, address: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cret")
    monkeypatch.setattr("requests.Session.request", None)
    file = copy_store(sqlite_file(uri), tmp_path / "mlflow.db")
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("insert into runs (run_uuid, experiment_id) values ('x', 0)")
        database.execute(f"update {kept} = ?", (address,))
    with pytest.raises(InputError, match=f"artifacts lie at {address}, a server that"):
        Tracker(default_tracking_uri(tmp_path), EXPERIMENT, "x")


def test_a_link_in_place_of_the_artifacts_is_refused(uri: str, tmp_path: Path) -> None:
    copy_store(sqlite_file(uri), tmp_path / "mlflow.db")
    (tmp_path / "home").mkdir()
    (tmp_path / "mlartifacts").symlink_to(tmp_path / "home")
    linked = default_tracking_uri(tmp_path)
    for opening in (lambda: Tracker(linked, EXPERIMENT, "x"), lambda: served(linked).__enter__()):
        with pytest.raises(InputError, match="mlartifacts: is a link"):
            opening()
    assert list((tmp_path / "home").iterdir()) == []


def test_a_store_that_cannot_be_looked_into_is_not_taken_for_harmless(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copy_store(sqlite_file(uri), tmp_path / "mlflow.db")
    connect = sqlite3.connect
    monkeypatch.setattr("sqlite3.connect", lambda path: connect(path, timeout=0))
    with closing(connect(file)) as database:
        database.execute("begin exclusive")
        with pytest.raises(InputError, match="cannot be used: database is locked"):
            check_addresses(default_tracking_uri(tmp_path))


def test_the_experiment_that_mlflows_number_names_is_taken(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened_store(uri) as client:
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", find_experiment(client, "mine").experiment_id)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    assert Tracker(uri, EXPERIMENT, "x").experiment == "mine"
    assert look_at(uri, EXPERIMENT).endswith("experiment mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    assert Tracker(uri, EXPERIMENT, "x").experiment == EXPERIMENT
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "12345")
    with pytest.raises(InputError, match="MLFLOW_EXPERIMENT_ID 12345: "):
        Tracker(uri, EXPERIMENT, "x")


# Where it is


@pytest.mark.parametrize("name", ["plain", ODD, "50%", "a+b&c=d", "[x]{y}", "日本"])
def test_the_file_of_an_address_is_the_one_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    uri = default_tracking_uri(tmp_path / name)
    assert sqlite_file(uri) == tmp_path / name / "mlflow.db"
    assert kept_uri(uri) == uri


def test_whatever_signs_a_folder_has_all_of_a_search_lies_in_it(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a path `?` would end an address, `%41` be an A, `#` begin a fragment."""
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / ODD / "cache"))
    model, place = small[small.index("--model") + 1], tmp_path / ODD
    place.mkdir()
    options = [*small_options(Path(model), place), "--in-process", "--name", ODD, "--force"]
    with chdir(place):
        succeeded(COMMAND, *options, "--constrain", "retain_rouge1>=0", "--num-trials", 1)
    more, own = ("--num-trials", 2, "--force"), {"MLFLOW_TRACKING_URI": "file:///others/mlruns"}
    resumed = without_ray(COMMAND, "--resume", place / "runs" / ODD, *more, **own)
    assert resumed.exit_code == 0, resumed.output
    assert "MLFLOW_TRACKING_URI is not heeded" in resumed.output
    succeeded(COMPARE, place / "runs" / ODD, "--save", place / "page?.html")
    assert [one.name for one in tmp_path.iterdir()] == [ODD]
    with opened_store(default_tracking_uri(place / "runs")) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3
    tables = place.glob("runs/mlartifacts/*/artifacts/answers.json")
    assert len(list(tables)) == 2, "beside the database"


def test_the_address_in_the_environment_is_taken_and_said(small: list[str], tmp_path: Path) -> None:
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/other.db"}
    dry = ("--in-process", "--dry-run", "--output", tmp_path / "runs")
    planned = succeeded(COMMAND, *small, *dry, **store)
    assert f"{tmp_path}/other.db, to be created (MLFLOW_TRACKING_URI)" in planned
    given = ("--tracking-uri", f"sqlite:///{tmp_path}/given.db")
    assert "MLFLOW" not in succeeded(COMMAND, *small, *dry, *given, **store)
    assert "MLFLOW_TRACKING_URI=mlruns is set in the environment" in refused(
        COMMAND, *small, *dry, MLFLOW_TRACKING_URI="mlruns"
    )
