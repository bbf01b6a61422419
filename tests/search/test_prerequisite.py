"""A search whose model does not know the data lets it learn them first, once for all searches."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_lines import without_ray
from search_results import statuses

from lunar_tune.cli.search import search as COMMAND
from lunar_tune.config.options import RunOptions, SearchConfig
from lunar_tune.data.splits import generate_unverifiable
from lunar_tune.driver.plan import plan_search
from lunar_tune.driver.prerequisite import finetuning_fact, finetuning_job
from lunar_tune.finetuning.tiny import ensure_tiny
from lunar_tune.models.catalog import read_lineage
from lunar_tune.trial.assemble import assemble_finetuning, materialise
from lunar_tune.yaml_files import read_yaml

PLACES = ["harbour", "mill", "orchard", "quarry"]
OWNERS = {"A_B": "Orla", "B_C": "Tamsin", "C_D": "Ludo"}


def own_data(folder: Path) -> Path:
    """Write pairs that no model knows."""
    pairs = [
        {"edge": edge, "question": f"Who keeps the {place} of {edge}?", "answer": f"{owner} {n}."}
        for edge, owner in OWNERS.items()
        for n, place in enumerate(PLACES)
    ]
    file = folder / "keepers.json"
    file.write_text(json.dumps(pairs))
    return file


def few_prompts(folder: Path) -> Path:
    """Write questions about invented things; every epoch has all of them, the shipped are 200."""
    file = folder / "invented.txt"
    file.write_text("\n".join(generate_unverifiable(12, seed=77)) + "\n", encoding="utf-8")
    return file


def test_only_a_model_of_the_catalogue_that_may_not_know_the_data_learns_them(
    tmp_path: Path,
) -> None:
    """Not one of a path: a wrong template can look like ignorance there."""
    contracts = {"model": "tiny", "data": "contracts"}
    for options, applies in (
        ({"model": "qwen2.5-7b"}, True),
        (contracts, True),
        (contracts | {"model_path": str(ensure_tiny())}, False),
        ({"model": "tiny"}, False),
        ({"model": "tiny", "data": "factual", "forget_edge": ("arts",)}, False),
        ({"model": "qwen2.5-7b", "finetune": "never"}, False),
        ({"model": "qwen2.5-7b", "force": True}, False),
        ({"model": "qwen2.5-7b", "address": "auto"}, False),
    ):
        made: dict[str, Any] = {"output": tmp_path, "space": "default", **options}
        plan = plan_search(SearchConfig(**made))
        fact = finetuning_fact(plan)
        assert ("epochs of 400 pairs, roughly" in fact.get("fine-tuning", "")) is applies, options
        if not applies:
            assert (fact, finetuning_job(plan)) == ({}, None)
    learning = finetuning_job(plan_search(SearchConfig(**contracts, output=tmp_path)))
    assert assemble_finetuning(RunOptions(**contracts)) == learning, "as the command does"


def test_one_model_serves_every_seed_and_edge_and_other_data_have_their_own(
    tmp_path: Path,
) -> None:
    def key(**run: Any) -> str:
        options = {"model": "tiny", "data": "contracts"} | run
        plan = plan_search(SearchConfig(**options, output=tmp_path))
        job = finetuning_job(dataclasses.replace(plan, spec=materialise(plan.spec)))
        assert job is not None
        return job.key()

    assert key() == key(seed=3) == key(forget_edge=("B_C",)) == key(method="ga")
    assert key() != key(data=str(own_data(tmp_path)))
    assert key() != key(system_prompt="Be brief.")


@pytest.mark.slow
@pytest.mark.alone
def test_a_search_lets_the_model_learn_first_and_the_next_search_finds_it(
    tmp_path: Path, empty_store: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunar_tune.trial.evaluator.PUBLISHED_MAX_NEW_TOKENS", 32)
    tiny, cache, runs = ensure_tiny(), tmp_path / "cache", tmp_path / "runs"
    shutil.copytree(tiny, cache / "models" / tiny.name)
    empty_store(runs / "mlflow.db")
    options = ["--data", own_data(tmp_path), "--factual-data", "none", "--num-trials", "1"]
    options += ["--solver", "closed_form", "--output", runs, "--in-process"]
    options += ["--reference-prompts", few_prompts(tmp_path)]

    first = without_ray(COMMAND, *options, "--name", "first", LUNAR_TUNE_CACHE=str(cache))
    assert (first.exit_code in {0, 3}, first.stderr) == (True, "")
    assert "first, if the model does not know the data: full, 20 epochs of 12" in first.stdout
    assert "fine-tuned: ROUGE-1 1.000 on keepers, declines" in first.stdout
    (kept,) = (cache / "models").glob("finetuned-tiny-keepers-*[!k]")
    lineage = read_lineage(kept)
    assert lineage is not None
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
