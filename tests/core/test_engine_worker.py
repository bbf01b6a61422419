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

from lunar_tune.config.run_options import PUBLISHED_MAX_NEW_TOKENS, RunOptions
from lunar_tune.engine import prompt_activations as prompts_module
from lunar_tune.methods.contract import Edit
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.loading import LoadedModel
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import TrialResult, Worker

Load = Callable[..., LoadedModel]
Checkpoint = Callable[..., Path]
BUDGET = 14


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [
        {"edge": edge, "question": f"What of {edge}, {n}?", "answer": f"Kettles {n}."}
        for edge, count in {"A_B": 2, "B_C": 2, "C_D": 3}.items()
        for n in range(count)
    ]
    file = tmp_path_factory.mktemp("data") / "pairs.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def spec(checkpoint: Checkpoint, data: str) -> Callable[..., TrialSpec]:
    """Return a factory of specs on random models; nothing is kept on disk."""

    def make(family: str = "qwen2", *, solver: str = "closed_form", **options: Any) -> TrialSpec:
        made = assemble(
            RunOptions(
                model=str(checkpoint(family, **options.pop("changes", {}))),
                data=data,
                device="cpu",
                factual_data="none",
                reference_prompts="harmful",
                solver=solver,
                fix=() if solver == "closed_form" else ("epochs=2",),
                max_new_tokens=BUDGET,
                cache_limit=0,
                **options,
            )
        )
        few = dataclasses.replace(made.data, reference_prompts=made.data.reference_prompts[:3])
        return dataclasses.replace(made, data=few)

    return make


def parameters(layer: Any, solver: str = "closed_form") -> dict[str, Any]:
    own = {"closed_form": {"ridge": 1e-3}, "adamw": {"learning_rate": 0.01}}[solver]
    return {"layer": layer, "coefficient": 20.0, **own}


def trial_and_generate(
    worker: Worker, asked: Mapping[str, Any], *, budget: int = BUDGET, **options: Any
) -> tuple[TrialResult, list[list[int]]]:
    """Run a trial, and ask transformers one prompt at a time while the model is edited."""
    said: list[list[int]] = []

    def ask(loaded: LoadedModel, _: Edit) -> None:
        model: Any = loaded.model
        records = (*worker.spec.data.forget, *worker.spec.data.retain)
        for prompt in worker.encoder.prompts([record.question for record in records]):
            ids = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=budget,
                pad_token_id=0,
                eos_token_id=list(loaded.eos_ids),
                **options,
            )
            answer = ids[0, len(prompt) :].tolist()
            ends = [i for i, token in enumerate(answer) if token in loaded.eos_ids]
            said.append(answer[: ends[0]] if ends else answer)

    return worker.run(asked, inside=ask), said


def tokens_of(result: TrialResult) -> list[list[int]]:
    """Return the answers' tokens in the order of the questions, forget before retain."""
    return [list(result.evaluation.tokens[row]) for row in sorted(result.evaluation.tokens)]


@pytest.mark.parametrize(("family", "layer"), list(zip(LAYOUTS, [0, 1, 2, 1, 0, 2], strict=True)))
def test_a_trial_answers_as_generate_before_and_after_drafts_are_known(
    spec: Callable[..., TrialSpec], family: str, layer: int
) -> None:
    worker = Worker(spec(family))
    assert worker.judge.plain_decoding is None
    assert not worker.drafts
    first, said = trial_and_generate(worker, parameters(layer))
    assert tokens_of(first) == said
    baseline = worker.baseline()
    assert sorted(map(list, worker.drafts.values())) == sorted(tokens_of(baseline))
    assert tokens_of(worker.run(parameters(layer))) == said
    assert tokens_of(baseline) != said


@pytest.mark.parametrize(
    ("solver", "layers", "share"),
    [
        ("closed_form", [0, 2], 0.0),
        ("closed_form", [2, 1], 0.4),
        ("adamw", [1, 2], 0.0),
        ("adamw", [2], 0.4),
    ],
)
def test_several_layers_are_answered_as_by_generate_also_where_one_blocks_reads_fit(
    spec: Callable[..., TrialSpec],
    monkeypatch: pytest.MonkeyPatch,
    solver: str,
    layers: list[int],
    share: float,
) -> None:
    monkeypatch.setattr(prompts_module, "READS_SHARE", share)
    worker = Worker(spec(solver=solver))
    worker.baseline()
    result, said = trial_and_generate(worker, parameters(layers, solver))
    assert tokens_of(result) == said


