"""What a search decides before and after its trials, each piece alone, without Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_lines import small_data

from lunar_tune.config.options import RunOptions, SearchConfig
from lunar_tune.driver.backends import cluster
from lunar_tune.driver.plan import make_folder, plan_search
from lunar_tune.errors import InputError
from lunar_tune.report.summary import baseline_problem
from lunar_tune.trial.assemble import assemble, check_machine


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gpus_per_trial": 1.5}, "--gpus-per-trial 1.5: above 1 a whole number"),
        ({"device": "cuda:1"}, "--device cuda:1: Ray hands out the GPUs"),
        ({"name": "n" * 121}, "--name nnnnnnnnnnnnnnnnnnnn…: at most 120 characters"),
    ],
)
def test_a_value_out_of_range_is_named(options: Mapping[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        SearchConfig(**options).check()
    assert str(caught.value).startswith(expected)
    SearchConfig(time_budget=0, num_trials=1, gpus_per_trial=0, name="a.b-c").check()


def test_a_goal_with_refusal_quality_reads_whole_answers_and_stops_no_trial(tmp_path: Path) -> None:
    assert plan_search(SearchConfig(output=tmp_path)).spec.early_exit is True
    bounds = ("retain_rouge1>=0.8", "refusal_quality>=0.3")
    for goal in ({"minimise": "refusal_quality"}, {"constrain": bounds}):
        spec = plan_search(SearchConfig(output=tmp_path, **goal)).spec
        assert "refusal_quality" in spec.metrics
        assert (spec.early_exit, spec.retain_floor) == (False, None)


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
