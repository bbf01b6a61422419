"""The command that fetches: a list, files from a server on this machine, one message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import Result, run_command, without_ray
from file_server import HUB, PISTOL_2, FileServer, pistol_rows, serving, tofu_lines

from lunar_tune.cli.fetch import COMMAND
from lunar_tune.data.data_catalog import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as state:
        state.files = {PISTOL_2: pistol_rows(), f"{HUB}/full.json": tofu_lines()}
        yield state


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUNAR_TUNE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def invoke(*arguments: str, server: FileServer | None = None, columns: int = 160) -> Result:
    urls = (
        {} if server is None else {"LUNAR_TUNE_GITHUB_URL": server.url, "HF_ENDPOINT": server.url}
    )
    return without_ray(COMMAND, *arguments, columns=columns, **urls)


def test_without_names_everything_is_listed_and_nothing_fetched(folder: Path) -> None:
    result = invoke()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1 : len(PUBLISHED) + 1]] == list(PUBLISHED)
    assert lines[-1] == f"kept in {folder}"
    assert "from https://huggingface.co/datasets/locuslab/TOFU/tree/324592d8" in result.stdout
    assert not folder.exists()


def test_names_are_fetched_from_the_servers_that_the_environment_names(
    folder: Path, server: FileServer
) -> None:
    result = invoke("pistol-2", "tofu", "tofu", server=server)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"pistol-2: 1500 rows, checksum recorded, {folder / 'pistol-2.json'}",
        f"tofu: 4000 rows, checksum recorded, {folder / 'tofu.json'}",
    ]
    assert server.asked == [PISTOL_2, f"{HUB}/full.json"]
    listed = {line.split()[0]: line for line in invoke().stdout.splitlines()}
    assert "MIT     yes" in listed["tofu"]
    assert "MIT     yes" not in listed["pistol-1"]


def test_nothing_is_shown_when_quiet(server: FileServer) -> None:
    result = invoke("pistol-2", "tofu", "--quiet", server=server)
    assert (result.exit_code, result.output) == (0, "")
    assert len(server.asked) == 2


def test_what_is_there_is_not_fetched_again_unless_forced(server: FileServer) -> None:
    assert invoke("pistol-2", server=server).exit_code == 0
    again = invoke("pistol-2", server=server)
    assert "pistol-2: is there already" in again.stdout
    assert len(server.asked) == 1
    assert "1500 rows" in invoke("pistol-2", "--force", server=server).stdout
    assert len(server.asked) == 2


def test_an_edited_file_is_replaced_by_force_alone(folder: Path, server: FileServer) -> None:
    invoke("pistol-2", server=server)
    (folder / "pistol-2.json").write_text("[]")
    result = invoke("pistol-2", server=server)
    assert result.exit_code == 2
    assert "no longer, what was fetched. --force replaces it" in result.stderr
    assert (folder / "pistol-2.json").read_text() == "[]"
    assert invoke("pistol-2", "--force", server=server).exit_code == 0
    assert (folder / "pistol-2.json").read_bytes() == pistol_rows()


def test_unknown_names_are_refused_before_anything_is_fetched(server: FileServer) -> None:
    result = invoke("pistol-2", "tofuu", "lunar", server=server)
    assert result.exit_code == 2
    assert "2 things are wrong" in result.stderr
    assert "Did you mean 'tofu" in result.stderr
    assert server.asked == []


def test_what_can_be_fetched_is_and_the_rest_is_one_message(
    folder: Path, server: FileServer
) -> None:
    del server.files[PISTOL_2]
    result = invoke("pistol-2", "tofu", "lunar-harmful", server=server)
    assert result.exit_code == 2
    assert "2 things are wrong" in result.stderr
    assert result.stderr.count("(404)") == 2
    assert "Traceback" not in result.output
    assert (folder / "tofu.json").is_file()


def test_the_command_runs_as_a_module_and_loads_no_torch(
    tmp_path: Path, server: FileServer
) -> None:
    environment = {
        "LUNAR_TUNE_GITHUB_URL": server.url,
        "LUNAR_TUNE_DATA": str(tmp_path / "elsewhere"),
        "PYTHONPROFILEIMPORTTIME": "1",
    }
    done = run_command("fetch", "pistol-2", cwd=ROOT, **environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "elsewhere" / "pistol-2.json").read_bytes() == pistol_rows()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pooch" in imported
    assert not {"torch", "transformers", "ray"} & imported


def test_the_script_hands_its_arguments_to_the_command() -> None:
    script = ROOT / "scripts" / "fetch_datasets"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == '.venv/bin/python -m lunar_tune.fetch "$@"'
