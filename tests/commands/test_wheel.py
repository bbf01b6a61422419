"""An installed wheel, away from the checkout: it finds its search spaces and data, and searches."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import finish, run_command, start
from search_results import rows_of, statuses

from lunar_tune.yaml_files import read_yaml

pytestmark = pytest.mark.slow  # a search of its own

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = finish(start([sys.executable, *build], cwd=folder))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the wheel is installed in; it comes before the checkout."""
    target = tmp_path_factory.mktemp("installed")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    done = finish(start([sys.executable, *pip, str(wheel)], cwd=target))
    assert done.returncode == 0, done.stderr
    return target


def test_the_wheel_holds_the_data_and_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lunar_tune"}
    for folder in ("datasets", "search_spaces"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        expected = {path.relative_to(ROOT / folder).as_posix() for path in files}
        prefix = f"lunar_tune/_bundled/{folder}/"
        assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == expected
    assert {f"lunar_tune/report/page.{kind}" for kind in ("html.j2", "css", "js")} <= set(names)
    assert {f"lunar_tune/data/{name}" for name in ("published.toml", "unverifiable.txt")} <= set(
        names
    )
    assert "lunar_tune/export/card.md.j2" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_package_that_is_imported_is_the_installed_one(installed: Path, tmp_path: Path) -> None:
    code = "import lunar_tune; from lunar_tune.files import datasets_dir, search_spaces_dir; "
    code += "print(lunar_tune.__file__, datasets_dir(), search_spaces_dir(), sep='\\n')"
    command = [sys.executable, "-c", code]
    done = finish(start(command, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert Path(line).is_relative_to(installed), line
        assert Path(line).exists()


def test_an_installed_search_runs_from_another_folder(
    installed: Path, small: list[str], tmp_path: Path, empty_store: Callable[[Path], Path]
) -> None:
    """The model knows nothing; told to go on, the search ends with exit code 3."""
    empty_store(tmp_path / "runs" / "mlflow.db")
    shipped = ["--data", "mini", "--factual-data", "factual", "--evaluation-rows", "4"]
    options = [*small, "--fix", "epochs=2", *shipped, "--force", "--name", "n"]
    done = run_command(
        *("search", *options, "--num-trials", "1", "--in-process"),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert done.returncode == 3, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    config = read_yaml(tmp_path / "runs/n/config.yaml")
    assert config["options"]["space"]["value"] == "default by depth (3 blocks)"
    assert config["resolved"]["rows"] == {"forget": 4, "retain": 4, "factual": 4}
    trials = [(row["state"], row["feasible"]) for row in rows_of(tmp_path / "runs/n")]
    assert trials == [("complete", False)]
    assert "going on as told: the base model" in done.stdout
    assert "No trial keeps retain ROUGE-1 of at least 0.8" in done.stdout
    assert "No trial keeps retain" in (tmp_path / "runs/n/report.md").read_text()
    assert "lunar_tune.unlearn" not in done.stdout, "there is no best setting to run again"
    assert not (tmp_path / "runs/n/best.yaml").exists()
    assert statuses(tmp_path / "runs") == (["FINISHED"], ["FINISHED"])
