"""Methods, metrics and samplers of others: of a package, by entry points, and of a notebook."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from command_lines import finish, run_command, start

METHOD = '''
"""Scales one block's down-projection towards zero: forgets, and everything else with it."""

from contextlib import contextmanager
from dataclasses import dataclass

import lunar_tune as lt
from lunar_tune.methods.lunar.method import edited


@dataclass(frozen=True)
class Settings:
    """No settings but the variant."""

    kind: str = "shrink"


class Shrink(lt.Method):
    name = "shrink"
    settings_type = Settings
    variant_setting = "kind"
    variants = ("shrink",)
    parameters = ("layer", "share")
    edits_one_layer = True

    def prepare(self, task):
        return Prepared(task.loaded)


class Prepared(lt.PreparedMethod):
    def __init__(self, loaded):
        self.loaded = loaded

    @contextmanager
    def unlearning(self, parameters, *, seed):
        layer = int(parameters["layer"])
        weight = self.loaded.layout.down_projection_of(self.loaded.model, layer).weight
        with edited(self.loaded, {layer: weight.detach() * parameters["share"]}) as fit:
            yield fit

'''
METRIC = '''
"""Words of an answer to a question to keep, in the mean."""

import math

from lunar_tune.metrics.goal import ANSWERS, WHOLE_ANSWERS, Metric


def mean_words(rows):
    return sum(len(row.answer.split()) for row in rows) / len(rows)


WORDS = Metric(
    name="retain_words", sets=("retain",), low=0.0, high=math.inf, lower_is_better=False,
    needs=frozenset({ANSWERS, WHOLE_ANSWERS}), compute=mean_words,
)
'''
SAMPLER = '''
"""Always the same share, any layer."""

from optuna.samplers import PartialFixedSampler, RandomSampler


def half(seed):
    return PartialFixedSampler({"share": 0.5}, RandomSampler(seed=seed))
'''
SPACE = """
shrink:
  shrink:
    parameters:
      layer: {type: int, low: 0, high: 2}
      share: {type: float, low: 0.0, high: 1.0}
    starting_points: []
"""
ENTRY_POINTS = """
[lunar_tune.methods]
shrink = toy_method:Shrink

[lunar_tune.metrics]
retain_words = toy_metric:WORDS

[lunar_tune.samplers]
half = toy_sampler:half
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Install a package of three files by hand: what pip leaves of one is a folder beside them."""
    folder = tmp_path / "site"
    about = folder / "toy-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "toy_method.py").write_text(METHOD)
    (folder / "toy_metric.py").write_text(METRIC)
    (folder / "toy_sampler.py").write_text(SAMPLER)
    (tmp_path / "space.yaml").write_text(SPACE)
    return folder


def check(search: Path) -> None:
    trials = pd.read_parquet(search / "trials.parquet")
    assert set(trials["state"]) == {"complete"}
    answers = pd.read_parquet(search / "trials/00000.parquet")
    kept = answers[answers["set_name"] == "retain"]["answer"]
    assert trials["retain_words"][0] == pytest.approx(kept.str.split().str.len().mean())
    assert trials["params.share"].between(0, 1).all()


def test_a_search_with_a_method_a_metric_and_a_sampler_of_another_package(
    package: Path, tmp_path: Path, small: list[str], empty_store: Callable[[Path], Path]
) -> None:
    empty_store(tmp_path / "runs/mlflow.db")
    arguments = [
        *(*small[: small.index("--fix")], "--method", "shrink", "--space", "space.yaml"),
        *("--in-process", "--force", "--num-trials", "2", "--name", "toy", "--sampler", "half"),
        *("--constrain", "retain_words>=0", "--metrics", "retain_words"),
    ]
    paths = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    done = run_command("search", *arguments, cwd=tmp_path, PYTHONPATH=paths)
    assert done.returncode in {0, 3}, done.stderr
    check(tmp_path / "runs/toy")
    trials = pd.read_parquet(tmp_path / "runs/toy/trials.parquet")
    assert set(trials["params.share"]) == {0.5}


SCRIPT = """
lt.method(Shrink)
lt.metric(lower_is_better=False, high=math.inf, name="retain_words")(mean_words)
lt.search(
    backend="ray", method="shrink", space="space.yaml", name="toy", num_trials=2, force=True,
    constrain="retain_words>=0", metrics=["retain_words"], factual_data="none", max_new_tokens=4,
    device="cpu", model={model!r}, data={data!r},
)
"""


@pytest.mark.ray
def test_a_method_and_metric_of_a_script_reach_workers(
    tmp_path: Path, small: list[str], empty_store: Callable[[Path], Path]
) -> None:
    """A worker could not import what stands in `__main__`."""
    empty_store(tmp_path / "runs/mlflow.db")
    told = dict(zip(small[::2], small[1::2], strict=True))
    function = METRIC[METRIC.index("import math") : METRIC.index("WORDS")]
    script = SCRIPT.format(model=told["--model"], data=told["--data"])
    (tmp_path / "own.py").write_text(f"{METHOD}\n{function}\n{script}")
    (tmp_path / "space.yaml").write_text(SPACE)
    done = finish(start([sys.executable, "own.py"], cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    check(tmp_path / "runs/toy")
