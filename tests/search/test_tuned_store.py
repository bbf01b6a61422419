"""Tuned settings on disk: kept, listed, replaced by better ones, and refused where a file is wrong.

Covers: the files, the folders and which of two wins, writers at the same time.
Does not cover: a search's folder (`tests/commands/test_tuned_command.py`), using them
(`test_starting_points`).
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from tuned import DIGESTS, tuned_setting

from lunar_tune import paths
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.search.space.space import load_space
from lunar_tune.search.tuned import tuned_store
from lunar_tune.search.tuned.tuned_settings import read_tuned
from lunar_tune.search.tuned.tuned_store import (
    file_name,
    keep_setting,
    kept_settings,
    tuned_settings,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUNAR_TUNE_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tuned"


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return the shipped folder of a checkout and the user's own."""
    monkeypatch.delenv("LUNAR_TUNE_TUNED")
    monkeypatch.setenv("LUNAR_TUNE_DATA", str(tmp_path / "data"))
    (tmp_path / "spaces").mkdir()
    monkeypatch.setattr(paths, "search_spaces_dir", lambda: tmp_path / "spaces")
    return tmp_path / "spaces/tuned", tmp_path / "data/tuned"


def test_what_is_kept_comes_back_as_it_was(folder: Path) -> None:
    setting = tuned_setting()
    path = keep_setting("owner/model", setting)
    (kept,) = kept_settings()

    assert (kept.model, kept.setting, kept.file) == ("owner/model", setting, path)
    assert tuned_settings("owner/model") == [setting]
    assert tuned_settings("owner-model") == []
    assert path.parent == folder
    assert [one.name for one in folder.iterdir()] == [path.name], "nothing else lies there"
    assert kept.setting.provenance.digests == DIGESTS, "also where a digest looks like a number"
    assert type(kept.setting.parameters["layer"]) is int
    document = yaml.safe_load(path.read_text())
    assert (document["model"], document["version"]) == ("owner/model", 1)
    assert document["entries"][0]["parameters"] == setting.parameters


def test_models_whose_names_make_the_same_file_name_have_files_of_their_own() -> None:
    assert file_name("tiny") == "tiny.yaml"
    assert len({file_name(name) for name in ("a/b", "a-b", "a b", "../b", "a/../b")}) == 5
    assert all("/" not in file_name(name) for name in ("a/b", "../b"))


def test_a_file_has_an_entry_for_data_edges_method_and_variant() -> None:
    settings = [
        tuned_setting(),
        tuned_setting("contracts"),
        tuned_setting("mini", ("B_C",)),
        tuned_setting(method="npo", variant="lora"),
        tuned_setting(variant="lora"),
    ]
    for setting in settings:
        keep_setting("tiny", setting)
    found = tuned_settings("tiny")
    assert sorted(one.key for one in found) == sorted(one.key for one in settings)


def test_a_better_setting_takes_the_place_of_an_older_one() -> None:
    keep_setting("tiny", tuned_setting(forget=0.25))
    better = tuned_setting(forget=0.125, retain=0.8)
    keep_setting("tiny", better)
    assert tuned_settings("tiny") == [better]


@pytest.mark.parametrize("forget", [0.25, 0.5])
def test_a_setting_that_is_no_better_is_refused_unless_told_otherwise(forget: float) -> None:
    """Better by the goal, which forget ROUGE-1 is here: a higher retain score changes nothing."""
    older, newer = tuned_setting(forget=0.25), tuned_setting(forget=forget, retain=0.99)
    path = keep_setting("tiny", older)
    with pytest.raises(InputError) as caught:
        keep_setting("tiny", newer)
    for part in ("mini A_B, lunar (adamw)", str(path), f"0.25, and this one {forget}", "--replace"):
        assert part in str(caught.value)
    assert tuned_settings("tiny") == [older]

    keep_setting("tiny", newer, replace=True)
    assert tuned_settings("tiny") == [newer]


def test_a_goal_to_be_maximised_makes_the_higher_score_better() -> None:
    goal: dict[str, Any] = {"minimise": "retain_rouge1", "constraints": ("forget_rouge1<=0.5",)}
    keep_setting("tiny", tuned_setting(retain=0.9, **goal))
    with pytest.raises(InputError, match=r"retain_rouge1 0\.9, and this one 0\.85"):
        keep_setting("tiny", tuned_setting(retain=0.85, **goal))
    better = tuned_setting(retain=0.95, **goal)
    keep_setting("tiny", better)
    assert tuned_settings("tiny") == [better]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"constraints": ("retain_rouge1>=0.7",)}, "another goal"),
        ({"digests": {"forget": "other"}}, "other questions"),
    ],
)
def test_scores_that_do_not_compare_replace_nothing(changes: dict[str, Any], reason: str) -> None:
    keep_setting("tiny", tuned_setting())
    newer = tuned_setting(forget=0.0, **changes)
    with pytest.raises(InputError, match=reason):
        keep_setting("tiny", newer)
    keep_setting("tiny", newer, replace=True)
    assert tuned_settings("tiny") == [newer]


