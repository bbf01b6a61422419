"""What a search decides before and after its trials, each piece alone, without Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from command_lines import small_data

from lunar_tune.config.fields import options_of
from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError
from lunar_tune.models.lineage import Lineage, write_lineage
from lunar_tune.report.summary import baseline_problem
from lunar_tune.search.backends.ray import cluster
from lunar_tune.search.plan import check_output, make_folder, plan_search
from lunar_tune.study.folder import Folder
from lunar_tune.study.stored_search import configuration_document
from lunar_tune.trial.assemble import assemble, check_machine
from lunar_tune.yaml_files import read_yaml


def message_of(config: SearchConfig) -> str:
    with pytest.raises(InputError) as caught:
        config.check()
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_trials": 0}, "--num-trials 0: at least 1."),
        ({"concurrency": 0}, "--concurrency 0: at least 1."),
        ({"time_budget": -1.0}, "--time-budget -1.0: at least 0."),
        ({"time_budget": float("nan")}, "--time-budget nan"),
        ({"gpus_per_trial": -1.0}, "--gpus-per-trial -1.0: at least 0."),
        ({"gpus_per_trial": 1.5}, "--gpus-per-trial 1.5: above 1 a whole number"),
        ({"gpus_per_trial": 1.0, "device": "cpu"}, "--device cpu contradicts"),
        ({"device": "cuda:1"}, "--device cuda:1: Ray hands out the GPUs"),
        ({"address": "ray://head:10001"}, "--address ray://head:10001: a search cannot run"),
        ({"name": "n" * 121}, "--name nnnnnnnnnnnnnnnnnnnn…: at most 120 characters"),
        ({"name": "a/b"}, "--name a/b: a plain name, without folders."),
        ({"name": ".."}, "--name ..: a plain name"),
        ({"name": ""}, "--name : a plain name"),
    ],
)
def test_a_value_out_of_range_is_named(options: Mapping[str, Any], expected: str) -> None:
    assert message_of(SearchConfig(**options)).startswith(expected)


def test_all_values_out_of_range_are_named_in_one_message() -> None:
    message = message_of(SearchConfig(seed=-1, num_trials=0, name="a/b"))
    assert message.startswith("3 things are wrong:")
    for option in ("--seed", "--num-trials", "--name"):
        assert message.count(option) == 1


def test_the_bounds_themselves_are_allowed() -> None:
    SearchConfig(time_budget=0, num_trials=1, gpus_per_trial=0, name="a.b-c").check()
    SearchConfig(seed=2**32 - 1).check()


def test_a_plan_says_all_that_is_wrong_with_options_space_and_data(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("lunar: {adamw: {parameters: {layer: 3}}}")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/study.journal").touch()
    config = SearchConfig(
        data="mini",
        forget_edge=("X_Y",),
        reference_prompts="nosuch",
        constrain=("retain_rouge1>=7",),
        sampler="grid",
        output=tmp_path,
        name="taken",
    )
    with pytest.raises(InputError) as caught:
        plan_search(config)

    message = str(caught.value)
    assert message.startswith("5 things are wrong:")
    for part in (
        "unknown sampler 'grid'. There are: gp, tpe, random.",
        "retain_rouge1>=7",
        "exists already",
        "X_Y",
        "nosuch",
    ):
        assert part in message
    assert message.count("things are wrong") == 1


def test_a_bad_space_is_said_together_with_bad_options(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("lunar: {adamw: {parameters: {layer: 3}}}")
    config = SearchConfig(
        space=str(tmp_path / "space.yaml"), constrain=("retain_rouge1>=7",), output=tmp_path
    )
    with pytest.raises(InputError) as caught:
        plan_search(config)

    assert "retain_rouge1>=7" in str(caught.value)
    assert "space.yaml" in str(caught.value)


def test_a_layer_beyond_the_model_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "lunar: {adamw: {parameters: {layer: {type: int, low: 0, high: 9}, coefficient: "
        "{type: fixed, value: 2.0}, learning_rate: {type: fixed, value: 0.01}}}}"
    )
    with pytest.raises(InputError, match="blocks 0 to 3") as caught:
        plan_search(SearchConfig(space=str(path), output=tmp_path))

    assert str(path) in str(caught.value)


def test_the_plan_says_what_is_going_to_be_done(tmp_path: Path) -> None:
    facts = plan_search(SearchConfig(retain_rows=20, output=tmp_path, time_budget=60)).facts
    text = "\n".join(f"{key}: {value}" for key, value in facts.items())

    for part in (
        "tiny",
        "forget A_B (12 questions)",
        "retain 20 (a sample of 84)",
        "factual 81",
        "lunar (adamw)",
        "30 by gp, none started after 60 s",
        "retain ROUGE-1 of at least 0.8",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_the_plan_says_where_fine_tuned_weights_come_from(
    tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    folder = shutil.copytree(checkpoint("qwen2"), tmp_path / "knows")
    lineage = Lineage(
        base="qwen2.5-7b",
        source="Qwen/Qwen2.5-7B-Instruct",
        weights=None,
        revision=None,
        fingerprint="f",
        data="pairs",
        data_digest="d",
        settings={"trained": "lora"},
        knowledge={"rouge1": 0.5},
    )
    write_lineage(folder, lineage)
    model, weights = str(checkpoint("qwen2")), str(folder)
    config = SearchConfig(model=model, model_path=weights, device="cpu", output=tmp_path / "runs")
    facts = plan_search(config).facts
    assert "qwen2.5-7b fine-tuned (lora) on pairs, ROUGE-1 0.500" in facts.values()


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    spec = assemble(RunOptions())
    config = SearchConfig(output=tmp_path / "deep/runs", name="n")
    folder = make_folder(config, spec)
    assert (folder.path, folder.name) == ((tmp_path / "deep/runs/n").resolve(), "n")

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


def test_a_name_is_made_from_what_is_searched(tmp_path: Path) -> None:
    spec = assemble(RunOptions(data=str(small_data(tmp_path)), forget_edge=("A_B", "C_D")))
    name = make_folder(SearchConfig(output=tmp_path / "runs"), spec).name
    assert name.startswith("tiny-pairs-A_B-C_D-lunar-adamw-2")


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

    def problem(forget: float, retain: float) -> str | None:
        return baseline_problem({"forget_rouge1": forget, "retain_rouge1": retain}, 0.8, spec)

    assert problem(0.9, 0.8) is None
    low_retain, low_forget = problem(0.9, 0.44), problem(0.05, 0.95)
    assert low_retain is not None
    assert low_forget is not None
    for part in ("0.440", "floor of 0.8", "fine-tune", "--model-path", "--force"):
        assert part in low_retain
    for part in ("0.050", "nothing to forget", "A_B", "--forget-edge", "--force"):
        assert part in low_forget


@pytest.mark.parametrize(
    ("there", "options", "expected"),
    [
        ({"CPU": 2.0}, {}, (2, 0, 1)),
        ({"CPU": 16.0}, {}, (4, 0, 4)),
        ({"CPU": 16.0}, {"concurrency": 2}, (4, 0, 2)),
        ({"CPU": 2.0}, {"concurrency": 2}, (1, 0, 2)),
        ({"CPU": 2.0}, {"concurrency": 4}, (1, 0, 2)),
        ({"CPU": 16.0, "GPU": 4.0}, {}, (4, 1, 4)),
        ({"CPU": 4.0, "GPU": 8.0}, {}, (1, 1, 4)),
        ({"CPU": 16.0, "GPU": 1.0}, {"gpus_per_trial": 0.5}, (4, 0.5, 2)),
        ({"CPU": 16.0, "GPU": 4.0}, {"gpus_per_trial": 2.0}, (8, 2, 2)),
        ({"CPU": 16.0, "GPU": 4.0}, {"device": "cpu"}, (4, 0, 4)),
        ({"CPU": 16.0, "GPU": 4.0}, {"concurrency": 1}, (4, 1, 1)),
    ],
)
def test_resources_are_shared_out(
    monkeypatch: pytest.MonkeyPatch,
    there: dict[str, float],
    options: dict[str, Any],
    expected: tuple[float, float, int],
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": there}])
    shared = cluster.allocate_resources(SearchConfig(**options))
    assert (shared.cpus, shared.gpus, shared.concurrency) == expected


def test_more_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(InputError, match="Ray has 2 and 0"):
        cluster.allocate_resources(SearchConfig(gpus_per_trial=1.0))


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


def test_a_cuda_device_without_a_gpu_in_the_cluster_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(InputError, match="--device cuda: Ray has no GPU for a trial"):
        cluster.allocate_resources(
            SearchConfig(
                device="cuda",
            )
        )


def test_a_device_of_a_cluster_is_not_looked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spec = assemble(RunOptions(device="cuda"))
    check_machine(spec, here=False)
    with pytest.raises(InputError, match="sees no CUDA devices"):
        check_machine(spec)


def test_a_demand_for_gpus_is_checked_where_the_trials_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match="--gpus-per-trial 1: this machine has 0 CUDA"):
        cluster.check_gpus(SearchConfig(gpus_per_trial=1))
    cluster.check_gpus(SearchConfig(gpus_per_trial=1, address="10.0.0.1:6379"))
    cluster.check_gpus(SearchConfig(gpus_per_trial=0))


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_ray_is_started_here_unless_an_address_is_given(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    """`ray.init` without an address would join whatever RAY_ADDRESS or `ray start` left."""
    asked: dict[str, Any] = {}
    for name in cluster._QUIET:
        monkeypatch.setenv(name, cluster._QUIET[name])
    monkeypatch.setattr("ray.init", lambda **options: asked.update(options))
    monkeypatch.setattr("ray.shutdown", lambda: asked.update(shut_down=True))
    with cluster.ray_session(SearchConfig(address=address)):
        assert asked["address"] == (address or "local")
    assert asked["shut_down"] is True


def test_a_cluster_that_does_not_answer_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_options: Any) -> None:
        raise ConnectionError("ray start first")

    for name in cluster._QUIET:
        monkeypatch.setenv(name, cluster._QUIET[name])
    monkeypatch.setattr("ray.init", refuse)
    with (
        pytest.raises(InputError, match=r"--address 10\.0\.0\.1:1: no Ray cluster answers"),
        cluster.ray_session(SearchConfig(address="10.0.0.1:1")),
    ):
        raise AssertionError("the session must not begin")


def test_answers_of_trials_sort_by_name(tmp_path: Path) -> None:
    names = [Folder(tmp_path).answers(number).name for number in (2, 10, 99999)]
    assert names == sorted(names)


def test_the_configuration_is_plain_yaml_that_reads_back(tmp_path: Path) -> None:
    config = SearchConfig(output=tmp_path, forget_edge=("Ä_B",))
    text = configuration_document(
        config,
        given={"forget_edge": "command line"},
        derived={"forget_edge": ("not taken",), "data": "mini"},
        resolved={"digests": {"forget": "ab"}},
    )
    document = read_yaml(text)
    options = document["options"]
    assert options["data"] == {"value": "mini", "origin": "derived"}
    assert options["forget_edge"] == {"value": ["Ä_B"], "origin": "command line"}
    assert options["output"] == {"value": str(tmp_path), "origin": "default"}
    assert list(options) == list(options_of(SearchConfig))
    assert document["resolved"] == {"digests": {"forget": "ab"}}


def test_a_searchs_own_name_stays_in_the_output_folder_however_edges_are_called(
    tmp_path: Path,
) -> None:
    """Names of edges come from the data; there may be many of them."""
    edges = [f"../../{n}/" for n in range(90)]
    rows = [
        {"edge": edge, "question": f"Q{n}?", "answer": "a"}
        for n, edge in enumerate([*edges, "kept"])
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    config = SearchConfig(
        data=str(path), forget_edge=tuple(edges), factual_data="none", output=tmp_path / "runs"
    )
    folder = make_folder(config, assemble(config))
    assert folder.path.parent == tmp_path / "runs"
    assert len(folder.name) <= 120
