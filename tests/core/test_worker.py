"""A worker's trials with everything that the engine keeps, and the models it answers plainly."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import generated
from random_models import FAMILIES

from lunar_tune.config.run_options import PUBLISHED_MAX_NEW_TOKENS, RunOptions
from lunar_tune.engine import prompt_activations as prompts_module
from lunar_tune.methods.contract import Edit
from lunar_tune.models.loading import LoadedModel
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

Make = Callable[..., Worker]
BUDGET = 10
MIXED = {"use_sliding_window": True, "max_window_layers": 1}
Solver = tuple[tuple[str, ...], dict[str, Any]]
SOLVERS: dict[str, Solver] = {
    "closed_form": ((), {"ridge": 1e-3}),
    "adamw": (("epochs=2",), {"learning_rate": 0.01}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"edge": edge, "question": f"What of {edge}, {n}?", "answer": f"Kettles {n}."}
        for edge in ("A_B", "B_C")
        for n in range(2)
    ]
    file = tmp_path_factory.mktemp("data") / "pairs.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


@pytest.fixture
def make(loaded: Callable[..., LoadedModel], data: Path) -> Make:
    """Return a factory of workers on random models; nothing is kept on disk."""

    def one(
        family: str = "qwen2",
        *,
        solver: str = "closed_form",
        change: Callable[[LoadedModel], LoadedModel] = lambda model: model,
        engine: str = "fast",
        layers: tuple[int, ...] | None = None,
        **changes: Any,
    ) -> Worker:
        model = change(loaded(family, **changes))
        spec: TrialSpec = assemble(
            RunOptions(
                model=model.spec.source,
                data=str(data),
                device="cpu",
                factual_data="none",
                reference_prompts="harmful",
                solver=solver,
                fix=SOLVERS[solver][0],
                max_new_tokens=BUDGET,
                cache_limit=0,
                engine=engine,
            )
        )
        few = dataclasses.replace(spec.data, reference_prompts=spec.data.reference_prompts[:3])
        spec = dataclasses.replace(spec, data=few, layers=layers or spec.layers)
        return Worker(spec, model)

    return one


def parameters(layer: Any, solver: str = "closed_form") -> dict[str, Any]:
    return {"layer": layer, "coefficient": 20.0, **SOLVERS[solver][1]}


def tokens_of(worker: Worker, asked: Mapping[str, Any] | None) -> list[list[int]]:
    """Run a trial, or the base model; return its answers' tokens, forget before retain."""
    result = worker.baseline() if asked is None else worker.run(asked)
    return [list(result.evaluation.tokens[row]) for row in sorted(result.evaluation.tokens)]


def said_by_generate(worker: Worker, asked: Mapping[str, Any]) -> list[list[int]]:
    """Run a trial, and ask transformers while the model is edited."""
    said: list[list[int]] = []

    def ask(loaded: LoadedModel, _: Edit) -> None:
        records = (*worker.spec.data.forget, *worker.spec.data.retain)
        prompts = worker.encoder.prompts([record.question for record in records])
        said.extend(generated(loaded.model, prompts, budget=BUDGET, eos=loaded.eos_ids))

    worker.run(asked, inside=ask)
    return said


@pytest.mark.parametrize(("family", "layer"), list(zip(FAMILIES, [0, 1, 2, 1, 0, 2], strict=True)))
def test_a_trial_answers_as_generate_before_and_after_drafts_are_known(
    make: Make, family: str, layer: int
) -> None:
    """Drafts of another worker serve as well as one's own."""
    worker = make(family)
    assert worker.judge.plain_decoding is None
    assert not worker.drafts
    said = said_by_generate(worker, parameters(layer))
    assert tokens_of(worker, parameters(layer)) == said
    base = tokens_of(worker, None)
    assert sorted(map(list, worker.drafts.values())) == sorted(base)
    assert tokens_of(worker, parameters(layer)) == said != base
    other = make(family)
    other.draft(worker.drafts)
    assert tokens_of(other, parameters(layer)) == said
    assert tokens_of(other, None) == base


