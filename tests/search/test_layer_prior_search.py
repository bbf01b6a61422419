"""Searches of the tiny model that begin with scored layers, then with what the first found."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import run_command
from priors import prior_of
from search_results import rows_of

from lunar_tune.cli.layers import COMMAND

# 0.5: with a coefficient of 2 the tiny model repeats itself whichever layer is steered.

pytestmark = pytest.mark.slow  # a search of its own

SPACE = """
lunar:
  adamw:
    parameters:
      layer: {type: int, low: 0, high: 3}
      coefficient: {type: float, low: 0.5, high: 8.0}
      learning_rate: {type: float, low: 1e-4, high: 3e-2, log: true}
    starting_points:
      - {layer: 1, coefficient: 0.5, learning_rate: 0.003}
"""

QUICK = ("--fix", "epochs=6")


@dataclass(frozen=True)
class Searched:
    """A search that has ended."""

    done: subprocess.CompletedProcess[str]
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    @property
    def parameters(self) -> list[dict[str, Any]]:
        names = ("layer", "coefficient", "learning_rate")
        return [{name: row[f"params.{name}"] for name in names} for row in rows_of(self.folder)]

    @property
    def best(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "best.yaml").read_text())


def run_search(cwd: Path, name: str, *options: str) -> Searched:
    done = run_command("search", "--output", "runs", "--name", name, *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return Searched(done, cwd / "runs" / name)


@pytest.fixture(scope="module")
def by_file(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Callable[[Path], Path]
) -> Searched:
    """Search two layers of four, of which 2 is the best."""
    cwd = tmp_path_factory.mktemp("priors")
    prior = prior_of({0: 0.0, 1: 0.8, 2: 0.9, 3: 0.0}, [1, 2])
    (cwd / "layers.json").write_text(prior.document(), encoding="utf-8")
    empty_store(cwd / "runs" / "mlflow.db")
    options = ("--layer-prior", "layers.json", "--num-trials", "4", *QUICK)
    return run_search(cwd, "file", *options)


@pytest.fixture(scope="module")
def by_itself(by_file: Searched) -> Searched:
    """Search again from what was found, with layers that the search scores itself."""
    cwd = by_file.folder.parents[1]
    (cwd / "space.yaml").write_text(SPACE, encoding="utf-8")
    options = ("--space", "space.yaml", "--layer-prior", "auto", "--start-from", "file")
    return run_search(cwd, "auto", *options, "--num-trials", "3", *QUICK)


def test_the_layers_of_a_file_are_searched_and_no_others(by_file: Searched) -> None:
    assert by_file.parameters[0] == {"layer": 2, "coefficient": 2.0, "learning_rate": 0.003}
    assert by_file.parameters[1] == {"layer": 1, "coefficient": 2.0, "learning_rate": 0.003}
    assert {one["layer"] for one in by_file.parameters} <= {1, 2}
    assert by_file.done.stderr == ""
    assert "1 … 2 by s1 - s2 (layers.json)" in by_file.done.stdout
    assert "2 (the best layer by s1 - s2, the space's own)" in by_file.done.stdout


def test_the_configuration_has_the_file_and_its_curve(by_file: Searched) -> None:
    config = by_file.config
    assert config["options"]["layer_prior"] == {"value": "layers.json", "origin": "command line"}
    kept = config["resolved"]["layer_prior"]
    assert kept["made_of_it"] == "1 … 2 by s1 - s2 (layers.json)"
    assert [one["score"] for one in kept["layers"]] == [0.0, 0.8, 0.9, 0.0]
    layer = config["resolved"]["space"]["parameters"]["layer"]
    assert layer == {"type": "int", "low": 1, "high": 2}


def test_the_best_setting_says_how_deep_its_model_is(by_file: Searched) -> None:
    assert by_file.best["n_layers"] == by_file.config["resolved"]["n_layers"] == 4


def test_a_search_scores_layers_as_the_command_does(
    by_itself: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the worker that then runs the trials, before the first one."""
    arguments = ("--model", "tiny", "--fix", "coefficient=0.5", "--json", "l.json")
    monkeypatch.chdir(tmp_path)
    assert COMMAND.main(arguments) == 0
    expected = json.loads((tmp_path / "l.json").read_text())
    found = by_itself.config["resolved"]["layer_prior"]
    assert found["best"] == expected["best"]
    assert found["recommended"] == expected["recommended"]
    for one, other in zip(found["layers"], expected["layers"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_search_keeps_to_the_layers_that_it_has_scored(by_itself: Searched) -> None:
    prior = by_itself.config["resolved"]["layer_prior"]
    gains = {one["layer"]: one["score"] - prior["base_model"]["score"] for one in prior["layers"]}
    good = [layer for layer, gain in gains.items() if gain >= 0.8 * max(gains.values())]
    best = max(gains, key=lambda layer: gains[layer])
    assert len(good) < 4, "else this would show nothing"
    assert {one["layer"] for one in by_itself.parameters} <= set(range(min(good), max(good) + 1))
    assert by_itself.parameters[0] == {
        "layer": best,
        "coefficient": 0.5,
        "learning_rate": 0.003,
    }
    assert "to be narrowed by s1 - s2 (auto, coefficient 0.5)" in by_itself.done.stdout
    shown = f"by s1 - s2 (auto, coefficient {0.5:g})"
    assert any(
        line.startswith("layer ") and shown in line for line in by_itself.done.stdout.splitlines()
    )
    assert by_itself.done.stderr == ""


def test_what_another_search_found_is_tried_second(by_file: Searched, by_itself: Searched) -> None:
    """The plan has it; once layers are scored its layer is the nearest of those that are left."""
    assert "2 (found in file, the space's own)" in by_itself.done.stdout
    kept = by_itself.config["resolved"]
    layer = kept["space"]["parameters"]["layer"]
    low, high = (layer.get(key, layer.get("value")) for key in ("low", "high"))
    found = by_file.best["parameters"]
    expected = found | {"layer": min(max(found["layer"], low), high)}
    assert by_itself.parameters[1] == pytest.approx(expected)
    moved = f" with layer {found['layer']} → {expected['layer']}"
    origin = "found in file" + (moved if expected != found else "")
    assert f"(the best layer by s1 - s2, {origin}" in (by_itself.folder / "report.md").read_text()
