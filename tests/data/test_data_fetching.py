"""Fetching: what is right arrives whole, what is wrong leaves nothing behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import HUB, PISTOL_1, PISTOL_2, FileServer, pistol_rows, serving, tofu_lines

from lunar_tune import files
from lunar_tune.data import data_catalog
from lunar_tune.data.data_catalog import (
    PUBLISHED,
    Lock,
    PublishedSet,
    fetch,
    lock_file,
    read_lock,
    state_of,
)
from lunar_tune.data.records import read_prompts, read_records
from lunar_tune.data.splits import read_groups, split_by_edges
from lunar_tune.errors import InputError

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
    assert "these are not the last 40 rows of" in message
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
    assert f"its SHA-256 is not {entry.sha256}" in refused(entry, folder, server)
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


@pytest.mark.parametrize(
    ("path", "content", "fragment"),
    [
        (PISTOL_2, pistol_rows(74), "1480 rows, 1500 were expected"),
        (PISTOL_2, pistol_rows(60, 25), "60 edges, 75 were expected"),
        (PISTOL_2, json.dumps(UNEVEN).encode(), "the edges have different numbers of rows"),
        (PISTOL_2, b"[]", "the file has no rows"),
        (PISTOL_2, b"<html>", "line 1: column 1: is not valid JSON"),
        (f"{HUB}/full.json", tofu_lines(0, 3999), "3999 rows, 4000 were expected"),
        (f"{HUB}/full.json", b'{"question": "a"}\n' * 4000, "'answer': is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_content_than_is_known_is_refused(
    folder: Path, server: FileServer, path: str, content: bytes, fragment: str
) -> None:
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
    assert f"the first fetch recorded {first.source_sha256}" in message
    assert str(lock_file(PISTOL, folder)) in message
    (folder / "pistol-2.json").unlink()
    assert "Nothing was replaced" in refused(PISTOL, folder, server), "the lock outlives it"
    lock_file(PISTOL, folder).write_text('{"sha": 1}')
    server.asked.clear()
    assert "is not a lock of this program" in refused(PISTOL, folder, server)
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

    def full(_path: Path, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_atomically", full)
    server.files[PISTOL_2] = ROWS
    message = refused(PISTOL, folder, server)
    assert "cannot be written (No space left on device). Set LUNAR_TUNE_DATA" in message


def test_an_interrupt_leaves_nothing_behind(
    folder: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt falls where the file has come and is being read."""

    def interrupted(_path: Path, **_options: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(data_catalog, "read_records", interrupted)
    server.files[PISTOL_2] = ROWS
    with pytest.raises(KeyboardInterrupt):
        get(PISTOL, folder, server)
    assert server.asked == [PISTOL_2]
    assert not folder.exists()
    assert list((tmp_path / "temporary").iterdir()) == []
