"""Trials of a worker: on every suitable family, as `generate` would score them, ready for more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trial_specs import generated

from lunar_tune.errors import InputError, TrialError
from lunar_tune.methods.contract import Edit
from lunar_tune.metrics.rouge import rouge_recall
from lunar_tune.models.chat import encode_prompts
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.loading import LoadedModel
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

Specs = Callable[..., TrialSpec]
SOLVERS: dict[str, dict[str, Any]] = {
    "closed_form": {"layer": 1, "coefficient": 20.0, "ridge": 1e-3},
    "adamw": {"layer": 1, "coefficient": 20.0, "learning_rate": 0.01},
}


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("family", "solver"),
    [*((family, "closed_form") for family in LAYOUTS), ("llama", "adamw")],
)
def test_the_same_run_works_on_every_suitable_family_and_restores_it(
    spec: Specs, family: str, solver: str
) -> None:
    worker = Worker(spec(family=family, solver=solver, max_new_tokens=8))
    before = weights(worker.loaded)
    baseline = worker.baseline()
    inside: dict[str, torch.Tensor] = {}
    result = worker.run(SOLVERS[solver], inside=lambda model, _: inside.update(weights(model)))
    changed = [name for name in before if not torch.equal(before[name], inside[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert same(weights(worker.loaded), before)
    answers = [[row.answer for row in one.evaluation.rows] for one in (baseline, result)]
    assert answers[0] != answers[1]
    assert [row.answer for row in worker.baseline().evaluation.rows] == answers[0]
    assert len(result.losses) == {"adamw": 2, "closed_form": 1}[solver]
    assert result.seconds["trial"] == pytest.approx(
        result.seconds["prepare"] + result.seconds["fit"] + result.seconds["evaluate"]
    )
    assert result.parameters == SOLVERS[solver]


def test_the_scores_of_a_trial_are_those_of_generate_on_the_unlearned_model(
    spec: Specs, checkpoint: Callable[..., Path], loaded: Callable[..., LoadedModel]
) -> None:
    made = spec(family="llama", solver="closed_form", max_new_tokens=8)
    worker, said = Worker(made, loaded("llama")), dict[str, str]()
    assert worker.loaded is loaded("llama"), "a model that is loaded already is used"

    def ask(model: LoadedModel, _: Edit) -> None:
        questions = [record.question for record in (*made.data.forget, *made.data.retain)]
        answers = generated(checkpoint("llama"), model.model, questions, budget=8)
        said.update(zip(questions, answers, strict=True))

    result = worker.run(SOLVERS["closed_form"], inside=ask)
    assert {row.question: row.answer for row in result.evaluation.rows} == said
    for name, records in (("forget", made.data.forget), ("retain", made.data.retain)):
        recalls = rouge_recall([r.answer for r in records], [said[r.question] for r in records])
        mean = sum(recall.rouge1 for recall in recalls) / len(recalls)
        assert result.evaluation.scores[f"{name}_rouge1"] == pytest.approx(mean)
        assert result.evaluation.scores[f"{name}_rows"] == len(records)


def test_a_full_evaluation_takes_all_rows_and_the_published_budget_and_encodes_nothing_twice(
    spec: Specs, monkeypatch: pytest.MonkeyPatch, full_budget: int
) -> None:
    asked: list[str] = []

    def counting(tokenizer: Any, questions: list[str], *args: Any, **options: Any) -> Any:
        asked.extend(questions)
        return encode_prompts(tokenizer, questions, *args, **options)

    monkeypatch.setattr("lunar_tune.training.answer_loss.encode_prompts", counting)
    worker = Worker(spec(retain_rows=2, evaluation_rows=5))
    trial = worker.run(SOLVERS["adamw"])
    assert (trial.max_new_tokens, trial.evaluation.scores["retain_rows"]) == (3, 2)
    full = worker.baseline(full=True)
    assert (full.max_new_tokens, full.evaluation.scores["retain_rows"]) == (full_budget, 5)
    assert len(asked) == len(set(asked))
    assert {record.question for record in worker.spec.data.retain} < set(asked)


def test_a_failed_trial_leaves_the_worker_ready_for_the_next_and_the_seed_decides(
    spec: Specs,
) -> None:
    worker, setting = Worker(spec(seed=3)), SOLVERS["adamw"]
    before = weights(worker.loaded)
    first = worker.run(setting)
    with pytest.raises(TrialError):
        worker.run(setting | {"learning_rate": 1e30})
    with pytest.raises(InputError):
        worker.run({"layer": 1})

    def fail(_loaded: LoadedModel, _: Edit) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        worker.run(setting, inside=fail)
    assert same(weights(worker.loaded), before)
    again = worker.run(setting, seed=3)
    assert (again.evaluation, again.losses) == (first.evaluation, first.losses)
    assert worker.run(setting, seed=1).losses != first.losses
    assert Worker(spec(seed=1)).run(setting).losses == worker.run(setting, seed=1).losses


def test_trials_ask_one_half_and_full_evaluations_the_other(spec: Specs) -> None:
    worker = Worker(spec(holdout=True))
    sets = worker.spec.data
    assert sets.held_out is not None
    for full in (False, True):
        rows = worker.run(SOLVERS["adamw"], full=full).evaluation.rows
        for name in ("forget", "retain"):
            records = getattr(sets.held_out if full else sets, name)
            asked = {row.question for row in rows if row.set_name == name}
            assert asked == {record.question for record in records}


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("method", ["ga", "rmu"])
def test_a_16_bit_fit_is_looked_at_as_it_would_be_evaluated(
    spec: Specs, method: str, trained: str
) -> None:
    """All rows are asked in a look here, so that its scores are those of a trial of that length.

    The rate falls over the whole fit; this small it changes no answer, looked at or not.
    """
    own = {"layer": 1, "coefficient": 5.0} if method == "rmu" else {}

    def run(epochs: int) -> Any:
        made = spec(
            dtype="bfloat16",
            method=method,
            fix=(f"trained={trained}", f"epochs={epochs}", "dropout=0"),
            changed={"retain_floor": 0.0},
        )
        worker = Worker(made)
        before = weights(worker.loaded)
        result = worker.run({**own, "learning_rate": 1e-6})
        assert same(weights(worker.loaded), before)
        return result

    (look,) = run(2).checks
    scores = run(1).evaluation.scores
    assert (look.epochs, look.forget_rouge1) == (1, scores["forget_rouge1"])
    assert look.retain_rouge1 == scores["retain_rouge1"]
