"""The winner as a version of a registered model, in a file's registry and on a server's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tracked_searches import BEST, SCORES, make_search
from tracking_server import tracking_server

from lunar_tune.errors import InputError
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import Folder
from lunar_tune.tracking.store import default_tracking_uri
from lunar_tune.tracking.sync import check_registrable, register_model

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
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    empty_store: Callable[[Path], Path],
) -> Iterator[Registry]:
    output = tmp_path_factory.mktemp("runs")
    if request.param == "sqlite":
        empty_store(output / "mlflow.db")
        yield Registry(make_search(output, "one"), default_tracking_uri(output))
        return
    empty_store(output / "server" / "server.db")
    with tracking_server(output / "server") as address:
        yield Registry(make_search(output, "one", address), address)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    (folder / "part").mkdir(parents=True)
    (folder / "adapter.bin").write_bytes(b"weights")
    (folder / "part" / "config.json").write_text("{}")
    return folder


def register(results: SearchResults, folder: Path, name: str, number: int = BEST) -> int:
    """Register a trial as its adapter."""
    row = results.trial(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return register_model(results, folder, name, row=row, scores=row.scores, form="adapter")


def test_each_registration_is_a_new_version_and_the_alias_moves_to_it(
    registry: Registry, exported: Path, tmp_path: Path
) -> None:
    results = SearchResults.read(registry.search.path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert register(results, exported, "forgets") == 1
        (exported / "adapter.bin").write_bytes(b"other weights")
        assert register(results, exported, "forgets") == 2
        version = registry.client.get_model_version_by_alias("forgets", "best")
        uris = [registry.client.get_model_version_download_uri("forgets", n) for n in ("1", "2")]
        places = [uri[uri.rindex("model/trial-") :] for uri in uris]
        first, second = (
            Path(registry.client.download_artifacts(version.run_id, place, str(tmp_path)))
            for place in places
        )

    assert int(version.version) == 2
    assert "lunar_tune.search" in registry.client.get_run(version.run_id).data.tags
    assert all(re.fullmatch(rf"model/trial-{BEST}-adapter-[0-9a-f]{{8}}", one) for one in places)
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
        "feasible": "true",
        "on_held_out": "false",
    }.items() <= version.tags.items()
    assert (first / "adapter.bin").read_bytes() == b"weights"
    assert (second / "adapter.bin").read_bytes() == b"other weights"
    assert (second / "part" / "config.json").read_text() == "{}"


def test_another_trial_is_registered_as_itself_and_is_not_called_best(
    registry: Registry, exported: Path
) -> None:
    results = SearchResults.read(registry.search.path)
    assert register(results, exported, "of-trials") == 1
    assert register(results, exported, "of-trials", number=0) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = registry.client.get_model_version("of-trials", "2")
        best = registry.client.get_model_version_by_alias("of-trials", "best")
    assert other.tags["trial"] == "0"
    assert (other.tags["feasible"], other.tags["retain_exact"]) == ("true", "true")
    assert other.tags["forget_rouge1"] == f"{SCORES[0][0]:.6g}"
    assert int(best.version) == 1


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "a'b", ".."])
def test_a_name_that_the_registry_does_not_take_is_said_beforehand(
    registry: Registry, name: str
) -> None:
    results = SearchResults.read(registry.search.path)
    check_registrable(results, "forgets")
    with pytest.raises(InputError, match="--register"):
        check_registrable(results, name)


def test_a_store_that_cannot_be_reached_is_said_beforehand_with_a_wrong_name(
    registry: Registry,
) -> None:
    results = SearchResults.read(registry.search.path)
    with pytest.raises(InputError, match="2 things are wrong") as caught:
        check_registrable(results, "a/b", tracking_uri="http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in str(caught.value)


def test_a_search_that_has_lost_its_run_gets_it_again(registry: Registry, exported: Path) -> None:
    results = SearchResults.read(registry.search.path)
    first = register(results, exported, "lost")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lost = registry.client.get_model_version("lost", str(first)).run_id
        registry.client.delete_run(lost)
        second = register(results, exported, "lost")
        assert registry.client.get_model_version("lost", str(second)).run_id != lost
