"""A search of the tiny model that scores layers first, then tries what another search found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import without_ray
from search_results import rows_of
from shared_searches import SharedSearch

from lunar_tune.cli.layers import COMMAND as LAYERS
from lunar_tune.cli.search import COMMAND as SEARCH
from lunar_tune.yaml_files import read_yaml

pytestmark = pytest.mark.slow  # a search of its own

# With a coefficient of 2 the tiny model repeats itself whichever layer is steered.
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
NAMES = ("layer", "coefficient", "learning_rate")


def test_a_search_keeps_to_the_layers_that_it_scores_as_the_command_does(
    finished: SharedSearch,
    empty_store: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the worker that then runs the trials; what another search found is tried second."""
    monkeypatch.chdir(tmp_path)
    empty_store(tmp_path / "runs" / "mlflow.db")
    Path("space.yaml").write_text(SPACE, encoding="utf-8")
    found = finished.copied(tmp_path / "runs")
    options = ["--space", "space.yaml", "--layer-prior", "auto", "--name", "n"]
    options += ["--start-from", f"{found}/best.yaml"]
    options += ["--num-trials", "2", "--factual-data", "none", "--retain-rows", "12"]
    done = without_ray(SEARCH, *options, "--fix", "epochs=6", "--output", "runs", "--in-process")
    assert (done.exit_code in {0, 3}, done.stderr) == (True, "")
    prior = read_yaml(tmp_path / "runs/n/config.yaml")["resolved"]["layer_prior"]
    gains = {one["layer"]: one["score"] - prior["base_model"]["score"] for one in prior["layers"]}
    good = [layer for layer, gain in gains.items() if gain >= 0.8 * max(gains.values())]
    assert len(good) < 4, "else this would show nothing"
    first, second = (
        {name: row[f"params.{name}"] for name in NAMES} for row in rows_of(tmp_path / "runs/n")
    )
    best = max(gains, key=lambda layer: gains[layer])
    assert first == {"layer": best, "coefficient": 0.5, "learning_rate": 0.003}
    before = read_yaml(found / "best.yaml")["parameters"]
    moved = min(max(before["layer"], min(good)), max(good))
    assert second == pytest.approx(before | {"layer": moved})
    for said in ("found in ", "to be narrowed by s1 - s2 (auto, coefficient 0.5)"):
        assert said in done.stdout

    assert LAYERS.main(["--fix", "coefficient=0.5", "--json", "l.json"]) == 0
    expected = json.loads(Path("l.json").read_text())
    assert (prior["best"], prior["recommended"]) == (expected["best"], expected["recommended"])
    for one, other in zip(prior["layers"], expected["layers"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
