"""Shipped names: each leads to its file, everything else to a file or to a helpful error."""

from __future__ import annotations

from pathlib import Path

import pytest

from lunar_tune.data import bundled
from lunar_tune.data.bundled import BUNDLED, bundled_names, resolve_data
from lunar_tune.data.readers import read_prompts, read_records
from lunar_tune.errors import DataError
from lunar_tune.files import data_dir


def test_the_kinds_share_out_all_names() -> None:
    assert bundled_names("records") == ("mini", "contracts", "factual")
    assert bundled_names("prompts") == ("unverifiable", "harmful", "refusals")
    assert {*bundled_names("records"), *bundled_names("prompts")} == set(BUNDLED)


def test_every_shipped_name_can_be_read_as_its_kind() -> None:
    for name in bundled_names("records"):
        assert read_records(resolve_data(name, kind="records"))
    for name in bundled_names("prompts"):
        assert read_prompts(resolve_data(name, kind="prompts"))


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.json").write_text("[]")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_data(tmp_path / "own.json", kind="records") == tmp_path / "own.json"
    assert resolve_data("~/own.json", kind="prompts") == tmp_path / "own.json"


def test_a_shipped_name_wins_over_a_file_but_not_over_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mini").write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert resolve_data("mini", kind="records").name == "mini.json"
    assert resolve_data("./mini", kind="records") == Path("mini")
    assert resolve_data(Path("mini"), kind="records") == Path("mini")


@pytest.mark.parametrize(
    ("asked", "kind", "fragments"),
    [
        ("minni", "records", ["'minni' is neither a file nor", "mini, contracts, factual"]),
        ("harmful", "records", ["'harmful' holds prompts, records are needed", "mini"]),
        ("mini", "prompts", ["'mini' holds records", "unverifiable, harmful, refusals"]),
        (".", "records", ["is a folder"]),
        ("x" * 5000, "records", ["cannot be looked at"]),
        ("~no-such-user-here/x.json", "records", ["cannot be looked at"]),
    ],
)
def test_what_cannot_be_found_is_refused_with_what_exists(
    asked: str, kind: bundled.DataKind, fragments: list[str]
) -> None:
    with pytest.raises(DataError) as raised:
        resolve_data(asked, kind=kind)
    assert [text for text in fragments if text not in str(raised.value)] == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUNAR_TUNE_DATA", str(tmp_path / "fetched"))
    (tmp_path / "fetched").mkdir()
    return tmp_path / "fetched"


def test_a_fetched_name_leads_to_its_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tofu.json").write_text("[]")
    (folder / "lunar-refusals.txt").write_text("No.")
    monkeypatch.chdir(folder)
    (folder / "tofu").write_text("[]")
    assert resolve_data("tofu", kind="records") == folder / "tofu.json"
    assert resolve_data("lunar-refusals", kind="prompts") == folder / "lunar-refusals.txt"
    assert resolve_data("./tofu", kind="records") == Path("tofu"), "the file of that name"


def test_a_shipped_name_wins_over_a_file_among_the_fetched(folder: Path) -> None:
    (folder / "mini.json").write_text("[]")
    assert resolve_data("mini", kind="records").parent == bundled.datasets_dir()


@pytest.mark.parametrize("name", bundled.published_names("records"))
def test_a_name_that_was_not_fetched_says_how_to_fetch_it(folder: Path, name: str) -> None:
    with pytest.raises(DataError) as raised:
        resolve_data(name, kind="records")
    message = str(raised.value)
    assert f"'{name}' is not fetched yet ({folder / name}.json is missing)" in message
    assert f"run scripts/fetch_datasets {name} " in message
    assert f"python -m lunar_tune.fetch {name})" in message


@pytest.mark.usefixtures("folder")
def test_a_published_name_of_the_other_kind_is_refused_fetched_or_not() -> None:
    with pytest.raises(DataError, match="'lunar-harmful' holds prompts, records are needed"):
        resolve_data("lunar-harmful", kind="records")
    with pytest.raises(DataError, match="'tofu' holds records, prompts are needed"):
        resolve_data("tofu", kind="prompts")


def test_an_unknown_name_is_refused_with_what_can_be_fetched() -> None:
    with pytest.raises(DataError, match=r"fetch_datasets fetches: pistol-1, pistol-2, .*tofu"):
        resolve_data("pistol", kind="records")
    with pytest.raises(DataError, match="fetch_datasets fetches: lunar-harmful, "):
        resolve_data("pistol", kind="prompts")


def test_without_the_variable_fetched_data_lie_in_the_users_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LUNAR_TUNE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    assert data_dir().is_relative_to(tmp_path)
    assert data_dir().name == "lunar-tune"
    assert not data_dir().exists(), "asking for it makes nothing"


def test_a_broken_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "datasets_dir", lambda: tmp_path)
    with pytest.raises(DataError, match=r"'mini' is missing at .*install lunar-tune again"):
        resolve_data("mini", kind="records")
