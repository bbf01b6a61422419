"""The command that lists and keeps tuned settings, on folders as a search writes them.

Covers: table, JSON, keeping, and folders that hold no finished search. The folders are made by the
search's own writers, without running one.
Does not cover: whole searches (`tests/search/test_layer_prior_search.py`), the files themselves
(`tests/search/test_tuned_store.py`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from command_lines import finish, start
from typer.testing import CliRunner

from lunar_tune.cli.running import command_app
from lunar_tune.cli.tuned import tuned
from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import SearchConfig, config_document
from lunar_tune.metrics.goal import goal_of
from lunar_tune.search.loop import Confirmation
from lunar_tune.search.outputs import best_document, write_best
from lunar_tune.search.plan import plan_search, resolved_values
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import COMPLETE, TrialRow
from lunar_tune.study.tables import write_trials

SETTING = {"layer": 2, "coefficient": 1.5, "learning_rate": 0.002}
ENDED = datetime(2026, 2, 7, 23, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUNAR_TUNE_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tuned"


def invoke(*arguments: str) -> Result:
    environment = {"COLUMNS": "160", "TERM": "dumb"}
    return CliRunner().invoke(command_app(tuned), list(arguments), env=environment)


def succeeded(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.output


def refused(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


def finished(
    name: str = "found", *, forget: float = 0.125, tokens: int = 512, **options: Any
) -> str:
    """Write what a search of `tiny` leaves that is needed here; return its folder."""
    config = SearchConfig(run=RunOptions(**options), output=Path("runs"), name=name)
    plan = plan_search(config)
    folder = Folder(Path("runs", name).resolve())
    scores = {"forget_rouge1": forget, "retain_rouge1": 0.9}
    rows = [
        TrialRow(number=n, state=COMPLETE, parameters=SETTING, scores=scores, feasible=True)
        for n in range(5)
    ]
    folder.path.mkdir(parents=True)
    write_trials(folder.trials, rows)
    confirmation = Confirmation(number=3, scores=scores, max_new_tokens=tokens)
    goal, vanilla = goal_of(config), {"forget_rouge1": 1.0, "retain_rouge1": 1.0}
    document = best_document(rows[3], confirmation, spec=plan.spec, vanilla=vanilla, goal=goal)
    write_best(folder, document)
    os.utime(folder.best, (ENDED.timestamp(), ENDED.timestamp()))
    text = config_document(config, given={}, derived={}, resolved=resolved_values(plan, vanilla))
    folder.config.write_text(text, encoding="utf-8")
    (folder.path / "report.md").write_text("what came out")
    return f"runs/{name}"


def entries() -> list[dict[str, Any]]:
    succeeded("--json", "new/tuned.json")
    return json.loads(Path("new/tuned.json").read_text())


def test_nothing_is_kept_at_first(kept: Path) -> None:
    assert succeeded() == f"Nothing is kept in {kept}.\n"
    assert entries() == []


def test_the_best_of_a_finished_search_is_kept_with_its_provenance(kept: Path) -> None:
    folder = finished(seed=7)
    assert f"mini A_B, lunar (adamw) kept in {kept / 'tiny.yaml'}" in succeeded("--keep", folder)
    (entry,) = entries()
    config = yaml.safe_load(Path(folder, "config.yaml").read_text())

    assert (entry["model"], entry["data"], entry["forget_edges"]) == ("tiny", "mini", ["A_B"])
    assert (entry["method"], entry["variant"]) == ("lunar", "adamw")
    assert entry["parameters"] == SETTING
    assert entry["scores"] == {"forget_rouge1": 0.125, "retain_rouge1": 0.9}
    assert (entry["minimise"], entry["constraints"]) == ("forget_rouge1", ["retain_rouge1>=0.8"])
    assert entry["provenance"] == {
        "search": "found",
        "date": "2026-02-07",
        "trials": 5,
        "seed": 7,
        "confirmed_in_full": True,
        "max_new_tokens": 512,
        "digests": {
            name: config["resolved"]["digests"][name] for name in ("forget", "retain", "factual")
        },
        "source": "tiny",
        "weights": None,
        "revision": None,
        "lineage": None,
        "version": config["resolved"]["version"],
    }


def test_the_table_shows_what_is_kept(kept: Path) -> None:
    succeeded("--keep", finished())
    succeeded("--keep", finished("other", forget_edges=("B_C", "A_B"), evaluation_rows=4))
    output = succeeded()
    lines = [line.split() for line in output.splitlines()]
    assert lines[0] == [
        *("model", "data", "edges", "method", "setting", "forget", "retain", "trials", "found")
    ]
    assert lines[1][:3] == ["tiny", "mini", "A_B"]
    for part in ("layer 2, coefficient 1.5, learning_rate 0.002", "0.125", "0.900", "2026-02-07"):
        assert part in output
    assert "B_C+A_B" in output
    assert output.count("not in full") == 1
    assert f"2 settings in {kept}" in output


@pytest.mark.parametrize(
    ("options", "in_full"),
    [
        ({}, True),
        ({"retain_rows": 20}, True),  # the confirmation asks all
        ({"tokens": 511}, False),
        ({"evaluation_rows": 4}, False),
        ({"holdout": True}, False),
    ],
)
def test_a_setting_says_whether_it_was_confirmed_in_full(
    options: Mapping[str, Any], in_full: bool
) -> None:
    succeeded("--keep", finished(**options))
    (entry,) = entries()
    assert entry["provenance"]["confirmed_in_full"] is in_full


def test_a_better_search_replaces_and_a_worse_one_does_not() -> None:
    first, worse, better = finished(), finished("worse", forget=0.5), finished("b", forget=0.0)
    succeeded("--keep", first)
    message = refused("--keep", worse)
    assert "it has forget_rouge1 0.125, and this one 0.5" in message
    assert [entry["provenance"]["search"] for entry in entries()] == ["found"]
    succeeded("--keep", better)
    assert [entry["provenance"]["search"] for entry in entries()] == ["b"]
    succeeded("--keep", worse, "--replace")
    assert [entry["provenance"]["search"] for entry in entries()] == ["worse"]


def test_folders_of_models_are_kept_by_their_last_name() -> None:
    """What is kept may be shared; where it lay on one machine is nobody's business."""
    folder = finished()
    path = Path(folder, "config.yaml")
    config = yaml.safe_load(path.read_text())
    config["resolved"]["model_source"] = "/home/somebody/base"
    config["run"]["model_path"]["value"] = "/home/somebody/knows"
    lineage = {"base": "b", "source": "/home/somebody/base", "settings": {"seed": 1}}
    config["resolved"]["lineage"] = lineage | {"fingerprint": "f"}
    path.write_text(yaml.safe_dump(config))
    succeeded("--keep", folder)
    (entry,) = entries()
    assert (entry["provenance"]["source"], entry["provenance"]["weights"]) == ("base", "knows")
    assert entry["provenance"]["lineage"] == {
        "base": "b",
        "source": "base",
        "revision": None,
        "fingerprint": "f",
        "data": None,
        "data_digest": None,
    }
    assert "somebody" not in json.dumps({**entry, "file": ""})


