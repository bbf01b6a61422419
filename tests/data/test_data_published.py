"""Data by name, and fetching: what is right arrives whole, what is wrong leaves nothing behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from file_server import HUB, PISTOL_1, PISTOL_2, FileServer, pistol_rows, serving, tofu_lines

from lunar_tune import files
from lunar_tune.data import data_catalog
from lunar_tune.data.data_catalog import (
    BUNDLED,
    PUBLISHED,
    Lock,
    PublishedSet,
    fetch,
    lock_file,
    read_lock,
    resolve_data,
    state_of,
)
from lunar_tune.data.records import read_prompts, read_records
from lunar_tune.data.splits import read_groups, split_by_edges
from lunar_tune.errors import DataError, InputError
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
def test_what_cannot_be_found_is_refused_with_what_exists() -> None:
    for asked, kind, fragments in (
        ("minni", "records", ["'minni' is neither a file nor", "mini, contracts, factual"]),
        ("pistol", "records", ["fetch_datasets fetches: pistol-1, pistol-2, ", "tofu"]),
        ("pistol", "prompts", ["fetch_datasets fetches: lunar-harmful, "]),
        ("harmful", "records", ["'harmful' holds prompts, records are needed", "mini"]),
        ("mini", "prompts", ["'mini' holds records", "unverifiable, harmful, private, refusals"]),
        ("lunar-harmful", "records", ["'lunar-harmful' holds prompts, records are needed"]),
        ("tofu", "prompts", ["'tofu' holds records, prompts are needed"]),
        (".", "records", ["is a folder: give one of its files (own.json, pairs.json)"]),
        ("owner/pairs", "records", ["hf download --repo-type dataset owner/pairs --local-dir"]),
        ("x" * 5000, "records", ["cannot be read"]),
        ("~no-such-user-here/x.json", "records", ["cannot be read"]),
        ("pairs.jsonl", "records", ["In the same folder there is pairs.json."]),
        ("nowhere/pairs.json", "records", ["pairs.json' is neither a file nor"]),
        ("pistol-1", "records", ["'pistol-1' is not fetched yet (", "fetch_datasets pistol-1 ("]),
    ):
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


# Fetching

PISTOL = PUBLISHED["pistol-2"]
ROWS = pistol_rows()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as state:
        yield state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def get(entry: PublishedSet, folder: Path, server: FileServer) -> Lock:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUNAR_TUNE_GITHUB_URL", server.url)
        patch.setenv("HF_ENDPOINT", server.url)
        return fetch(entry, folder)


def refused(entry: PublishedSet, folder: Path, server: FileServer) -> str:
    """Return the message of a fetch that fails and changes nothing."""
    before = contents(folder)
    with pytest.raises(InputError) as raised:
        get(entry, folder, server)
    assert contents(folder) == before
    return str(raised.value)


def contents(folder: Path) -> dict[str, bytes] | None:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else None


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_with_edges_is_kept_byte_for_byte_with_its_digest(
    folder: Path, server: FileServer
) -> None:
    server.files[PISTOL_2] = ROWS
    assert state_of(PISTOL, folder) == "not fetched"
    lock = get(PISTOL, folder, server)
    assert sorted(contents(folder) or ()) == ["pistol-2.json", "pistol-2.lock.json"]
    assert (folder / "pistol-2.json").read_bytes() == ROWS
    digest = sha256(ROWS)
    assert lock == Lock(url=server.url + PISTOL_2, source_sha256=digest, sha256=digest, rows=1500)
    assert read_lock(PISTOL, folder) == lock
    assert state_of(PISTOL, folder) == "fetched"
    with (folder / "pistol-2.json").open("a") as file:
        file.write(" ")
    assert state_of(PISTOL, folder) == "changed"


def test_tofu_gets_an_author_of_twenty_rows_each_and_a_group_for_each_split(
    folder: Path, server: FileServer
) -> None:
    """forget01 has 40 rows, forget05 200, forget10 400: the last ones of 4,000."""
    source = server.files[f"{HUB}/full.json"] = tofu_lines()
    lock = get(PUBLISHED["tofu"], folder, server)
    expected = [
        {"edge": f"author_{1 + number // 20}", **json.loads(line)}
        for number, line in enumerate(source.splitlines())
    ]
    assert json.loads((folder / "tofu.json").read_bytes()) == expected
    digests = sha256(source), sha256((folder / "tofu.json").read_bytes())
    assert (lock.source_sha256, lock.sha256) == digests

    whole, groups = read_records(folder / "tofu.json"), read_groups(folder / "tofu.json")
    for split, rows in (("forget01", 40), ("forget05", 200), ("forget10", 400)):
        server.files[f"{HUB}/{split}.json"] = tofu_lines(4000 - rows, rows)
        get(PUBLISHED[f"tofu-{split}"], folder, server)
        alone = read_records(folder / f"tofu-{split}.json")
        assert split_by_edges(whole, [split], groups=groups).forget == alone == whole[-rows:]

    server.files[f"{HUB}/forget01.json"] = tofu_lines(0, 40)
    lock_file(PUBLISHED["tofu-forget01"], folder).unlink()
    message = refused(PUBLISHED["tofu-forget01"], folder, server)
    assert "its rows are not the last 40 rows of" in message
    (folder / "tofu.json").unlink()
    alone_again = get(PUBLISHED["tofu-forget01"], folder, server)
    assert alone_again.rows == 40, "without the whole it cannot be known"


def test_a_known_checksum_lets_the_right_file_pass_and_no_other_wherever_it_lies(
    folder: Path, server: FileServer
) -> None:
    content = b"I cannot say.\nI do not know.\n"
    own = {"files": ("here/a.txt", "there/a.txt"), "sha256": sha256(content), "rows": 2}
    entry = dataclasses.replace(PUBLISHED["lunar-refusals"], **own)
    repository = entry.repository
    here, there = (f"/{repository.name}/{repository.revision}/{file}" for file in entry.files)
    server.files[here] = b"I cannot say.\nI do know.\n"
    assert f"whose SHA-256 is {entry.sha256}" in refused(entry, folder, server)
    server.files = {there: content}
    server.asked.clear()
    assert get(entry, folder, server).url == server.url + there
    assert server.asked == [here, there]
    assert read_prompts(folder / entry.file_name) == ("I cannot say.", "I do not know.")
    server.files[PISTOL_1] = pistol_rows(20)
    assert "is not the published file" in refused(PUBLISHED["pistol-1"], folder, server)


def test_what_a_server_does_not_send_is_named_with_the_reason(
    folder: Path, server: FileServer
) -> None:
    assert f"the server has no {server.url}{PISTOL_2} (404)" in refused(PISTOL, folder, server)
    server.status[PISTOL_2] = 503
    assert "answered with HTTP status 503" in refused(PISTOL, folder, server)
    server.status.clear()
    server.files[PISTOL_2] = ROWS
    server.cut.add(PISTOL_2)
    assert "cannot be fetched (" in refused(PISTOL, folder, server)
    with serving() as gone:
        pass
    message = refused(PISTOL, folder, gone)
    assert "cannot be fetched (Connection refused)" in message
    assert "LUNAR_TUNE_GITHUB_URL" in message
    for url in ("nonsense", "ftp://127.0.0.1", "http://"):
        assert "cannot be fetched" in refused(PISTOL, folder, FileServer(url=url))


UNEVEN = json.loads(ROWS)
UNEVEN[0]["edge"] = UNEVEN[-1]["edge"]


def test_other_content_than_is_known_is_refused(folder: Path, server: FileServer) -> None:
    for path, content, fragment in (
        (PISTOL_2, pistol_rows(74), "it has 1480 rows, 1500 were expected"),
        (PISTOL_2, pistol_rows(60, 25), "it has 60 edges, 75 were expected"),
        (PISTOL_2, json.dumps(UNEVEN).encode(), "the edges have different numbers of rows"),
        (PISTOL_2, b"[]", "the file has no rows"),
        (PISTOL_2, b"<html>", "line 1: column 1: is not valid JSON"),
        (f"{HUB}/full.json", tofu_lines(0, 3999), "3999 rows, 4000 were expected"),
        (f"{HUB}/full.json", b'{"question": "a"}\n' * 4000, "'answer': is missing"),
    ):
        name = "pistol-2" if path == PISTOL_2 else "tofu"
        server.files[path] = content
        message = refused(PUBLISHED[name], folder, server)
        assert fragment in message
        assert message.startswith(f"{name}: what {server.url}{path} sent is not what is expected: ")


def test_a_later_fetch_must_give_what_the_first_one_gave(folder: Path, server: FileServer) -> None:
    server.files[PISTOL_2] = ROWS
    first = get(PISTOL, folder, server)
    assert get(PISTOL, folder, server) == first
    server.files[PISTOL_2] = ROWS.replace(b"Item 1.", b"Item I.")
    message = refused(PISTOL, folder, server)
    assert f"the first fetch brought, whose SHA-256 is {first.source_sha256}" in message
    assert str(lock_file(PISTOL, folder)) in message
    (folder / "pistol-2.json").unlink()
    assert "Nothing was replaced" in refused(PISTOL, folder, server), "the lock outlives it"
    lock_file(PISTOL, folder).write_text('{"sha": 1}')
    server.asked.clear()
    assert "is not a lock file of lunar-tune" in refused(PISTOL, folder, server)
    assert server.asked == []
    lock_file(PISTOL, folder).unlink()
    assert get(PISTOL, folder, server) != first


def test_a_folder_that_cannot_be_written_is_refused(
    folder: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is asked, if it is known; a full disk is known afterwards."""
    folder.mkdir()
    (folder / "file").touch()
    message = refused(PISTOL, folder / "file" / "data", server)
    assert message.startswith("LUNAR_TUNE_DATA ")
    assert "is a file, not a folder" in message
    assert server.asked == []
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(files, "write_atomically", full)
    server.files[PISTOL_2] = ROWS
    message = refused(PISTOL, folder, server)
    assert "cannot be written (No space left on device). Set LUNAR_TUNE_DATA" in message


def test_an_interrupt_leaves_nothing_behind(
    folder: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt falls where the file has come and is being read."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(data_catalog, "read_records", Mock(side_effect=KeyboardInterrupt))
    server.files[PISTOL_2] = ROWS
    with pytest.raises(KeyboardInterrupt):
        get(PISTOL, folder, server)
    assert server.asked == [PISTOL_2]
    assert not folder.exists()
    assert list((tmp_path / "temporary").iterdir()) == []