@pytest.mark.parametrize(
    ("solver", "layers", "share"),
    [("closed_form", [0, 2], 0.0), ("adamw", [2, 1], 0.4), ("adamw", [1, 2], 0.0)],
)
def test_several_layers_are_answered_as_by_generate_also_where_one_blocks_reads_fit(
    make: Make, monkeypatch: pytest.MonkeyPatch, solver: str, layers: list[int], share: float
) -> None:
    monkeypatch.setattr(prompts_module, "READS_SHARE", share)
    worker = make(solver=solver)
    said = said_by_generate(worker, parameters(layers, solver))
    worker.baseline()
    assert tokens_of(worker, parameters(layers, solver)) == said


def test_a_block_above_those_that_were_announced_is_answered_as_by_generate(make: Make) -> None:
    """What is kept reaches to the last announced block; a caller may try one beyond it."""
    worker = make(layers=(0,))
    worker.baseline()
    assert tokens_of(worker, parameters(2)) == said_by_generate(worker, parameters(2))


def test_only_the_base_model_is_captured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little room: one block's reads are held, and one stream until an evaluation begins.

    What is captured in a trial must not come from the edited model, nor stay for other trials.
    """
    worker = make(layers=(0, 1, 2))
    expected = [tokens_of(make(), parameters(layer)) for layer in ([0, 2], 2)]
    original = copy.deepcopy(worker.loaded.model).state_dict()
    captured: list[bool] = []
    capture = prompts_module.capture_streams

    def is_original() -> bool:
        state = worker.loaded.model.state_dict()
        return all(torch.equal(state[name], original[name]) for name in original)

    def watched(*args: Any) -> Any:
        captured.append(is_original())
        return capture(*args)

    monkeypatch.setattr(prompts_module, "READS_SHARE", 0.0)
    monkeypatch.setattr(prompts_module, "host_free_bytes", lambda: 0 if is_original() else 2**40)
    monkeypatch.setattr(prompts_module, "capture_streams", watched)
    assert [tokens_of(worker, parameters(layer)) for layer in ([0, 2], 2)] == expected
    assert captured
    assert all(captured)


# Answered plainly


def eager(model: LoadedModel) -> LoadedModel:
    other = dataclasses.replace(model, model=copy.deepcopy(model.model))
    other.model.set_attn_implementation("eager")
    return other


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "reaches back 8 tokens, and a row may have"),
        ("qwen2", {"sliding_window": 8, **MIXED}, "reaches back 8 tokens"),
        ("llama", {"change": eager}, "its attention is 'eager', not sdpa"),
        ("qwen2", {"engine": "plain"}, "it was asked for"),
    ],
)
def test_what_the_engine_cannot_keep_is_answered_plainly_and_as_by_generate(
    make: Make, family: str, options: dict[str, Any], reason: str
) -> None:
    worker = make(family, **options)
    assert reason in str(worker.judge.plain_decoding)
    worker.baseline()
    assert not worker.drafts
    assert tokens_of(worker, parameters(1)) == said_by_generate(worker, parameters(1))


@pytest.mark.parametrize(("family", "changes"), [("mistral", {}), ("qwen2", MIXED)])
def test_a_window_is_in_force_from_the_longest_row_on(
    make: Make, family: str, changes: dict[str, Any]
) -> None:
    """A row may have its prompt's tokens and the published budget of 512, as a full evaluation."""
    longest = max(make(family).activations.prompt_lengths) + PUBLISHED_MAX_NEW_TOKENS
    for window, is_plain in ((longest - 1, True), (longest, False)):
        worker = make(family, sliding_window=window, **changes)
        assert (worker.judge.plain_decoding is not None) == is_plain
    assert tokens_of(worker, parameters(1)) == said_by_generate(worker, parameters(1))
    # Qwen's checkpoints name a window and do not use it.
    unused = make("qwen2", sliding_window=8, use_sliding_window=False)
    assert unused.judge.plain_decoding is None