def test_drafts_of_another_worker_are_used_and_change_nothing(
    spec: Callable[..., TrialSpec],
) -> None:
    first = Worker(spec())
    first.baseline()
    expected = first.run(parameters(1)).evaluation
    second = Worker(spec())
    second.draft(first.drafts)
    assert second.drafts == first.drafts
    assert second.run(parameters(1)).evaluation == expected
    assert second.baseline().evaluation == first.baseline().evaluation


def test_a_block_above_those_that_were_announced_is_answered_as_by_generate(
    spec: Callable[..., TrialSpec],
) -> None:
    """What is kept reaches to the last announced block; a caller may try one beyond it."""
    worker = Worker(dataclasses.replace(spec(), layers=(0,)))
    worker.baseline()
    result, said = trial_and_generate(worker, parameters(2))
    assert tokens_of(result) == said


def test_with_reuse_and_without_it_a_trial_says_the_same(spec: Callable[..., TrialSpec]) -> None:
    kept, plain = Worker(spec()), Worker(spec(engine="plain"))
    assert (kept.judge.plain_decoding, plain.judge.plain_decoding) == (None, "it was asked for")
    for worker in (kept, plain):
        worker.baseline()
    for layer in (0, 1, 2):
        assert (
            kept.run(parameters(layer)).evaluation.rows
            == plain.run(parameters(layer)).evaluation.rows
        )
    assert not plain.drafts


def test_only_the_base_model_is_captured(
    spec: Callable[..., TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little room: one block's reads are held, and one stream until an evaluation begins.

    What is captured in a trial must not come from the edited model, nor stay for other trials.
    """
    worker = Worker(dataclasses.replace(spec(), layers=(0, 1, 2)))
    expected = [Worker(spec()).run(parameters(layer)).evaluation.rows for layer in ([0, 2], 2)]
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
    found = [worker.run(parameters(layer)).evaluation.rows for layer in ([0, 2], 2)]
    assert captured
    assert all(captured)
    assert found == expected


# Answered plainly

MIXED = {"use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "reaches back 8 tokens, and a row may have"),
        ("qwen2", {"sliding_window": 8, **MIXED}, "reaches back 8 tokens"),
        ("qwen3", {"sliding_window": 8, **MIXED}, "reaches back 8 tokens"),
    ],
)
def test_windows_in_force_are_answered_plainly_and_as_by_generate(
    spec: Callable[..., TrialSpec], family: str, changes: dict[str, Any], reason: str
) -> None:
    worker = Worker(spec(family, changes=changes))
    assert reason in str(worker.judge.plain_decoding)
    worker.baseline()
    assert not worker.drafts
    result, said = trial_and_generate(worker, parameters(1))
    assert tokens_of(result) == said


def test_eager_attention_is_answered_plainly_and_as_by_generate(
    spec: Callable[..., TrialSpec], loaded: Load
) -> None:
    base = loaded("llama")
    eager = dataclasses.replace(base, model=copy.deepcopy(base.model))
    eager.model.set_attn_implementation("eager")
    worker = Worker(spec("llama"), eager)
    assert worker.judge.plain_decoding == "its attention is 'eager', not sdpa"
    worker.baseline()
    result, said = trial_and_generate(worker, parameters(1))
    assert tokens_of(result) == said


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_is_in_force_from_the_longest_row_on(
    spec: Callable[..., TrialSpec], loaded: Load, family: str
) -> None:
    """A row may have its prompt's tokens and the published budget of 512, as a full evaluation."""
    base = loaded(family)
    longest = max(Worker(spec(family), base).activations.prompt_lengths)
    longest += PUBLISHED_MAX_NEW_TOKENS
    for window, is_plain in ((longest - 1, True), (longest, False), (longest + 1, False)):
        changes = {"sliding_window": window, **({} if family == "mistral" else MIXED)}
        worker = Worker(spec(family, changes=changes), loaded(family, **changes))
        assert (worker.judge.plain_decoding is not None) == is_plain
    result, said = trial_and_generate(worker, parameters(1))
    assert tokens_of(result) == said


def test_a_window_that_no_block_uses_is_not_in_force(spec: Callable[..., TrialSpec]) -> None:
    """Qwen's checkpoints name a window and do not use it."""
    changes = {"sliding_window": 8, "use_sliding_window": False}
    assert Worker(spec("qwen2", changes=changes)).judge.plain_decoding is None
