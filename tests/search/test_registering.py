"""The winner as a version of a registered model, in a file's registry and on a server's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tracked_searches import BEST, make_search
from tracking_server import tracking_server

from lunar_tune.errors import InputError
from lunar_tune.search.folder import Folder
from lunar_tune.search.registering import register_model
from lunar_tune.search.results import load_search
from lunar_tune.search.study import StoredStudy
from lunar_tune.search.tracking_store import default_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow and SQLAlchemy leave a store's connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@dataclass(frozen=True)
class Registry:
    """A search and the store that it is mirrored in."""

    search: Folder
    uri: str

    @property
    def client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(self.uri, registry_uri=self.uri)


@pytest.fixture(scope="module", params=["sqlite", "server"])
def registry(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    output = tmp_path_factory.mktemp("runs")
    if request.param == "sqlite":
        yield Registry(make_search(output, "one"), default_tracking_uri(output))
        return
    with tracking_server(tmp_path_factory.mktemp("server")) as address:
        yield Registry(make_search(output, "one", address), address)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    (folder / "part").mkdir(parents=True)
    (folder / "adapter.bin").write_bytes(b"weights")
    (folder / "part" / "config.json").write_text("{}")
    return folder


def test_each_registration_is_a_new_version_and_the_alias_moves_to_it(
    registry: Registry, exported: Path, tmp_path: Path
) -> None:
    results = load_search(registry.search.path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        versions = [register_model(results, exported, "forgets") for _ in range(2)]
        assert versions == [1, 2]
        version = registry.client.get_model_version_by_alias("forgets", "best")
        uri = registry.client.get_model_version_download_uri("forgets", "2")
        place = registry.client.download_artifacts(version.run_id, "model", str(tmp_path))

    assert int(version.version) == 2
    assert version.run_id == results.study.notes["mlflow"]["run_id"]
    assert uri.endswith("/model")
    row = results.trial(BEST)
    assert {
        "search": "one",
        "trial": str(BEST),
        "model": "tiny",
        "forget_edge": "A_B",
        "layer": str(row.parameters["layer"]),
        "learning_rate": repr(row.parameters["learning_rate"]),
        "forget_rouge1": "0.125",
        "retain_rouge1": "0.85",
    }.items() <= version.tags.items()
    assert (Path(place) / "adapter.bin").read_bytes() == b"weights"
    assert (Path(place) / "part" / "config.json").read_text() == "{}"


def test_what_cannot_be_registered_is_said(registry: Registry, tmp_path: Path) -> None:
    results = load_search(registry.search.path)
    with pytest.raises(InputError, match="there is nothing to register"):
        register_model(results, tmp_path / "nothing", "forgets")
    with pytest.raises(InputError, match="--register is empty"):
        register_model(results, registry.search.path, " ")


def test_a_search_that_has_lost_its_run_cannot_register(registry: Registry, exported: Path) -> None:
    results = load_search(registry.search.path)
    notes = results.study.notes
    lost = {**notes, "mlflow": {**notes["mlflow"], "run_id": "0" * 32}}
    study = StoredStudy(rows=results.rows, notes=lost, goal=results.goal)
    moved = type(results)(folder=results.folder, study=study, goal=results.goal)
    with pytest.raises(InputError, match="0" * 32):
        register_model(moved, exported, "forgets")
