"""Folders that were copied, renamed, moved or changed: what is written of them, and refused."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file, save_file
from shared_searches import TRIALS, SharedSearch
from torch import randn_like
from tracked_searches import SCORES, make_search

import lunar_tune as lt
from lunar_tune.config.options import EXPERIMENT
from lunar_tune.errors import InputError
from lunar_tune.report.findings import Findings
from lunar_tune.report.results import SearchResults, short_report
from lunar_tune.study.folder import Folder
from lunar_tune.tracking.address import default_tracking_uri
from lunar_tune.tracking.places import FOLDER, Place, other_owner
from lunar_tune.tracking.runs import trial_content
from lunar_tune.tracking.store import opened_store
from lunar_tune.tracking.sync import Tracker

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's
ALL = len(SCORES) + 1  # runs of a search
URI = "http://127.0.0.1:9"


def write(folder: Path) -> None:
    """Write a search's runs as a search that goes on does, with an artifact that is new."""
    (folder / "report.md").write_text(str(folder))
    tracker = Tracker(default_tracking_uri(folder.parent), EXPERIMENT, "x")
    assert tracker.search(SearchResults.read(folder))


def runs_in(output: Path) -> list[dict[str, Any]]:
    """Return all that a store says of its active runs, read without the code under test."""
    with opened_store(default_tracking_uri(output)) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        return [run.to_dictionary() for run in client.search_runs([experiment.experiment_id])]


def counted(output: Path) -> dict[str, int]:
    """Return how many runs a store has by name of the search, which has one of its own among them.

    All artifacts lie beside the store, the search's report among them.
    """
    runs = runs_in(output)
    names = Counter(run["data"]["tags"]["search"] for run in runs)
    parents = [run for run in runs if "mlflow.parentRunId" not in run["data"]["tags"]]
    assert Counter(run["info"]["run_name"] for run in parents) == dict.fromkeys(names, 1)
    place = (output / "mlartifacts").resolve().as_uri()
    assert all(run["info"]["artifact_uri"].startswith(f"{place}/") for run in runs)
    for run in parents:
        report = Path(run["info"]["artifact_uri"].removeprefix("file://")) / "report.md"
        assert report.read_bytes() == (output / run["info"]["run_name"] / "report.md").read_bytes()
    return dict(names)


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.rglob(pattern) if one.is_file()}


