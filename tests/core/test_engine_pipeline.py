"""A trial of the engine scores, row by row, as the published pipeline written plainly does.

Covers: both solvers, three blocks of `tiny`, on the CPU in float32 at an equal token budget; the
engine with all that it keeps and skips.
Does not cover: the published checkpoints (`scripts/check_conformance.py`).

`scripts/plain_pipeline.py` shares no code with the engine: a fresh load, full forwards one prompt
at a time, an autograd loop or normal equations, `generate`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from plain_pipeline import PlainModel, Questions, plain_trial

from lunar_tune.config.decoding_settings import DecodingSettings
from lunar_tune.config.lunar_settings import LunarSettings
from lunar_tune.config.run_options import EngineSettings, RunOptions
from lunar_tune.data.records import Record
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.trial.assemble import assemble, materialise
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

BUDGET = 12
PARAMETERS: dict[str, dict[str, Any]] = {
    "adamw": {"coefficient": 2.0, "learning_rate": 0.003},
    "closed_form": {"coefficient": 2.0, "ridge": 0.1},
}


def spec_of(solver: str, **engine: Any) -> TrialSpec:
    """Return a spec on `tiny` with a handful of questions of each kind."""
    spec = materialise(
        assemble(
            RunOptions(
                device="cpu",
                dtype="float32",
                lunar=LunarSettings(solver=solver),
                decoding=DecodingSettings(max_new_tokens=BUDGET),
                engine=EngineSettings(cache_limit=0, **engine),
            )
        )
    )
    forget, retain, factual = spec.data.forget[:4], spec.data.retain[::9][:8], spec.data.factual[:3]
    return dataclasses.replace(
        spec,
        data=dataclasses.replace(
            spec.data,
            fit_forget=forget,
            fit_retain=retain,
            forget=forget,
            retain=retain,
            retain_sample=retain,
            factual=factual,
            reference_prompts=spec.data.reference_prompts[:6],
        ),
    )


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(spec_of("adamw").model)


def plainly(worker: Worker, layer: int, solver: str) -> tuple[list[float], list[float], list[Any]]:
    """Return recalls and tokens of each evaluated row by the plain pipeline."""
    data = worker.spec.data

    def prompts(records: tuple[Record, ...]) -> tuple[tuple[int, ...], ...]:
        return worker.encoder.prompts([record.question for record in records])

    evaluated = (data.forget, data.retain, data.factual)
    result = plain_trial(
        PlainModel(
            folder=worker.spec.model.checkpoint,
            tokenizer=worker.loaded.tokenizer,
            eos_ids=worker.loaded.eos_ids,
            dtype=torch.float32,
            device=torch.device("cpu"),
        ),
        Questions(
            forget=prompts(data.fit_forget),
            retain=prompts(data.fit_retain),
            reference=worker.encoder.prompts(data.reference_prompts),
            evaluated=[prompts(records) for records in evaluated],
            truths=[record.answer for records in evaluated for record in records],
        ),
        {"layer": layer, **PARAMETERS[solver]},
        solver=solver,
        max_new_tokens=BUDGET,
    )
    return result.rouge1, result.rouge_l, result.tokens


@pytest.mark.parametrize("solver", PARAMETERS)
@pytest.mark.parametrize("layer", [0, 3])
def test_a_trial_scores_row_by_row_as_the_plain_pipeline_does(
    tiny: LoadedModel, solver: str, layer: int
) -> None:
    worker = Worker(spec_of(solver), tiny)
    rouge1, rouge_l, tokens = plainly(worker, layer, solver)
    parameters = {"layer": layer, **PARAMETERS[solver]}
    without_drafts = worker.run(parameters).evaluation
    vanilla = worker.vanilla().evaluation
    with_drafts = worker.run(parameters).evaluation
    for evaluation in (without_drafts, with_drafts):
        assert [row.rouge1 for row in evaluation.rows] == rouge1
        assert [row.rouge_l for row in evaluation.rows] == rouge_l
        evaluated = (*worker.spec.data.forget, *worker.spec.data.retain, *worker.spec.data.factual)
        rows = worker.activations.rows_of(
            worker.encoder.prompts([record.question for record in evaluated])
        )
        assert [list(evaluation.tokens[row]) for row in rows] == tokens
    # The trial does something, and not to all.
    before = [row.rouge1 for row in vanilla.rows]
    assert before != rouge1
    assert any(one == other for one, other in zip(before, rouge1, strict=True))


@pytest.mark.parametrize("solver", PARAMETERS)
def test_what_is_skipped_changes_no_score(tiny: LoadedModel, solver: str) -> None:
    """An early exit, and a retain floor that is held."""
    worker = Worker(spec_of(solver, early_exit=True, retain_floor=0.0), tiny)
    worker.vanilla()
    rouge1, rouge_l, _ = plainly(worker, 2, solver)
    evaluation = worker.run({"layer": 2, **PARAMETERS[solver]}).evaluation
    assert evaluation.complete
    assert [row.rouge1 for row in evaluation.rows] == rouge1
    assert [row.rouge_l for row in evaluation.rows] == rouge_l
