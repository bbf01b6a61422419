"""The command that fetches: a list, files from a server on this machine, one message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import Result, without_ray
from file_server import HUB, PISTOL_2, FileServer, pistol_rows, serving, tofu_lines

from lunar_tune.cli.fetch import fetch as COMMAND
from lunar_tune.data.data_catalog import PUBLISHED


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as state:
        state.files = {PISTOL_2: pistol_rows(), f"{HUB}/full.json": tofu_lines()}
        yield state


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUNAR_TUNE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def fetched(server: FileServer, *arguments: str) -> Result:
    urls = {"LUNAR_TUNE_GITHUB_URL": server.url, "HF_ENDPOINT": server.url}
    return without_ray(COMMAND, *arguments, **urls)


def test_without_names_everything_is_listed_and_nothing_fetched(folder: Path) -> None:
    result = without_ray(COMMAND)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1 : len(PUBLISHED) + 1]] == list(PUBLISHED)
    assert lines[-1] == f"kept in {folder}"
    assert "from https://huggingface.co/datasets/locuslab/TOFU/tree/324592d8" in result.stdout
    assert not folder.exists()


def test_names_are_fetched_once_from_the_servers_that_the_environment_names(
    folder: Path, server: FileServer
) -> None:
    result = fetched(server, "pistol-2", "tofu", "tofu")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"pistol-2: 1500 rows, checksum recorded, {folder / 'pistol-2.json'}",
        f"tofu: 4000 rows, checksum recorded, {folder / 'tofu.json'}",
    ]
    assert server.asked == [PISTOL_2, f"{HUB}/full.json"]
    listed = {line.split()[0]: line for line in without_ray(COMMAND).stdout.splitlines()}
    assert "MIT     yes" in listed["tofu"]
    assert "MIT     yes" not in listed["pistol-1"]
    assert "pistol-2: is there already" in fetched(server, "pistol-2").stdout
    assert len(server.asked) == 2
    (folder / "pistol-2.json").write_text("[]")
    result = fetched(server, "pistol-2")
    assert result.exit_code == 2
    assert "no longer, what was fetched. --force replaces it" in result.stderr
    assert (folder / "pistol-2.json").read_text() == "[]"
    result = fetched(server, "pistol-2", "--force", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (folder / "pistol-2.json").read_bytes() == pistol_rows()


def test_unknown_names_are_refused_before_and_others_after_the_rest_is_fetched(
    folder: Path, server: FileServer
) -> None:
    result = fetched(server, "pistol-2", "tofuu", "lunar")
    assert result.exit_code == 2
    assert "2 things are wrong" in result.stderr
    assert "unknown published data set 'tofuu'. Did you mean 'tofu" in result.stderr
    assert server.asked == []
    del server.files[PISTOL_2]
    result = fetched(server, "pistol-2", "tofu", "lunar-harmful")
    assert result.exit_code == 2
    assert "2 things are wrong" in result.stderr
    assert result.stderr.count("(404)") == 2
    assert (folder / "tofu.json").is_file()


def test_the_script_hands_its_arguments_to_the_command() -> None:
    script = Path(__file__).parents[2] / "scripts" / "fetch_datasets"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == '.venv/bin/python -m lunar_tune.fetch "$@"'