def test_writers_at_the_same_time_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads the file, waits for the others to do so as well if they can, and writes it."""
    import time

    read = tuned_store.read_tuned

    def slow(path: Path) -> Any:
        content = read(path)
        time.sleep(0.02)
        return content

    monkeypatch.setattr(tuned_store, "read_tuned", slow)
    settings = [tuned_setting("mini", (f"E{n}",)) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda setting: keep_setting("tiny", setting), settings))
    assert sorted(one.forget_edges for one in tuned_settings("tiny")) == sorted(
        one.forget_edges for one in settings
    )


def test_a_writer_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(tuned_store, "SECONDS_TO_WAIT", 0)
    with (
        FileLock(paths.cache_dir() / "tuned.lock"),
        pytest.raises(LunarTuneError, match="Another process is writing"),
    ):
        keep_setting("tiny", tuned_setting())


def test_a_checkout_keeps_settings_beside_its_spaces(two: tuple[Path, Path]) -> None:
    assert keep_setting("tiny", tuned_setting()).parent == two[0]
    assert not two[1].exists()


def test_what_cannot_be_written_is_kept_with_the_users_data(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert keep_setting("tiny", tuned_setting()).parent == two[1]


def test_an_installed_package_is_not_written_to(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_PACKAGE", two[0].parent.parent)
    assert keep_setting("tiny", tuned_setting()).parent == two[1]


def test_of_two_entries_the_users_own_holds_and_is_the_one_that_is_replaced(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, other = tuned_setting(forget=0.1), tuned_setting("contracts")
    keep_setting("tiny", shipped)
    keep_setting("tiny", other)
    with monkeypatch.context() as changes:
        changes.setattr(os, "access", lambda *_: False)
        own = tuned_setting(forget=0.3)
        path = keep_setting("tiny", own, replace=True)
    assert path.parent == two[1]
    assert tuned_settings("tiny") == [other, own]

    better = tuned_setting(forget=0.2)
    assert keep_setting("tiny", better) == path, "where it is not hidden by the user's own"
    assert tuned_settings("tiny") == [other, better]
    assert read_tuned(two[0] / "tiny.yaml").entries == (other, shipped)


def text_of(**changes: Any) -> dict[str, Any]:
    """Return what a file says; JSON is YAML, too, with all texts in quotes."""
    entry = tuned_setting().model_dump(mode="json")
    return {
        "format": "lunar-tune tuned settings",
        "version": 1,
        "model": "tiny",
        "entries": [entry | changes],
    }


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"parameters": {"layer": "two"}}, "entries[0].parameters.layer"),
        ({"parameters": {}}, "entries[0].parameters"),
        ({"forget_edges": []}, "entries[0].forget_edges: "),
        ({"forget_edges": "A_B"}, "entries[0].forget_edges: "),
        ({"data": None}, "entries[0].data: is empty"),
        ({"minimise": "nosuch"}, "entries[0]: minimise, constraints: "),
        ({"constraints": ["retain_rouge1>0"]}, "entries[0]: minimise, constraints: "),
        ({"scores": {"retain_rouge1": 0.9}}, "entries[0]: scores: forget_rouge1 is missing"),
        ({"scores": {"forget_rouge1": 0, "retain_rouge1": 0.7}}, "entries[0]: scores: miss"),
        ({"scores": {"forget_rouge1": True}}, "entries[0].scores.forget_rouge1"),
        ({"provenance": {}}, "entries[0].provenance.search: is missing"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(
    folder: Path, changes: dict[str, Any], mistake: str
) -> None:
    folder.mkdir()
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(text_of(**changes)))
    with pytest.raises(InputError) as caught:
        kept_settings()
    assert str(caught.value).startswith(f"{path}: ")
    assert mistake in str(caught.value)
    with pytest.raises(InputError):
        keep_setting("tiny", tuned_setting(), replace=True)
    assert json.loads(path.read_text()) == text_of(**changes), "left as it was"


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        ("", "empty"),
        ("- 1\n", "tiny.yaml"),
        ("model: tiny\nentries: [", "line "),
        ("model: tiny\nmodel: tiny\nentries: []\n", "'model' stands in line 1 already"),
        ("model: !!python/name:os.system x\nentries: []\n", "not allowed"),
        ("model: tiny\nversion: 2\nentries: []\n", "version"),
        ("model: other\nentries: []\n", "whose file is named other.yaml"),
        ("entries: []\n", "model: is missing"),
    ],
)
def test_a_file_that_is_none_is_refused(folder: Path, content: str, mistake: str) -> None:
    folder.mkdir()
    (folder / "tiny.yaml").write_text(content)
    with pytest.raises(InputError) as caught:
        tuned_settings("tiny")
    assert str(folder / "tiny.yaml") in str(caught.value)
    assert mistake in str(caught.value)


def test_an_entry_that_stands_twice_is_refused(folder: Path) -> None:
    folder.mkdir()
    content = text_of()
    content["entries"] *= 2
    (folder / "tiny.yaml").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"entries: mini A_B, lunar \(adamw\) stands there twice"):
        kept_settings()


def test_keys_of_a_later_version_are_read_over(folder: Path) -> None:
    folder.mkdir()
    (folder / "tiny.yaml").write_text(json.dumps(text_of(later=[1]) | {"more": 2}))
    assert tuned_settings("tiny") == [tuned_setting()]


def test_a_bad_file_of_another_model_is_no_matter(folder: Path) -> None:
    keep_setting("tiny", tuned_setting())
    (folder / "other.yaml").write_text("nothing: true\n")
    assert tuned_settings("tiny") == [tuned_setting()]
    with pytest.raises(InputError, match=r"other\.yaml"):
        kept_settings()


def test_the_shipped_setting_is_a_point_of_its_models_space() -> None:
    """Those that a developer keeps beside it are not looked at."""
    path = paths.search_spaces_dir() / "tuned/tiny.yaml"
    key = ("mini", ("A_B",), "lunar", "adamw")
    (entry,) = [entry for entry in read_tuned(path).entries if entry.key == key]
    space = load_space(
        None,
        model_name="tiny",
        method="lunar",
        variant="adamw",
        parameters=("layer", "coefficient", "learning_rate"),
        n_layers=4,
    )
    space.check(entry.parameters)
    assert entry.provenance.confirmed_in_full
    assert all(len(digest) == 64 for digest in entry.provenance.digests.values())
    assert str(Path.home()) not in path.read_text()
