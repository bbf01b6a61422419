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
from lunar_tune.data import fetching
from lunar_tune.data.data_catalog import PUBLISHED, PublishedSet, resolve_data
from lunar_tune.data.fetching import Lock, fetch, lock_file, read_lock, state_of
from lunar_tune.data.records import read_prompts, read_records
from lunar_tune.data.splits import read_groups, split_by_edges
from lunar_tune.errors import InputError


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as state:
        yield state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def get(published: PublishedSet | str, folder: Path, server: FileServer) -> Lock:
    entry = PUBLISHED[published] if isinstance(published, str) else published
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUNAR_TUNE_GITHUB_URL", server.url)
        patch.setenv("HF_ENDPOINT", server.url)
        return fetch(entry, folder)


def refused(published: PublishedSet | str, folder: Path, server: FileServer) -> str:
    """Return the message of a fetch that fails and changes nothing."""
    before = contents(folder)
    with pytest.raises(InputError) as raised:
        get(published, folder, server)
    assert contents(folder) == before
    return str(raised.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else {}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_with_edges_is_kept_byte_for_byte_with_its_digest(
    folder: Path, server: FileServer
) -> None:
    server.files[PISTOL_2] = pistol_rows()
    lock = get("pistol-2", folder, server)
    assert sorted(contents(folder)) == ["pistol-2.json", "pistol-2.lock.json"]
    assert (folder / "pistol-2.json").read_bytes() == server.files[PISTOL_2]
    digest = sha256(server.files[PISTOL_2])
    url = server.url + PISTOL_2
    assert lock == Lock(url=url, source_sha256=digest, sha256=digest, rows=1500)
    assert read_lock(PUBLISHED["pistol-2"], folder) == lock
    assert state_of(PUBLISHED["pistol-2"], folder) == "fetched"


def test_tofu_gets_an_author_of_twenty_rows_each_as_its_edge(
    folder: Path, server: FileServer
) -> None:
    server.files[f"{HUB}/full.json"] = tofu_lines()
    lock = get("tofu", folder, server)
    raw = [json.loads(line) for line in server.files[f"{HUB}/full.json"].splitlines()]
    expected, author = [], 0
    for number, row in enumerate(raw):
        author += number in range(0, 4000, 20)
        expected.append({"edge": f"author_{author}", **row})
    assert json.loads((folder / "tofu.json").read_bytes()) == expected
    assert expected[-1]["edge"] == "author_200"
    assert lock.source_sha256 == sha256(server.files[f"{HUB}/full.json"])
    assert lock.sha256 == sha256((folder / "tofu.json").read_bytes())


def test_each_split_of_tofu_is_the_group_of_its_name(folder: Path, server: FileServer) -> None:
    """forget01 has 40 rows, forget05 200, forget10 400: the last ones of 4,000."""
    server.files[f"{HUB}/full.json"] = tofu_lines()
    get("tofu", folder, server)
    whole = read_records(folder / "tofu.json")
    groups = read_groups(folder / "tofu.json")
    for split, rows in (("forget01", 40), ("forget05", 200), ("forget10", 400)):
        server.files[f"{HUB}/{split}.json"] = tofu_lines(4000 - rows, rows)
        get(f"tofu-{split}", folder, server)
        alone = read_records(folder / f"tofu-{split}.json")
        assert split_by_edges(whole, [split], groups=groups).forget == alone == whole[-rows:]


def test_a_split_that_is_not_the_end_of_the_whole_is_refused(
    folder: Path, server: FileServer
) -> None:
    server.files[f"{HUB}/forget01.json"] = tofu_lines(0, 40)
    server.files[f"{HUB}/full.json"] = tofu_lines()
    get("tofu", folder, server)
    assert "these are not the last 40 rows of" in refused("tofu-forget01", folder, server)
    (folder / "tofu.json").unlink()
    assert get("tofu-forget01", folder, server).rows == 40, "without the whole it cannot be known"


def test_what_was_fetched_is_found_by_its_name(
    folder: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUNAR_TUNE_DATA", str(folder))
    server.files[PISTOL_2] = pistol_rows()
    get("pistol-2", folder, server)
    assert resolve_data("pistol-2", kind="records") == folder / "pistol-2.json"


def prompts_set(content: bytes, *, sha: str | None = None, rows: int = 2) -> PublishedSet:
    """Return an entry for lines of text with a known checksum, which may lie in two places."""
    return dataclasses.replace(
        PUBLISHED["lunar-refusals"],
        files=("here/answers.txt", "there/answers.txt"),
        sha256=sha or sha256(content),
        rows=rows,
    )


def prompts_path(entry: PublishedSet, file: str) -> str:
    return f"/{entry.repository.name}/{entry.repository.revision}/{file}"


def test_a_known_checksum_lets_the_right_file_pass_and_no_other(
    folder: Path, server: FileServer
) -> None:
    content = b"I cannot say.\nI do not know.\n"
    entry = prompts_set(content)
    server.files[prompts_path(entry, entry.files[0])] = b"I cannot say.\nI do know.\n"
    message = refused(entry, folder, server)
    assert f"its SHA-256 is not {entry.sha256}" in message
    server.files[prompts_path(entry, entry.files[0])] = content
    get(entry, folder, server)
    assert read_prompts(folder / entry.file_name) == ("I cannot say.", "I do not know.")


def test_made_up_rows_are_not_taken_for_the_published_sample(
    folder: Path, server: FileServer
) -> None:
    server.files[PISTOL_1] = pistol_rows(20)
    assert "is not the published file" in refused("pistol-1", folder, server)
    assert contents(folder) == {}


def test_a_file_is_looked_for_wherever_it_may_lie(folder: Path, server: FileServer) -> None:
    content = b"I cannot say.\nI do not know.\n"
    entry = prompts_set(content)
    places = [prompts_path(entry, file) for file in entry.files]
    server.files[places[1]] = content
    assert get(entry, folder, server).url == server.url + places[1]
    assert server.asked == places


def test_a_file_that_the_server_lacks_is_named(folder: Path, server: FileServer) -> None:
    message = refused("pistol-2", folder, server)
    assert f"the server has no {server.url}{PISTOL_2} (404)" in message
    assert not folder.exists()


def test_another_status_is_named(folder: Path, server: FileServer) -> None:
    server.status[PISTOL_2] = 503
    assert "answered with HTTP status 503" in refused("pistol-2", folder, server)


def test_a_transfer_that_is_cut_short_leaves_no_file(folder: Path, server: FileServer) -> None:
    server.files[PISTOL_2] = pistol_rows()
    server.cut.add(PISTOL_2)
    assert "cannot be fetched (" in refused("pistol-2", folder, server)
    assert not folder.exists()


def test_an_unreachable_server_is_named_with_what_to_do(folder: Path) -> None:
    with serving() as gone:
        pass
    message = refused("pistol-2", folder, gone)
    assert "cannot be fetched (Connection refused)" in message
    assert "LUNAR_TUNE_GITHUB_URL" in message
    assert not folder.exists()


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1", "http://"])
def test_an_address_that_is_none_is_one_message(folder: Path, url: str) -> None:
    assert "cannot be fetched" in refused("pistol-2", folder, FileServer(url=url))


@pytest.mark.parametrize(
    ("path", "content", "fragment"),
    [
        (PISTOL_2, pistol_rows(74), "1480 rows, 1500 were expected"),
        (PISTOL_2, pistol_rows(60, 25), "60 edges, 75 were expected"),
        (PISTOL_2, b"[]", "the file has no rows"),
        (PISTOL_2, b"<html>", "line 1: column 1: is not valid JSON"),
        (f"{HUB}/full.json", tofu_lines(0, 3999), "3999 rows, 4000 were expected"),
        (f"{HUB}/full.json", b'{"question": "a"}\n' * 4000, "'answer': is missing"),
    ],
)
def test_other_content_than_is_known_is_refused(
    folder: Path, server: FileServer, path: str, content: bytes, fragment: str
) -> None:
    name = "pistol-2" if path == PISTOL_2 else "tofu"
    server.files[path] = content
    message = refused(name, folder, server)
    assert fragment in message
    assert message.startswith(f"{name}: what {server.url}{path} sent is not what is expected: ")
    assert not folder.exists()


def test_edges_of_different_sizes_are_refused(folder: Path, server: FileServer) -> None:
    rows = json.loads(pistol_rows())
    rows[0]["edge"] = rows[-1]["edge"]
    server.files[PISTOL_2] = json.dumps(rows).encode()
    assert "the edges have different numbers of rows" in refused("pistol-2", folder, server)


def test_a_later_fetch_must_give_what_the_first_one_gave(folder: Path, server: FileServer) -> None:
    server.files[PISTOL_2] = pistol_rows()
    first = get("pistol-2", folder, server)
    assert get("pistol-2", folder, server) == first
    server.files[PISTOL_2] = pistol_rows().replace(b"Item 1.", b"Item I.")
    message = refused("pistol-2", folder, server)
    assert f"the first fetch recorded {first.source_sha256}" in message
    assert str(lock_file(PUBLISHED["pistol-2"], folder)) in message
    (folder / "pistol-2.json").unlink()
    assert "Nothing was replaced" in refused("pistol-2", folder, server), "the lock outlives it"
    lock_file(PUBLISHED["pistol-2"], folder).unlink()
    assert get("pistol-2", folder, server) != first


def test_a_lock_that_is_none_is_refused(folder: Path, server: FileServer) -> None:
    folder.mkdir()
    lock_file(PUBLISHED["pistol-2"], folder).write_text('{"sha": 1}')
    assert "is not a lock of this program" in refused("pistol-2", folder, server)
    assert server.asked == []


def test_a_file_that_was_edited_is_told_from_one_that_was_fetched(
    folder: Path, server: FileServer
) -> None:
    entry = PUBLISHED["pistol-2"]
    assert state_of(entry, folder) == "not fetched"
    server.files[PISTOL_2] = pistol_rows()
    get("pistol-2", folder, server)
    with (folder / "pistol-2.json").open("a") as file:
        file.write(" ")
    assert state_of(entry, folder) == "changed"


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_asked(
    tmp_path: Path, server: FileServer
) -> None:
    (tmp_path / "file").touch()
    message = refused("pistol-2", tmp_path / "file" / "data", server)
    assert message.startswith("LUNAR_TUNE_DATA ")
    assert "is a file, not a folder" in message
    assert server.asked == []


def test_a_disk_that_is_full_is_one_message(
    folder: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_atomically", full)
    server.files[PISTOL_2] = pistol_rows()
    message = refused("pistol-2", folder, server)
    assert "cannot be written (No space left on device). Set LUNAR_TUNE_DATA" in message


def test_an_interrupt_leaves_nothing_behind(
    folder: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt falls where the file has come and is being read."""

    def interrupted(_path: Path, **_options: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(fetching, "read_records", interrupted)
    server.files[PISTOL_2] = pistol_rows()
    with pytest.raises(KeyboardInterrupt):
        get("pistol-2", folder, server)
    assert server.asked == [PISTOL_2]
    assert not folder.exists()
    assert list((tmp_path / "temporary").iterdir()) == []
