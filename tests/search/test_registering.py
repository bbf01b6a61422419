"""What a tracking server has as a file has it: runs, views, and versions of registered models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import without_ray
from filelock import FileLock
from tracked_searches import BEST, SCORES, in_store, make_search

from lunar_tune.cli.compare import compare as COMMAND
from lunar_tune.errors import InputError
from lunar_tune.report.results import SearchResults
from lunar_tune.tracking.store import default_tracking_uri, opened_store
from lunar_tune.tracking.sync import check_registrable, register_model, sync

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # MLflow's warnings


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, empty_store: Callable[[Path], Path]) -> str:
    output = tmp_path_factory.mktemp("file")
    empty_store(output / "mlflow.db")
    return default_tracking_uri(output)


@pytest.fixture(params=["file", "server"])
def search(request: pytest.FixtureRequest, tmp_path: Path) -> SearchResults:
    """Return a search that is mirrored in a file, or on a server."""
    return SearchResults.read(
        make_search(tmp_path, "one", request.getfixturevalue(request.param)).path
    )


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    (folder / "part").mkdir(parents=True)
    (folder / "adapter.bin").write_bytes(b"weights")
    (folder / "part" / "config.json").write_text("{}")
    return folder


def test_a_server_has_what_a_file_has_and_no_more_is_written(
    file: str, server: str, tmp_path: Path
) -> None:
    search, said = SearchResults.read(make_search(tmp_path, "one", mirrored=False).path), []
    for uri in (file, server):
        with in_store(uri, search) as store:
            sync(store.search, store.client, note="A note.")
            said.append(store.said())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(store.client), "set_tag", None)
                sync(store.search, store.client, note="A note.")
    assert said[0] == said[1]


def test_searches_on_a_server_are_compared_there(server: str, tmp_path: Path) -> None:
    """Nothing is started: the command prints addresses and is over."""
    folders = [
        make_search(tmp_path, name, server, mirrored=name == "two") for name in ("one", "two")
    ]
    with FileLock(folders[0].lock):  # the search still runs, and writes its runs itself
        result = without_ray(COMMAND, folders[0].path)
    assert result.exit_code == 2
    assert f"one: {server} does not have its runs" in result.stderr
    result = without_ray(COMMAND, *(folder.path for folder in folders))
    assert result.exit_code == 0, result.output
    pages = dict(re.findall(r"^(.+): (http\S+)$", result.stdout, flags=re.MULTILINE))
    assert list(pages) == ["charts of one, two", "trials of one, two", "all trials", "all searches"]
    assert all(page.startswith(f"{server}/#/experiments/") for page in pages.values())


def register(search: SearchResults, folder: Path, name: str, number: int = BEST) -> int:
    """Register a trial as its adapter."""
    row = search.trial(number)
    return register_model(search, folder, name, row=row, scores=row.scores, form="adapter")


def test_each_registration_is_a_version_and_the_alias_moves_to_the_best(
    search: SearchResults, exported: Path, tmp_path: Path
) -> None:
    name = f"forgets {tmp_path.name}"
    assert register(search, exported, name) == 1
    (exported / "adapter.bin").write_bytes(b"other weights")
    assert register(search, exported, name) == 2
    assert register(search, exported, name, number=0) == 3
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
        found = client.get_model_version(name, str(register(search, exported, name)))
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


def test_a_name_that_the_registry_does_not_take_is_said_beforehand(
    file: str, tmp_path: Path
) -> None:
    search = SearchResults.read(make_search(tmp_path, "one", file, mirrored=False).path)
    check_registrable(search, "forgets")
    for name in ("", " ", "a/b", "a:b", "a'b", ".."):
        with pytest.raises(InputError, match="--register"):
            check_registrable(search, name)
    with pytest.raises(InputError, match="2 things are wrong") as caught:
        check_registrable(search, "a/b", tracking_uri="http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in str(caught.value)
