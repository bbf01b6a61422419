"""What a search decides before and after its trials, each piece alone, without Ray."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_lines import small_data

from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError
from lunar_tune.report.summary import baseline_problem
from lunar_tune.search.backends.ray import cluster
from lunar_tune.search.plan import check_output, make_folder, plan_search
from lunar_tune.trial.assemble import assemble, check_machine


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_trials": 0}, "--num-trials 0: at least 1."),
        ({"time_budget": float("nan")}, "--time-budget nan"),
        ({"gpus_per_trial": 1.5}, "--gpus-per-trial 1.5: above 1 a whole number"),
        ({"gpus_per_trial": 1.0, "device": "cpu"}, "--device cpu contradicts"),
        ({"device": "cuda:1"}, "--device cuda:1: Ray hands out the GPUs"),
        ({"address": "ray://head:10001"}, "--address ray://head:10001: a search cannot run"),
        ({"name": "n" * 121}, "--name nnnnnnnnnnnnnnnnnnnn…: at most 120 characters"),
        ({"name": "a/b"}, "--name a/b: a plain name, without folders."),
        ({"name": ".."}, "--name ..: a plain name"),
    ],
)
def test_a_value_out_of_range_is_named(options: Mapping[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        SearchConfig(**options).check()
    assert str(caught.value).startswith(expected)
    SearchConfig(time_budget=0, num_trials=1, gpus_per_trial=0, name="a.b-c").check()


SPACE = (
    "lunar: {adamw: {parameters: {layer: {type: int, low: 0, high: HIGH}, coefficient: "
    "{type: fixed, value: 2.0}, learning_rate: {type: fixed, value: 0.01}}}}"
)


def test_a_plan_says_all_that_is_wrong_with_options_space_and_data(tmp_path: Path) -> None:
    """Before anything runs: also that a layer lies beyond the model."""
    space = tmp_path / "space.yaml"
    space.write_text(SPACE.replace("HIGH", "9"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/study.journal").touch()
    options: dict[str, Any] = {"output": tmp_path, "constrain": ("retain_rouge1>=7",)}
    with pytest.raises(InputError) as caught:
        plan_search(SearchConfig(space=str(space), **options))
    for part in ("2 things are wrong", "retain_rouge1>=7", str(space), "blocks 0 to 3"):
        assert part in str(caught.value)
    options |= {"data": "mini", "forget_edge": ("X_Y",), "reference_prompts": "nosuch"}
    with pytest.raises(InputError) as caught:
        plan_search(SearchConfig(**options, sampler="grid", name="taken"))
    message = str(caught.value)
    assert message.startswith("5 things are wrong:")
    unknown = "unknown sampler 'grid'. There are: gp, tpe, random."
    for part in (unknown, "retain_rouge1>=7", "exists already", "X_Y", "nosuch"):
        assert part in message
    assert message.count("things are wrong") == 1


def test_a_goal_with_refusal_quality_reads_whole_answers_and_stops_no_trial(tmp_path: Path) -> None:
    assert plan_search(SearchConfig(output=tmp_path)).spec.engine.early_exit is True
    bounds = ("retain_rouge1>=0.8", "refusal_quality>=0.3")
    for goal in ({"minimise": "refusal_quality"}, {"constrain": bounds}):
        spec = plan_search(SearchConfig(output=tmp_path, **goal)).spec
        assert "refusal_quality" in spec.metrics
        assert (spec.engine.early_exit, spec.engine.retain_floor) == (False, None)


def test_an_output_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a folder"):
        check_output(SearchConfig(output=tmp_path / "file/below"))
    with pytest.raises(InputError, match=r"--output .*: cannot be written"):
        make_folder(SearchConfig(output=tmp_path / "file", name="n"), assemble(RunOptions()))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(InputError, match="cannot be written"):
        check_output(SearchConfig(output=tmp_path))


def test_a_model_that_forgets_nothing_or_knows_nothing_is_not_searched() -> None:
    spec = assemble(RunOptions())

    def problem(forget: float, retain: float) -> str:
        scores = {"forget_rouge1": forget, "retain_rouge1": retain}
        return baseline_problem(scores, 0.8, spec) or ""

    assert problem(0.9, 0.8) == ""
    for part in ("0.440", "floor of 0.8", "fine-tune", "--model-path", "--force"):
        assert part in problem(0.9, 0.44)
    for part in ("0.050", "nothing to forget", "A_B", "--forget-edge", "--force"):
        assert part in problem(0.05, 0.95)


TWO, SIXTEEN = {"CPU": 2.0}, {"CPU": 16.0}
SHARES: list[tuple[dict[str, float], dict[str, Any], tuple[float, float, int]]] = [
    (TWO, {}, (2, 0, 1)),
    (SIXTEEN, {}, (4, 0, 4)),
    (TWO, {"concurrency": 4}, (1, 0, 2)),
    (SIXTEEN | {"GPU": 4.0}, {}, (4, 1, 4)),
    ({"CPU": 4.0, "GPU": 8.0}, {}, (1, 1, 4)),
    (SIXTEEN | {"GPU": 1.0}, {"gpus_per_trial": 0.5}, (4, 0.5, 2)),
    (SIXTEEN | {"GPU": 4.0}, {"gpus_per_trial": 2.0}, (8, 2, 2)),
    (SIXTEEN | {"GPU": 4.0}, {"device": "cpu"}, (4, 0, 4)),
]


def test_resources_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, options, expected in SHARES:
        node = {"Alive": True, "Resources": there}
        monkeypatch.setattr("ray.nodes", lambda node=node: [node])
        shared = cluster.allocate_resources(SearchConfig(**options))
        assert (shared.cpus, shared.gpus, shared.concurrency) == expected, (there, options)


def test_a_demand_for_gpus_is_checked_where_the_trials_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match="--gpus-per-trial 1: this machine has 0 CUDA"):
        cluster.check_gpus(SearchConfig(gpus_per_trial=1))
    cluster.check_gpus(SearchConfig(gpus_per_trial=1, address="10.0.0.1:6379"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spec = assemble(RunOptions(device="cuda"))
    check_machine(spec, here=False)
    with pytest.raises(InputError, match="sees no CUDA devices"):
        check_machine(spec)


def test_a_trial_has_to_fit_on_one_node_and_every_node_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two nodes of 2 cores and 3 GPUs: a node takes one trial of 2 GPUs, not one and a half."""
    node = {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 3.0}}
    lost = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr("ray.nodes", lambda: [node, node, lost])
    shared = cluster.allocate_resources(SearchConfig(gpus_per_trial=2.0))
    assert (shared.cpus, shared.concurrency) == (2.0, 2)
    with pytest.raises(InputError, match="on one machine; Ray has 2 and 3"):
        cluster.allocate_resources(SearchConfig(gpus_per_trial=4.0))
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(InputError, match="Ray has 2 and 0"):
        cluster.allocate_resources(SearchConfig(gpus_per_trial=1.0))
    with pytest.raises(InputError, match="--device cuda: Ray has no GPU for a trial"):
        cluster.allocate_resources(SearchConfig(device="cuda"))


