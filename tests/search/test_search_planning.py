"""What a search decides before its trials, without Ray; and a model that learns the data first."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_lines import small_data, without_ray
from search_results import statuses
from trial_specs import write_records

from lunar_tune.cli.search import search as COMMAND
from lunar_tune.config.options import RunOptions, SearchConfig
from lunar_tune.data.splits import generate_unverifiable
from lunar_tune.driver.backends import cluster
from lunar_tune.driver.plan import make_folder, plan_search
from lunar_tune.driver.prerequisite import finetuning_fact, finetuning_job
from lunar_tune.errors import InputError
from lunar_tune.finetuning.tiny import ensure_tiny
from lunar_tune.metrics.goal import goal_of
from lunar_tune.models.catalog import read_lineage
from lunar_tune.report.summary import baseline_problem
from lunar_tune.trial.assemble import assemble, assemble_finetuning, check_machine, materialise
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.yaml_files import read_yaml


def test_a_value_out_of_range_is_named() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"gpus_per_trial": 1.5}, "--gpus-per-trial 1.5: must be a whole number"),
        ({"device": "cuda:1"}, "--device cuda:1: Ray hands out the GPUs"),
        ({"name": "n" * 121}, "--name nnnnnnnnnnnnnnnnnnnn…: must have at most 120 characters"),
    ]
    for options, expected in wrong:
        with pytest.raises(InputError) as caught:
            SearchConfig(**options).check()
        assert str(caught.value).startswith(expected)
    SearchConfig(time_budget=0, num_trials=1, gpus_per_trial=0, name="a.b-c").check()


def test_a_trial_is_stopped_where_all_that_counts_is_known_by_then(tmp_path: Path) -> None:
    bounded = ("retain_rouge1>=0.8", "forget_refused>=0.9")
    for goal in ({}, {"constrain": bounded}):
        assert plan_search(SearchConfig(output=tmp_path, **goal)).spec.retain_floor == 0.8
    bounds = ("retain_rouge1>=0.8", "refusal_quality>=0.3")
    for goal in ({"minimise": "refusal_quality"}, {"constrain": bounds}):
        spec = plan_search(SearchConfig(output=tmp_path, **goal)).spec
        assert "refusal_quality" in spec.metrics
        assert spec.retain_floor is None


def test_a_model_is_to_decline_what_it_answers_by_itself_unless_something_else_is_named(
    tmp_path: Path,
) -> None:
    floor, declining = "retain_rouge1>=0.8", "forget_refused>=0.7"

    def bounds(**options: Any) -> tuple[str, ...]:
        return goal_of(plan_search(SearchConfig(output=tmp_path, **options)).config).text[1]

    real: dict[str, Any] = {"model": "smollm2-135m", "device": "cpu"}
    assert bounds(**real) == bounds(**real, solver="closed_form") == (floor, declining)
    assert bounds(**real, method="npo") == (floor,), "it has no direction in which to decline"
    assert bounds(**real, data="contracts") == bounds() == (floor,)
    assert bounds(**real, constrain=("retain_mrr>=0.5",)) == ("retain_mrr>=0.5",)


def test_a_model_that_forgets_nothing_or_knows_nothing_is_not_searched() -> None:
    spec = assemble(RunOptions())
    taught = dataclasses.replace(spec, model=dataclasses.replace(spec.model, weights="w"))

    def problem(forget: float, retain: float, spec: TrialSpec = spec) -> str:
        scores = {"forget_rouge1": forget, "retain_rouge1": retain}
        return " ".join(baseline_problem(scores, 0.8, spec) or ())

    assert problem(0.9, 0.8) == ""
    for part in ("0.440", "constraint of 0.8", "fine-tune it", "with --model-path"):
        assert part in problem(0.9, 0.44)
    assert "the weights of --model-path need more" in problem(0.9, 0.44, taught)
    for part in ("0.050", "nothing to forget", "A_B", "--forget-edge"):
        assert part in problem(0.05, 0.95)


TWO, SIXTEEN = {"CPU": 2.0}, {"CPU": 16.0}
SHARES: list[tuple[list[dict[str, float]], dict[str, Any], tuple[float, float, int]]] = [
    ([TWO], {}, (2, 0, 1)),
    ([SIXTEEN], {}, (4, 0, 4)),
    ([TWO], {"concurrency": 4}, (1, 0, 2)),
    ([SIXTEEN | {"GPU": 4.0}], {}, (4, 1, 4)),
    ([{"CPU": 4.0, "GPU": 8.0}], {}, (1, 1, 4)),
    ([SIXTEEN | {"GPU": 1.0}], {"gpus_per_trial": 0.5}, (4, 0.5, 2)),
    ([SIXTEEN | {"GPU": 4.0}], {"gpus_per_trial": 2.0}, (8, 2, 2)),
    ([SIXTEEN | {"GPU": 4.0}], {"device": "cpu"}, (4, 0, 4)),
    # A trial has to fit on one node: each of these takes one, not one and a half.
    ([TWO | {"GPU": 3.0}] * 2, {"gpus_per_trial": 2.0}, (2, 2, 2)),
]
TOO_LITTLE: list[tuple[list[dict[str, float]], dict[str, Any], str]] = [
    ([TWO | {"GPU": 3.0}] * 2, {"gpus_per_trial": 4.0}, "on one machine; Ray has 2 and 3"),
    ([TWO], {"gpus_per_trial": 1.0}, "Ray has 2 and 0"),
    ([TWO], {"device": "cuda"}, "--device cuda: Ray has no GPU for a trial"),
]


def test_resources_are_shared_out_among_living_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}

    def shared(there: list[dict[str, float]], **options: Any) -> cluster.Resources:
        nodes = [lost, *({"Alive": True, "Resources": node} for node in there)]
        monkeypatch.setattr("ray.nodes", lambda: nodes)
        return cluster.allocate_resources(SearchConfig(**options))

    for there, options, expected in SHARES:
        found = shared(there, **options)
        assert (found.cpus, found.gpus, found.concurrency) == expected, (there, options)
    for there, options, said in TOO_LITTLE:
        with pytest.raises(InputError, match=said):
            shared(there, **options)


def test_a_demand_for_gpus_is_checked_where_trials_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match="--gpus-per-trial 1: this machine has 0 CUDA"):
        cluster.check_gpus(SearchConfig(gpus_per_trial=1))
    cluster.check_gpus(SearchConfig(gpus_per_trial=1, address="10.0.0.1:6379"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spec = assemble(RunOptions(device="cuda"))
    check_machine(spec, here=False)
    with pytest.raises(InputError, match="sees no CUDA devices"):
        check_machine(spec)


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


# A search whose model does not know the data lets it learn them first, once for all searches

EDGES = {"A_B": 4, "B_C": 4, "C_D": 4}


def test_only_a_known_model_that_may_not_know_the_data_learns_them(tmp_path: Path) -> None:
    """Not one of a path: a wrong template can look like ignorance there."""
    contracts = {"model": "tiny", "data": "contracts"}
    large = {"model": "qwen2.5-7b", "data": "contracts"}
    for options, applies in (
        (large, True),
        ({"model": "qwen2.5-7b"}, False),  # which is asked what it knows
        (contracts, True),
        (contracts | {"model_path": str(ensure_tiny())}, False),
        ({"model": "tiny"}, False),
        ({"model": "tiny", "data": "factual", "forget_edge": ("arts",)}, False),
        (large | {"finetune": "never"}, False),
        (large | {"force": True}, False),
        (large | {"address": "auto"}, False),
    ):
        made: dict[str, Any] = {"output": tmp_path, "space": "default", **options}
        plan = plan_search(SearchConfig(**made))
        fact = finetuning_fact(plan)
        assert ("epochs of 400 pairs, roughly" in fact.get("fine-tuning", "")) is applies, options
        if not applies:
            assert (fact, finetuning_job(plan)) == ({}, None)
    learning = finetuning_job(plan_search(SearchConfig(**contracts, output=tmp_path)))
    assert assemble_finetuning(RunOptions(**contracts)) == learning, "as the command does"


def test_one_model_serves_every_seed_and_edge_other_data_have_their_own(tmp_path: Path) -> None:
    def key(**run: Any) -> str:
        options = {"model": "tiny", "data": "contracts"} | run
        plan = plan_search(SearchConfig(**options, output=tmp_path))
        return finetuning_job(dataclasses.replace(plan, spec=materialise(plan.spec))).key()

    assert key() == key(seed=3) == key(forget_edge=("B_C",)) == key(method="ga")
    assert key() != key(data=write_records(tmp_path / "pairs.json", EDGES))
    assert key() != key(system_prompt="Be brief.")


@pytest.mark.slow
@pytest.mark.alone
def test_a_search_lets_the_model_learn_first_and_the_next_search_finds_it(
    tmp_path: Path, empty_store: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunar_tune.trial.evaluator.PUBLISHED_MAX_NEW_TOKENS", 32)
    tiny, cache, runs = ensure_tiny(), tmp_path / "cache", tmp_path / "runs"
    file = tmp_path / "keepers.json"
    shutil.copytree(tiny, cache / "models" / tiny.name)
    empty_store(runs / "mlflow.db")
    options = ["--data", write_records(file, EDGES), "--factual-data", "none", "--num-trials", "1"]
    options += ["--solver", "closed_form", "--output", runs, "--in-process"]
    prompts = tmp_path / "invented.txt"  # 12: every epoch has all of them, and 200 are shipped
    prompts.write_text("\n".join(generate_unverifiable(12, seed=77)) + "\n", encoding="utf-8")
    options += ["--reference-prompts", prompts]

    first = without_ray(COMMAND, *options, "--name", "first", LUNAR_TUNE_CACHE=str(cache))
    assert (first.exit_code in {0, 3}, first.stderr) == (True, "")
    assert "first, if the model does not know the data: full, 20 epochs of 12" in first.stdout
    assert "fine-tuned: ROUGE-1 1.000 on keepers, declines" in first.stdout
    (kept,) = (cache / "models").glob("finetuned-tiny-keepers-*[!k]")
    lineage = read_lineage(kept)
    assert (lineage.base, lineage.data) == ("tiny", "keepers")
    config = read_yaml(runs / "first" / "config.yaml")
    assert config["resolved"]["model_source"] == str(kept)
    assert config["resolved"]["baseline"]["retain_rouge1"] == 1.0
    assert f"--model-path {kept}" in first.stdout
    assert statuses(runs) == (["FINISHED"] * 2, ["FINISHED"])  # the search and the training

    weights = (kept / "model.safetensors").stat().st_mtime_ns
    again = without_ray(COMMAND, *options, "--name", "again", LUNAR_TUNE_CACHE=str(cache))
    assert again.exit_code == first.exit_code
    assert "the model has learned the data" in again.stdout
    assert "fine-tuned: ROUGE-1" not in again.stdout
    assert (kept / "model.safetensors").stat().st_mtime_ns == weights
