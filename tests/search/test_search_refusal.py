"""A search after refusal quality, on a model that knows nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command_lines import without_ray
from refusals_by_hand import cosine_mean, states_behind_an_empty_question
from search_results import rows_of
from shared_searches import FULL_BUDGET
from transformers import AutoModelForCausalLM, AutoTokenizer

from lunar_tune.cli.search import COMMAND
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.data.data_catalog import resolve_data
from lunar_tune.search.plan import plan_search
from lunar_tune.yaml_files import read_yaml

DECLINED = resolve_data("refusals", kind="prompts").read_text(encoding="utf-8").splitlines()


def value_of(option: str, small: list[str]) -> str:
    return small[small.index(option) + 1]


def test_a_search_raises_refusal_quality_and_confirms_the_best(
    small: list[str],
    tmp_path: Path,
    empty_store: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lunar_tune.trial.evaluator.PUBLISHED_MAX_NEW_TOKENS", FULL_BUDGET)
    empty_store(tmp_path / "runs" / "mlflow.db")
    place = ("--output", tmp_path / "runs", "--name", "n", "--num-trials", "3", "--in-process")
    space = str(Path(value_of("--data", small)).parent / "space.yaml")
    goal = ("--minimise", "refusal_quality", "--constrain", "forget_rouge1<=1")
    done = without_ray(COMMAND, *small, *place, "--space", space, *goal, "--force")
    assert (done.exit_code, done.stderr) == (0, "")

    folder = value_of("--model", small)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = json.loads(Path(value_of("--data", small)).read_text())
    truths = [pair["answer"] for pair in pairs if pair["edge"] == "A_B"]
    refusals = states_behind_an_empty_question(model, tokenizer, DECLINED)
    origin = states_behind_an_empty_question(model, tokenizer, [*DECLINED, *truths]).mean(0)

    def quality(file: Path) -> float:
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
        answers = [row["answer"] for row in rows if row["set_name"] == "forget"]
        states = states_behind_an_empty_question(model, tokenizer, answers)
        return cosine_mean(states - origin, refusals - origin)

    rows = rows_of(tmp_path / "runs/n")
    values = {row["number"]: row["refusal_quality"] for row in rows}
    assert len(values) == 3
    for number, value in values.items():
        file = tmp_path / f"runs/n/trials/{number:05d}.parquet"
        assert value == pytest.approx(quality(file), abs=1e-5)
    best = read_yaml(tmp_path / "runs/n/best.yaml")
    assert best["trial"] == max(values, key=lambda number: values[number])
    assert best["confirmed"]["max_new_tokens"] == FULL_BUDGET
    assert -1 <= best["confirmed"]["scores"]["refusal_quality"] <= 1
    assert best["baseline"]["refusal_quality"] not in values.values()


@pytest.mark.parametrize(
    "goal",
    [
        {"minimise": "refusal_quality"},
        {"constrain": ("retain_rouge1>=0.8", "refusal_quality>=0.3")},
    ],
)
def test_a_goal_with_refusal_quality_reads_whole_answers_and_stops_no_trial(
    goal: dict[str, Any], tmp_path: Path
) -> None:
    assert plan_search(SearchConfig(output=tmp_path)).spec.engine.early_exit is True
    spec = plan_search(SearchConfig(output=tmp_path, **goal)).spec
    assert "refusal_quality" in spec.metrics
    assert spec.engine.early_exit is False
    assert spec.engine.retain_floor is None
