"""The command that shows and empties the cache of activations: table, JSON, removal, refusals."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from command_lines import Result, command, finish, run_command, start, without_ray

from lunar_tune.cli.cache import COMMAND
from lunar_tune.engine.cache import ActivationCache

ROOT = Path(__file__).resolve().parents[2]
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


def keys() -> list[str]:
    return [entry.key for entry in ActivationCache().entries()]


def invoke(*arguments: str, columns: int = 160) -> Result:
    return without_ray(COMMAND, *arguments, columns=columns)


def succeeded(*arguments: str, columns: int = 160) -> str:
    result = invoke(*arguments, columns=columns)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refused(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


def test_an_empty_cache_is_one_line(folder: Path) -> None:
    assert succeeded() == f"The cache is empty ({folder}).\n"
    assert succeeded(columns=20) == f"The cache is empty ({folder}).\n", "whatever the width"


def test_a_row_an_entry_last_used_first(folder: Path) -> None:
    """32,000 bytes of numbers a file, 31.25 KiB; headers and description are below 1 KiB."""
    fill(FIRST, files=3, days=2)
    fill(THIRD, model="qwen2.5-7b")
    header, *rows, total, limit = succeeded().splitlines()

    assert header.split() == [
        *("key", "model", "kind", "dtype", "rows", "files", "size", "last", "used")
    ]
    assert [row.split()[:6] for row in rows] == [
        ["2c2c2c2c", "qwen2.5-7b", "streams", "bfloat16", "12", "1"],
        ["1a1a1a1a", "tiny", "streams", "bfloat16", "12", "3"],
    ]
    sizes = [float(row.split()[6]) for row in rows]
    assert sizes == [pytest.approx(31.25, abs=1), pytest.approx(3 * 31.25, abs=1)]
    assert [row.split()[7] for row in rows] == ["KiB", "KiB"]
    local = [USED.astimezone(), datetime.fromtimestamp(USED.timestamp() - 2 * 86400).astimezone()]
    assert [row.split()[8:] for row in rows] == [f"{day:%Y-%m-%d %H:%M}".split() for day in local]
    assert re.fullmatch(rf"2 entries, 12\d\.\d KiB in {re.escape(str(folder))}", total)
    assert re.match(r"limit \d+\.\d GiB, unless a run says --cache-limit", limit)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**20 // 2, "1.5 MiB"),
        (25 * 2**30, "25.0 GiB"),
    ],
)
def test_sizes_are_in_binary_units(count: int, shown: str) -> None:
    from lunar_tune.cli.cache import _size

    assert _size(count) == shown


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    fill(FIRST, model="qwen2.5-0.5b")
    header, row, *_ = succeeded(columns=80).splitlines()
    assert header.split()[-2:] == ["last", "used"]
    assert "qwen2.5-0.5b" in row
    assert "2025-02-0" in row


def test_a_long_name_and_one_with_brackets_are_shown_whole() -> None:
    name = "owner/[bold]a-model-with-a-name-that-is-longer-than-its-column[/bold]"
    fill(FIRST, model=name)
    header, *lines = succeeded(columns=80).splitlines()[:-2]
    column = slice(header.index("model"), header.index("kind"))
    assert "".join(line[column].strip() for line in lines) == name


def test_an_entry_whose_description_is_lost_is_shown(folder: Path) -> None:
    fill(FIRST)
    (folder / FIRST / "about.json").unlink()
    assert succeeded().splitlines()[1].split()[:6] == ["1a1a1a1a", "?", "?", "?", "?", "1"]
    assert succeeded("--remove", "1a").startswith(f"{FIRST} (?) removed")


def test_json_has_every_entry_for_other_tools(tmp_path: Path) -> None:
    file = tmp_path / "entries.json"
    assert succeeded("--json", str(file)) == ""
    assert json.loads(file.read_text()) == []
    size = fill(FIRST, files=2)
    fill(SECOND, days=1)
    succeeded("--json", str(file), "--quiet")
    first, second = json.loads(file.read_text())
    assert first == {
        "key": FIRST,
        "kind": "streams",
        "model": "tiny",
        "dtype": "bfloat16",
        "rows": 12,
        "files": 2,
        "bytes": size,
        "used": "2025-02-07T12:30:00+00:00",
    }
    assert second["key"] == SECOND
    assert keys() == [FIRST, SECOND], "it removes nothing"


def test_the_beginning_of_a_key_is_enough_to_remove_its_entry() -> None:
    sizes = {key: fill(key) for key in (FIRST, SECOND, THIRD)}
    assert succeeded("--remove", "1B") == (
        f"{SECOND} (tiny, streams, bfloat16) removed, {sizes[SECOND] / 1024:.1f} KiB freed.\n"
    )
    assert sorted(keys()) == [FIRST, THIRD]
    succeeded("--remove", THIRD, "--quiet")
    assert keys() == [FIRST]


def test_a_key_that_is_unknown_ambiguous_or_empty_removes_nothing() -> None:
    for key in (FIRST, SECOND, THIRD):
        fill(key)
    unknown = refused("--remove", "ff")
    assert "--remove ff: no keys begin so" in unknown
    for shown in ("1a1a1a1a", "1b1b1b1b", "2c2c2c2c", "--remove all"):
        assert shown in unknown
    ambiguous = refused("--remove", "1")
    assert "--remove 1: 2 keys begin so, but it must be one" in ambiguous
    assert "1a1a1a1a" in ambiguous
    assert "2c2c2c2c" not in ambiguous
    assert "Give more characters" in ambiguous
    assert "--remove ''" in refused("--remove", "")
    assert "--remove ..: no keys begin so" in refused("--remove", "..")
    assert sorted(keys()) == [FIRST, SECOND, THIRD]


def test_many_keys_are_not_all_named() -> None:
    for number in range(10):
        fill(f"{number}" * 32)
    message = refused("--remove", "a")
    assert message.partition("There are: ")[2].count(", ") == 8
    assert "and 2 more" in message


def test_removing_from_an_empty_cache_says_so() -> None:
    assert "the cache is empty" in refused("--remove", "1a")


def test_emptying_says_how_much_was_freed_and_leaves_the_built_models(folder: Path) -> None:
    model = folder.parent / "models" / "tiny-1" / "config.json"
    model.parent.mkdir(parents=True)
    model.touch()
    fill(FIRST, files=2)
    fill(SECOND)
    assert re.fullmatch(
        rf"2 entries removed, 9\d\.\d KiB freed \({re.escape(str(folder))}\)\.\n",
        succeeded("--remove", "all"),
    )
    assert keys() == []
    assert list(folder.iterdir()) == []
    assert model.exists()
    assert succeeded("--remove", "all") == f"It was empty ({folder}).\n"


def test_what_cannot_be_removed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fill(FIRST)
    monkeypatch.setattr("shutil.rmtree", lambda *_args, **_options: None)
    for arguments in (("--remove", "1a"), ("--remove", "all")):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert "could not be removed" in result.stderr
        assert "freed" not in result.output


def test_one_thing_at_a_time() -> None:
    fill(FIRST)
    for removed in ("all", "1a"):
        assert "--remove and --json: one at a time" in refused(
            "--json", "a.json", "--remove", removed
        )
    assert keys() == [FIRST]


def test_nothing_is_shown_when_quiet() -> None:
    fill(FIRST)
    assert succeeded("--quiet") == ""
    assert succeeded("--remove", "all", "--quiet") == ""
    assert keys() == []
    assert succeeded("--quiet") == ""


def test_debug_shows_the_traceback() -> None:
    result = invoke("--remove", "1a", "--debug")
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback (most recent call last):\n")


def test_a_folder_that_cannot_be_made_is_refused_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / "file" / "cache"))
    message = refused()
    assert f"{tmp_path / 'file' / 'cache'} cannot be made: Not a directory" in message
    assert "Set LUNAR_TUNE_CACHE to a folder that you can write" in message


def test_help_names_the_options_and_says_what_removal_means() -> None:
    words = succeeded("--help-all").replace("│", " ").split()
    for option in ("--remove", "--json", "--quiet", "--debug", "KEY|all"):
        assert option in words
    assert "what is missing is computed again" in " ".join(words)


def test_the_command_runs_as_a_module(tmp_path: Path) -> None:
    fill(FIRST)
    done = run_command("cache", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1a1a1a1a" in done.stdout
    assert command("cache")[1:] == ["-m", "lunar_tune.cache"]


def test_a_command_that_only_lists_loads_no_torch() -> None:
    fill(FIRST)
    code = """
import runpy, sys
sys.argv = ["cache"]
try:
    runpy.run_module("lunar_tune.cache", run_name="__main__")
except SystemExit as end:
    print("ended with", end.code)
print([name for name in ("torch", "transformers", "numpy", "ray") if name in sys.modules])
"""
    done = finish(start([sys.executable, "-c", code], cwd=ROOT))
    assert done.stdout.splitlines()[-2:] == ["ended with 0", "[]"], done.stderr
