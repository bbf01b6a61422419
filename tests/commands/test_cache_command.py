"""The command that shows and empties the cache of activations: table, JSON, removal, refusals."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import command_lines
import pytest
import torch
from command_lines import without_ray

from lunar_tune.cli.cache import cache as COMMAND
from lunar_tune.engine.cache import ActivationCache

refused = partial(command_lines.refused, COMMAND)
succeeded = partial(command_lines.succeeded, COMMAND)

USED = datetime(2025, 2, 7, 12, 30, tzinfo=UTC)
FIRST, SECOND, THIRD = "1a" * 16, "1b" * 16, "2c" * 16


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "activations"


def fill(key: str, *, model: str = "tiny", files: int = 1, days: int = 0) -> int:
    """Make an entry, last used so many days before `USED`; return its bytes."""
    about = {"kind": "streams", "model": model, "dtype": "bfloat16", "rows": 12}
    kept = ActivationCache(1.0)
    for number in range(files):
        tensor = torch.zeros(1000, 16, dtype=torch.bfloat16)
        assert kept.entry(key, about).save(f"point-{number:03d}", tensor)
    then = USED.timestamp() - days * 24 * 3600
    os.utime(kept.root / key, (then, then))
    return sum(file.stat().st_size for file in (kept.root / key).iterdir())


def keys() -> set[str]:
    return {entry.key for entry in ActivationCache().entries()}


def test_a_row_an_entry_last_used_first(folder: Path) -> None:
    """32,000 bytes of numbers a file, 31.25 KiB; headers and description are below 1 KiB."""
    assert succeeded(columns=20) == f"The cache is empty ({folder}).\n", "whatever the width"
    fill(FIRST, files=3, days=2)
    fill(THIRD, model="qwen2.5-7b")
    header, *rows, total, limit = succeeded().splitlines()
    assert header.split() == "key model kind dtype rows files size last used".split()  # noqa: SIM905
    assert [row.split()[:6] for row in rows] == [
        ["2c2c2c2c", "qwen2.5-7b", "streams", "bfloat16", "12", "1"],
        ["1a1a1a1a", "tiny", "streams", "bfloat16", "12", "3"],
    ]
    sizes = [float(row.split()[6]) for row in rows]
    assert sizes == [pytest.approx(31.25, abs=1), pytest.approx(3 * 31.25, abs=1)]
    local = [USED.astimezone(), (USED - timedelta(days=2)).astimezone()]
    assert [row.split()[7:] for row in rows] == [
        f"KiB {day:%Y-%m-%d %H:%M}".split() for day in local
    ]
    assert re.fullmatch(rf"2 entries, 12\d\.\d KiB in {re.escape(str(folder))}", total)
    assert re.match(r"limit \d+\.\d GiB, unless a run sets --cache-limit", limit)


def test_a_long_name_is_shown_whole_on_80_columns_and_a_lost_description_too(folder: Path) -> None:
    name = "owner/[bold]a-model-with-a-name-that-is-longer-than-its-column[/bold]"
    fill(FIRST, model=name)
    header, *lines = succeeded(columns=80).splitlines()[:-2]
    column = slice(header.index("model"), header.index("kind"))
    assert "".join(line[column].strip() for line in lines) == name
    assert header.split()[-2:] == ["last", "used"]
    assert "2025-02-0" in lines[0]
    for file in (folder / FIRST).iterdir():
        file.write_bytes(b"")
    assert succeeded().splitlines()[1].split()[:6] == ["1a1a1a1a", "?", "?", "?", "?", "1"]
    assert succeeded("--remove", "1a").startswith(f"{FIRST} (?, ?, ?) removed")


def test_json_has_every_entry_for_other_tools_and_removes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "entries.json"
    assert succeeded("--json", str(file)) == ""
    assert json.loads(file.read_text()) == []
    size = fill(FIRST, files=2)
    fill(SECOND, days=1)
    assert succeeded("--json", str(file), "--quiet") == ""
    first, second = json.loads(file.read_text())
    about = {"key": FIRST, "model": "tiny", "kind": "streams", "dtype": "bfloat16", "rows": 12}
    assert first == about | {"files": 2, "bytes": size, "used": "2025-02-07T12:30:00+00:00"}
    assert second["key"] == SECOND
    message = refused("--json", "a.json", "--remove", "all")
    assert "--remove and --json exclude each other" in message
    assert keys() == {FIRST, SECOND}


def test_an_entry_is_removed_by_the_beginning_of_its_key_if_it_is_the_only_one(
    folder: Path,
) -> None:
    assert "the cache is empty" in refused("--remove", "1a")
    sizes = {key: fill(key) for key in (FIRST, SECOND, THIRD)}
    unknown = refused("--remove", "ff")
    assert "--remove ff: no keys begin so" in unknown
    for shown in ("1a1a1a1a", "1b1b1b1b", "2c2c2c2c", "--remove all"):
        assert shown in unknown
    ambiguous = refused("--remove", "1")
    assert "--remove 1: 2 keys begin so, and exactly one must" in ambiguous
    assert "1a1a1a1a" in ambiguous
    assert "2c2c2c2c" not in ambiguous
    assert "--remove ''" in refused("--remove", "")
    assert keys() == {FIRST, SECOND, THIRD}
    assert succeeded("--remove", "1B") == (
        f"{SECOND} (tiny, streams, bfloat16) removed, {sizes[SECOND] / 1024:.1f} KiB freed "
        f"({folder}).\n"
    )
    assert succeeded("--remove", THIRD, "--quiet") == ""
    assert keys() == {FIRST}
    assert succeeded("--quiet") == ""
    for number in range(9):
        fill(f"{number}" * 32)
    message = refused("--remove", "a")
    assert message.partition("There are: ")[2].count(", ") == 8, "not all are named"
    assert "and 2 more" in message


def test_emptying_says_how_much_was_freed(folder: Path) -> None:
    fill(FIRST, files=2)
    fill(SECOND)
    assert re.fullmatch(
        rf"2 entries removed, 9\d\.\d KiB freed \({re.escape(str(folder))}\)\.\n",
        succeeded("--remove", "all"),
    )
    assert list(folder.iterdir()) == []
    assert succeeded("--remove", "all") == f"0 entries removed, 0.0 B freed ({folder}).\n"


def test_what_cannot_be_removed_or_made_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(FIRST)
    monkeypatch.setattr("shutil.rmtree", lambda *_args, **_options: None)
    for arguments in (("--remove", "1a"), ("--remove", "all")):
        result = without_ray(COMMAND, *arguments)
        assert result.exit_code == 1
        assert "could not be removed" in result.stderr
        assert "freed" not in result.output
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / "file" / "cache"))
    message = refused()
    assert f"{tmp_path / 'file' / 'cache'} cannot be made: Not a directory" in message
    assert "Set LUNAR_TUNE_CACHE to a folder that you can write" in message
