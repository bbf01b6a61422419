"""The wheel, away from the checkout: it holds all that the package reads, and finds it."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from command_lines import finish, start

pytestmark = pytest.mark.slow  # processes of their own

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import runpy, sys
import lunar_tune
from lunar_tune.files import datasets_dir, search_spaces_dir
print(lunar_tune.__file__, datasets_dir(), search_spaces_dir(), sep="\\n")
sys.argv = ["search", "--dry-run", "--model", "llama3-8b"]
runpy.run_module("lunar_tune.search", run_name="__main__")
"""


def files_of(folder: Path) -> set[str]:
    """Return the files of a folder as git would have them, by their place in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files if path.suffix != ".pyc"}


def test_the_wheel_holds_one_package_with_its_data_and_plans_a_search_elsewhere(
    tmp_path: Path,
) -> None:
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = finish(start([sys.executable, *build], cwd=tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lunar_tune"}
    expected = {f"lunar_tune/{name}" for name in files_of(ROOT / "lunar_tune")}
    for folder in ("datasets", "search_spaces"):
        expected |= {f"lunar_tune/_bundled/{folder}/{name}" for name in files_of(ROOT / folder)}
    assert {name for name in names if name.startswith("lunar_tune/")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)

    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere.mkdir()
    program = [sys.executable, "-c", PROGRAM]
    done = finish(start(program, cwd=elsewhere, PYTHONPATH=str(installed)))
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[:3]:
        assert Path(line).is_relative_to(installed), line
        assert Path(line).exists()
    assert "contracts: forget A_B (20 questions)" in done.stdout
    assert list(elsewhere.iterdir()) == []
