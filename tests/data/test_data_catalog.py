"""Data by name: each leads to its file; every published set is complete and pinned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lunar_tune.data import data_catalog
from lunar_tune.data.data_catalog import BUNDLED, PUBLISHED, DataKind, bundled_names, resolve_data
from lunar_tune.data.records import read_prompts, read_records
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
    assert resolve_data(str(tmp_path / "own.json"), kind="records") == tmp_path / "own.json"
    assert resolve_data("~/own.json", kind="prompts") == tmp_path / "own.json"


def test_a_shipped_name_wins_over_a_file_but_not_over_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mini").write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert resolve_data("mini", kind="records").name == "mini.json"
    assert resolve_data("./mini", kind="records") == Path("mini")


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
    asked: str, kind: DataKind, fragments: list[str]
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
    assert resolve_data("mini", kind="records").parent == data_catalog.datasets_dir()


@pytest.mark.parametrize("name", [n for n, entry in PUBLISHED.items() if entry.kind == "records"])
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


def test_a_missing_file_is_refused_with_those_that_differ_in_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text("[]")
    with pytest.raises(DataError, match=r"In the same folder there is pairs\.json\."):
        resolve_data(str(tmp_path / "pairs.jsonl"), kind="records")
    with pytest.raises(DataError, match=r"nowhere/pairs\.json' is neither a file nor .*[0-9]\.$"):
        resolve_data(str(tmp_path / "nowhere" / "pairs.json"), kind="records")


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
    monkeypatch.setattr(data_catalog, "datasets_dir", lambda: tmp_path)
    with pytest.raises(DataError, match=r"'mini' is missing at .*install lunar-tune again"):
        resolve_data("mini", kind="records")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_entry_is_pinned_to_a_full_commit_and_says_what_must_come(name: str) -> None:
    entry = PUBLISHED[name]
    assert entry.name == name
    assert re.fullmatch(r"[0-9a-f]{40}", entry.repository.revision)
    assert entry.repository.licence == "MIT"
    assert entry.rows > 0
    assert entry.files
    assert entry.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    assert entry.n_edges is None or entry.rows % entry.n_edges == 0
    for file in entry.files:
        assert entry.repository.revision in entry.repository.url(file)
        assert entry.repository.url(file).endswith(f"/{file}")
        assert entry.file_name.rpartition(".")[2] == file.rpartition(".")[2]


def test_no_published_name_hides_behind_a_shipped_one() -> None:
    assert not set(PUBLISHED) & set(BUNDLED)


def test_addresses_are_those_of_the_hosts_unless_another_server_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LUNAR_TUNE_GITHUB_URL", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    pistol, tofu = PUBLISHED["pistol-1"].repository, PUBLISHED["tofu"].repository
    assert pistol.url("a/b.json") == (
        "https://raw.githubusercontent.com/facebookresearch/LUNAR/"
        "dfa56eb0291a93e967284a9ec2d28d5572d235b1/a/b.json"
    )
    assert tofu.url("full.json") == (
        "https://huggingface.co/datasets/locuslab/TOFU/resolve/"
        "324592d84ae4f482ac7249b9285c2ecdb53e3a68/full.json"
    )
    assert pistol.page.startswith("https://github.com/facebookresearch/LUNAR/tree/dfa56eb")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/")
    assert tofu.url("full.json").startswith("http://mirror/datasets/")


def test_the_forget_splits_of_tofu_are_the_last_percents_of_its_authors() -> None:
    """TOFU: 200 authors; forget01 forgets 2 of them, forget05 10, forget10 20."""
    groups = PUBLISHED["tofu"].groups
    assert groups["forget01"] == ("author_199", "author_200")
    assert groups["forget05"] == tuple(f"author_{n}" for n in range(191, 201))
    assert groups["forget10"] == tuple(f"author_{n}" for n in range(181, 201))
    for split, authors in groups.items():
        alone = PUBLISHED[f"tofu-{split}"]
        assert alone.rows == 20 * len(authors)
        assert f"author_{alone.first_author}" == authors[0]


def test_an_unknown_published_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(DataError, match=r"unknown published data set 'tofuu'\. Did you mean 'tofu"):
        PUBLISHED["tofuu"]
