"""The wheel away from the checkout, and what commands load: in processes of their own."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from command_lines import finish, start

ROOT = Path(__file__).resolve().parents[2]
PLANNING = """
import runpy, sys
import lunar_tune
from lunar_tune.files import shipped_folder
print(lunar_tune.__file__, shipped_folder("datasets"), shipped_folder("search_spaces"), sep="\\n")
sys.argv = ["search", "--dry-run", "--model", "llama3-8b"]
runpy.run_module("lunar_tune.search", run_name="__main__")
"""
# A process each would take seconds, so one runs the commands after another.
LOADING = """
import runpy, sys

def run(*arguments):
    sys.argv = list(arguments)
    try:
        runpy.run_module(f"lunar_tune.{arguments[0]}", run_name="__main__")
    except SystemExit as end:
        return end.code

def loaded(*names):
    return [name for name in names if name in sys.modules]

heavy = ["torch", "transformers", "ray", "mlflow", "optuna"]
assert run("cache") == 0
assert loaded(*heavy, "numpy") == []
assert run("describe", "mini") == run("fetch") == 0
assert loaded(*heavy) == []
for name in ("ray", "mlflow"):
    sys.modules[name] = None
assert run("search", "--dry-run") == 0
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
    program = [sys.executable, "-c", PLANNING]
    done = finish(start(program, cwd=elsewhere, PYTHONPATH=str(installed)))
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[:3]:
        assert Path(line).is_relative_to(installed), line
        assert Path(line).exists()
    assert "general: forget chemical_symbols (up to 30 questions)" in done.stdout
    assert list(elsewhere.iterdir()) == []


def test_lists_and_cards_load_no_torch_and_a_dry_run_needs_neither_ray_nor_mlflow(
    tmp_path: Path,
) -> None:
    program = [sys.executable, "-c", LOADING]
    done = finish(start(program, cwd=tmp_path, LUNAR_TUNE_CACHE=str(tmp_path)))
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("The cache is empty", "96 pairs, 8 edges", "kept in ", "nothing was run"):
        assert shown in done.stdout
    assert list(tmp_path.iterdir()) == []