def test_a_copy_goes_on_with_its_own_trials_and_leaves_its_original_alone(
    finished: SharedSearch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = Path(shutil.copytree(finished.output, tmp_path / "runs"))
    one = output / finished.name
    write(one)
    two = Path(shutil.copytree(one, output / "two"))
    before, runs = files(one, "*"), runs_in(output)

    found = lt.search(resume=two, num_trials=TRIALS + 1, quiet=True)

    assert f"{two} is a copy of {one}, whose runs in MLflow are left alone" in caplog.text
    assert files(one, "*") == before
    assert [
        one for one in runs_in(output) if one["data"]["tags"]["search"] == finished.name
    ] == runs
    assert counted(output) == {finished.name: TRIALS + 1, "two": TRIALS + 2}
    assert [row.number for row in found.rows] == [*range(TRIALS + 1)]
    assert files(one, "trials/0000?.parquet").items() <= files(two, "trials/0000?.parquet").items()
    scorer = RougeScorer(["rouge1"])
    for row in found.rows:
        table = pq.read_table(two / "trials" / f"{row.number:05d}.parquet").to_pylist()
        said = [scorer.score(a["truth"], a["answer"]) for a in table if a["set_name"] == "forget"]
        rouge = sum(one["rouge1"].recall for one in said) / len(said)
        assert row.scores["forget_rouge1"] == pytest.approx(rouge)


def renamed(one: Path) -> None:
    write(one.rename(one.with_name("two")))
    assert counted(one.parent) == {"two": ALL}


def moved_alone(one: Path) -> None:
    write(one.rename(one.parent.with_name("there") / "one"))
    assert counted(one.parent.with_name("there")) == {"one": ALL}


def moved_with_its_store(one: Path) -> None:
    there = one.parent.rename(one.parent.with_name("elsewhere"))
    write(there / "one")
    assert counted(there) == {"one": ALL}
    assert not one.parent.exists()


def copied_with_its_store(one: Path) -> None:
    before = runs_in(one.parent)
    there = Path(shutil.copytree(one.parent, one.parent.with_name("elsewhere")))
    write(there / "one")
    assert counted(there) == {"one": ALL}
    assert runs_in(one.parent) == before


def copied_twice_and_deleted(one: Path) -> None:
    two, three = (Path(shutil.copytree(one, one.with_name(name))) for name in ("two", "three"))
    shutil.rmtree(one)
    for folder in (two, three, two):
        write(folder)
    assert counted(one.parent) == {"two": ALL, "three": ALL}


def copied_twice_in_turn(one: Path) -> None:
    before = runs_in(one.parent)
    two = Path(shutil.copytree(one, one.with_name("two")))
    write(two)
    for folder in (shutil.copytree(two, one.with_name("three")), two):
        write(Path(folder))
    assert [run for run in runs_in(one.parent) if run["data"]["tags"]["search"] == "one"] == before
    assert counted(one.parent) == {"one": ALL, "two": ALL, "three": ALL}


CHANGES = [
    *(renamed, moved_alone, moved_with_its_store),
    *(copied_with_its_store, copied_twice_and_deleted, copied_twice_in_turn),
]


@pytest.mark.parametrize("change", CHANGES)
def test_runs_are_where_the_folder_is_and_no_folder_has_anothers(
    change: Callable[[Path], None], tmp_path: Path, empty_store: Callable[[Path], Path]
) -> None:
    for name in ("runs", "there"):
        (tmp_path / name).mkdir()
        empty_store(tmp_path / name / "mlflow.db")
    change(make_search(tmp_path / "runs", "one").path)


@pytest.mark.parametrize(
    ("there", "owner"),
    [
        ({}, "{}/one"),
        (None, "{}/one"),  # a run without the tag
        ({"path": "{}/gone"}, None),
        ({"path": "{}/two", "machine": "another"}, None),  # the same folder, mounted there
        ({"path": "{}/two", "machine": "another", "number": "0"}, "{}/two on another machine"),
        ({"machine": "another"}, "{}/one on another machine"),
    ],
)
def test_a_server_tells_folders_of_several_machines_apart(
    there: dict[str, str] | None, owner: str | None, tmp_path: Path
) -> None:
    one = make_search(tmp_path, "one", mirrored=False)
    two = Folder(Path(shutil.copytree(one.path, tmp_path / "two")))
    place = Place.of(two.path, URI)._replace(path=str(one.path))
    tags = {"search": "one"}
    if there is not None:
        changes = {name: text.format(tmp_path) for name, text in there.items()}
        tags[FOLDER] = place._replace(**changes).tag
    run: Any = SimpleNamespace(data=SimpleNamespace(tags=tags))
    expected = owner and owner.format(tmp_path)
    assert other_owner(run, two, "id-of-one", URI) == expected


def test_a_journal_with_two_studies_is_refused(tmp_path: Path) -> None:
    """As an earlier version left it that was told to go on with a renamed folder."""
    folder = make_search(tmp_path, "one", mirrored=False)
    storage = JournalStorage(JournalFileBackend(str(folder.journal)))
    optuna.create_study(storage=storage, study_name="two")
    with pytest.raises(InputError, match="more than one study, and a search is one"):
        SearchResults.read(folder.path)


def test_weights_that_changed_are_refused_by_all_that_would_run_a_trial(
    held_out: SharedSearch, tmp_path: Path
) -> None:
    """Two per cent of noise: the scores alone do not tell."""
    folder = held_out.copied(tmp_path)
    model = Path(shutil.copytree(held_out.place / "model", tmp_path / "model"))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(held_out.place / "model"), str(model)))
    tensors = load_file(model / "model.safetensors")
    noisy = {name: one + 0.02 * one.std() * randn_like(one) for name, one in tensors.items()}
    save_file(noisy, model / "model.safetensors", metadata={"format": "pt"})
    search = lt.load(folder)
    before = search.rows
    for attempt in (
        lambda: lt.search(resume=folder, num_trials=len(before) + 1, quiet=True),
        lambda: search.ask("Who?"),
        lambda: search.export(tmp_path / "exported", quiet=True),
    ):
        with pytest.raises(InputError) as caught:
            attempt()
        assert str(caught.value).startswith(f"model {model}: its weights changed since the search")
    assert lt.load(folder).rows == before
    assert lt.load(folder).confirmed == search.confirmed


@pytest.mark.parametrize("place", ["00000", "00000-full", "baseline", "baseline-full"])
def test_a_file_of_answers_that_is_anothers_is_named_and_not_shown(
    place: str, held_out: SharedSearch, tmp_path: Path
) -> None:
    folder = held_out.copied(tmp_path)
    path, other = (folder / "trials" / f"{name}.parquet" for name in (place, "00002"))
    path.write_bytes(other.read_bytes())
    search = lt.load(folder)
    number, full = None if "base" in place else 0, "full" in place
    with pytest.raises(InputError, match=f"{path}: was changed or exchanged"):
        search.answer_rows(number, full=full)
    said = f"{path} is not the file of the answers that were scored"
    assert said in short_report(search)
    assert not Findings.of(search, search.rows[0]).has_baseline or not full
    assert trial_content(search, search.rows[2], "p").tables
    assert bool(trial_content(search, search.rows[0], "p").tables) is (place != "00000")
    assert short_report(lt.load(held_out.folder)).count("were scored") == 0