def test_a_folder_is_made_once_with_a_name_of_what_is_searched(tmp_path: Path) -> None:
    """Names of edges come from the data; there may be many of them."""
    runs = tmp_path / "runs"
    spec = assemble(RunOptions(data=str(small_data(tmp_path)), forget_edge=("A_B", "C_D")))
    name = make_folder(SearchConfig(output=runs), spec).name
    assert name.startswith("tiny-pairs-A_B-C_D-lunar-adamw-2")
    edges = tuple(f"../../{n}/" for n in range(90))
    data = dataclasses.replace(spec.data, forget_edges=edges)
    folder = make_folder(SearchConfig(output=runs), dataclasses.replace(spec, data=data))
    assert folder.path.parent == runs
    assert len(folder.name) <= 120

    config = SearchConfig(output=runs / "deep", name="n")
    folder = make_folder(config, spec)
    assert (folder.path, folder.name) == ((runs / "deep/n").resolve(), "n")
    folder.lock.touch()
    folder.answers(None).parent.mkdir()
    folder.answers(None).touch()
    make_folder(config, spec)  # of a search that was killed before its first trial
    folder.journal.touch()
    with pytest.raises(InputError, match=r"--name n: .* exists already.*--resume"):
        make_folder(config, spec)
    with pytest.raises(InputError, match=r"--name n: .* exists already"):
        check_output(config)
    check_output(dataclasses.replace(config, name="other"))
