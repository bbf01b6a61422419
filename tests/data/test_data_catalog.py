"""Data by name: each leads to its file; every published set is complete and pinned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lunar_tune.data import data_catalog
from lunar_tune.data.data_catalog import BUNDLED, PUBLISHED, DataKind, resolve_data
from lunar_tune.errors import DataError
from lunar_tune.files import data_dir


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's folder of data, and work in a folder with files of shipped names."""
    monkeypatch.setenv("LUNAR_TUNE_DATA", str(tmp_path / "fetched"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fetched").mkdir()
    for name in ("mini", "tofu", "own.json", "pairs.json", "fetched/tofu.json"):
        (tmp_path / name).write_text("[]")
    for name in ("fetched/mini.json", "fetched/lunar-refusals.txt"):
        (tmp_path / name).write_text("No.")
    return tmp_path / "fetched"


def test_names_lead_to_shipped_then_to_fetched_files_and_paths_to_themselves(fetched: Path) -> None:
    shipped = data_catalog.shipped_folder("datasets") / "mini.json"
    own = fetched.parent / "own.json"
    for asked, kind, found in (
        (str(own), "records", own),
        ("~/own.json", "prompts", own),
        ("mini", "records", shipped),
        ("./mini", "records", Path("mini")),
        ("tofu", "records", fetched / "tofu.json"),
        ("./tofu", "records", Path("tofu")),
        ("lunar-refusals", "prompts", fetched / "lunar-refusals.txt"),
    ):
        assert resolve_data(asked, kind=kind) == found, asked


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize(
    ("asked", "kind", "fragments"),
    [
        ("minni", "records", ["'minni' is neither a file nor", "mini, contracts, factual"]),
        ("pistol", "records", ["fetch_datasets fetches: pistol-1, pistol-2, ", "tofu"]),
        ("pistol", "prompts", ["fetch_datasets fetches: lunar-harmful, "]),
        ("harmful", "records", ["'harmful' holds prompts, records are needed", "mini"]),
        ("mini", "prompts", ["'mini' holds records", "unverifiable, harmful, refusals"]),
        ("lunar-harmful", "records", ["'lunar-harmful' holds prompts, records are needed"]),
        ("tofu", "prompts", ["'tofu' holds records, prompts are needed"]),
        (".", "records", ["is a folder"]),
        ("x" * 5000, "records", ["cannot be looked at"]),
        ("~no-such-user-here/x.json", "records", ["cannot be looked at"]),
        ("pairs.jsonl", "records", ["In the same folder there is pairs.json."]),
        ("nowhere/pairs.json", "records", ["pairs.json' is neither a file nor"]),
        ("pistol-1", "records", ["'pistol-1' is not fetched yet (", "fetch_datasets pistol-1 ("]),
    ],
)
def test_what_cannot_be_found_is_refused_with_what_exists(
    asked: str, kind: DataKind, fragments: list[str]
) -> None:
    with pytest.raises(DataError) as raised:
        resolve_data(asked, kind=kind)
    assert [text for text in fragments if text not in str(raised.value)] == []


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
    monkeypatch.setattr(data_catalog, "shipped_folder", lambda _name: tmp_path)
    with pytest.raises(DataError, match=r"'mini' is missing at .*install lunar-tune again"):
        resolve_data("mini", kind="records")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_entry_is_pinned_to_a_full_commit_and_says_what_must_come(name: str) -> None:
    entry = PUBLISHED[name]
    assert entry.name == name
    assert name not in BUNDLED
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