def test_a_folder_that_is_none_is_refused() -> None:
    assert "--keep nosuch: there is no such folder" in refused("--keep", "nosuch")
    Path("empty").mkdir()
    message = refused("--keep", "empty")
    assert "empty: is not the folder of a finished search (there is no config.yaml)" in message


@pytest.mark.parametrize("name", ["config.yaml", "trials.parquet"])
def test_a_search_that_lacks_a_file_is_refused(kept: Path, name: str) -> None:
    folder = finished()
    Path(folder, name).unlink()
    assert name in refused("--keep", folder)
    assert not kept.exists()


def test_a_search_without_a_feasible_setting_is_told_from_one_that_goes_on() -> None:
    folder = finished()
    Path(folder, "best.yaml").unlink()
    assert "no confirmed feasible setting" in refused("--keep", folder)
    Path(folder, "report.md").unlink()  # written at the end
    assert "not the folder of a finished search (there is no best.yaml)" in refused(
        "--keep", folder
    )


def changed_best(folder: str, **changes: Any) -> None:
    path = Path(folder, "best.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_an_infeasible_setting_is_refused(kept: Path) -> None:
    folder = finished()
    changed_best(folder, feasible=False)
    assert "is not feasible" in refused("--keep", folder)
    changed_best(folder, feasible=True, constraints=["retain_rouge1>=0.95"])
    assert "miss a constraint" in refused("--keep", folder)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        ("feasible: true\n", "model is missing"),
        ("feasible: true\nmodel: tiny\n", "parameters: is empty"),
        ("[1]", "says nothing"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_best_setting_that_says_too_little_is_refused(content: str, mistake: str) -> None:
    folder = finished()
    Path(folder, "best.yaml").write_text(content)
    message = refused("--keep", folder)
    assert f"{folder}: is not the folder of a finished search" in message
    assert mistake in message


def test_everything_wrong_with_the_options_is_said_at_once() -> None:
    Path("folder").mkdir()
    message = refused("--replace", "--json", "folder")
    assert "2 things are wrong" in message
    for part in ("--replace: says what --keep", "--json folder: is a folder"):
        assert part in message


def test_quiet_says_nothing() -> None:
    assert succeeded("--quiet", "--keep", finished()) == ""
    assert succeeded("--quiet") == ""


def test_the_command_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = """
import sys
for name in ("torch", "ray", "mlflow", "optuna"):
    sys.modules[name] = None
import runpy
sys.argv = ["tuned"]
runpy.run_module("lunar_tune.tuned", run_name="__main__")
"""
    done = finish(start([sys.executable, "-c", code], cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Nothing is kept" in done.stdout
