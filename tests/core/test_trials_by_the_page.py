"""A worker's trials score row by row as LUNAR on one page does, whatever the engine keeps."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from random_models import FAMILIES
from rouge_score.rouge_scorer import RougeScorer

from lunar_tune import reference
from lunar_tune.config.run_options import PUBLISHED_MAX_NEW_TOKENS, RunOptions
from lunar_tune.data.records import Record
from lunar_tune.engine import activations
from lunar_tune.metrics.evaluate import Evaluation
from lunar_tune.models.loading import LoadedModel
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.worker import Worker

Make = Callable[..., Worker]
Scores = list[tuple[float, float]]
BUDGET, COEFFICIENT = 10, 2.0
MIXED = {"use_sliding_window": True, "max_window_layers": 1}
SOLVERS: dict[str, tuple[dict[str, float], reference.Solver]] = {
    "adamw": (
        {"learning_rate": 0.01},
        partial(reference.fit_adamw, learning_rate=0.01, epochs=2),
    ),
    "closed_form": ({"ridge": 1e-3}, partial(reference.fit_closed_form, ridge=1e-3)),
}


def answers_of(
    model: Any, loaded: LoadedModel, prompts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[str]]:
    """Return tokens and texts of the page's answers."""
    tokens = reference.greedy_answers(model, prompts, eos_ids=loaded.eos_ids, max_new_tokens=BUDGET)
    return tokens, loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)


@pytest.fixture
def make(loaded: Callable[..., LoadedModel]) -> Make:
    """Return a factory of workers on random models with seven questions.

    To the true answers is added what the base model says, of which the unlearned one says some.
    """

    def one(
        family: str = "qwen2",
        *,
        solver: str = "closed_form",
        change: Callable[[LoadedModel], LoadedModel] = lambda model: model,
        layers: tuple[int, ...] | None = None,
        engine: str = "fast",
        changed: dict[str, Any] | None = None,
        **of_model: Any,
    ) -> Worker:
        model = change(loaded(family, **of_model))
        spec = assemble(
            RunOptions(
                model=model.spec.source,
                device="cpu",
                solver=solver,
                fix=("epochs=2",) if solver == "adamw" else (),
                max_new_tokens=BUDGET,
                cache_limit=0,
                engine=engine,
            )
        )
        encoder = Worker(spec, model).encoder

        def with_truths(records: Sequence[Record]) -> tuple[Record, ...]:
            prompts = encoder.prompts([record.question for record in records])
            texts = answers_of(model.model, model, prompts)[1]
            return tuple(
                dataclasses.replace(record, answer=f"{record.answer} {text}")
                for record, text in zip(records, texts, strict=True)
            )

        few = (spec.data.forget[:2], spec.data.retain[::9][:4], spec.data.factual[:1])
        forget, retain, factual = map(with_truths, few)
        data = dataclasses.replace(
            spec.data,
            **{"fit_forget": forget, "forget": forget, "factual": factual},
            **{"fit_retain": retain, "retain": retain, "retain_sample": retain},
            reference_prompts=spec.data.reference_prompts[:3],
        )
        options = dataclasses.replace(spec.engine, **(changed or {}))
        spec = dataclasses.replace(spec, data=data, engine=options, layers=layers or spec.layers)
        return Worker(spec, model)

    return one


def parameters(layers: list[int], solver: str = "closed_form") -> dict[str, Any]:
    layer = layers if len(layers) > 1 else layers[0]
    return {"layer": layer, "coefficient": COEFFICIENT, **SOLVERS[solver][0]}


def scores_of(evaluation: Evaluation) -> Scores:
    return [(row.rouge1, row.rouge_l) for row in evaluation.rows]


def tokens_of(worker: Worker, evaluation: Evaluation) -> list[list[int]]:
    return [list(evaluation.tokens[row]) for row in range(len(worker.activations.prompt_lengths))]


def by_the_page(
    worker: Worker, layers: list[int], solver: str = "closed_form"
) -> tuple[Scores, list[list[int]]]:
    """Return ROUGE-1 and ROUGE-L recall and tokens of each row."""
    data, loaded = worker.spec.data, worker.loaded
    records = (*data.forget, *data.retain, *data.factual)
    forget, retain, asked = (
        worker.encoder.prompts([record.question for record in some])
        for some in (data.fit_forget, data.fit_retain, records)
    )
    unlearned = reference.unlearn(
        loaded.model,
        layers=layers,
        coefficient=COEFFICIENT,
        reference=worker.encoder.prompts(data.reference_prompts),
        forget=forget,
        retain=retain,
        solver=SOLVERS[solver][1],
    )
    tokens, texts = answers_of(unlearned, loaded, asked)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(r.answer, text) for r, text in zip(records, texts, strict=True)]
    recalls = [(one["rouge1"].recall, one["rougeL"].recall) for one in scores]
    assert worker.activations.rows_of(asked) == list(range(len(asked)))
    return recalls, tokens


@pytest.mark.parametrize(
    ("family", "layers", "solver"),
    list(zip(FAMILIES, ([0], [1], [2], [1], [0, 2], [2]), 3 * tuple(SOLVERS), strict=True)),
)
def test_a_trial_scores_row_by_row_as_the_page_before_and_after_drafts_are_known(
    make: Make, family: str, layers: list[int], solver: str
) -> None:
    """Drafts of another worker serve as well as one's own."""
    worker, other = make(family, solver=solver), make(family, solver=solver)
    assert worker.judge.plain_decoding is None
    scores, tokens = by_the_page(worker, layers, solver)
    assert not worker.drafts
    before = worker.run(parameters(layers, solver)).evaluation
    base = worker.baseline().evaluation
    after = worker.run(parameters(layers, solver)).evaluation
    assert sorted(map(list, worker.drafts.values())) == sorted(tokens_of(worker, base))
    other.draft(worker.drafts)
    for evaluation in (before, after, other.run(parameters(layers, solver)).evaluation):
        assert scores_of(evaluation) == scores
        assert tokens_of(worker, evaluation) == tokens != tokens_of(worker, base)
    assert other.baseline().evaluation == base
    assert scores_of(base) != scores


@pytest.mark.parametrize(
    ("options", "layers", "share"),
    [
        ({}, [0, 2], 0.0),  # the reads of one block alone fit
        ({"layers": (1,)}, [2], 0.4),  # beyond the blocks that were announced
        ({"changed": {"early_exit": True, "retain_floor": 0.0}}, [1], 0.4),  # held
        ({"changed": {"kind": "reference"}}, [1], 0.4),
    ],
)
def test_what_is_kept_or_skipped_changes_no_score(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    layers: list[int],
    share: float,
) -> None:
    monkeypatch.setattr(activations, "READS_SHARE", share)
    worker = make(**options)
    worker.baseline()
    evaluation = worker.run(parameters(layers)).evaluation
    assert evaluation.complete
    assert scores_of(evaluation) == by_the_page(worker, layers)[0]


def test_only_the_base_model_is_captured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little room: one block's reads are held, and one stream until an evaluation begins.

    What is captured in a trial must not come from the edited model, nor stay for other trials.
    """
    worker = make(layers=(0, 1, 2))
    expected = [make().run(parameters(layers)).evaluation for layers in ([0, 2], [2])]
    original = copy.deepcopy(worker.loaded.model).state_dict()
    captured: list[bool] = []
    capture = activations.capture_streams

    def is_original() -> bool:
        state = worker.loaded.model.state_dict()
        return all(torch.equal(state[name], original[name]) for name in original)

    def watched(*args: Any, **options: Any) -> Any:
        captured.append(is_original())
        return capture(*args, **options)

    monkeypatch.setattr(activations, "READS_SHARE", 0.0)
    monkeypatch.setattr(activations, "host_free_bytes", lambda: 0 if is_original() else 2**40)
    monkeypatch.setattr(activations, "capture_streams", watched)
    assert [worker.run(parameters(layers)).evaluation for layers in ([0, 2], [2])] == expected
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
def test_what_the_engine_cannot_keep_is_answered_plainly_and_scores_as_the_page(
    make: Make, family: str, options: dict[str, Any], reason: str
) -> None:
    worker = make(family, **options)
    assert reason in str(worker.judge.plain_decoding)
    worker.baseline()
    assert not worker.drafts
    evaluation = worker.run(parameters([1])).evaluation
    assert (scores_of(evaluation), tokens_of(worker, evaluation)) == by_the_page(worker, [1])


@pytest.mark.parametrize(("family", "changes"), [("mistral", {}), ("qwen2", MIXED)])
def test_a_window_is_in_force_from_the_longest_row_on(
    make: Make, family: str, changes: dict[str, Any]
) -> None:
    """A row may have its prompt's tokens and the published budget of 512, as a full evaluation."""
    longest = max(make(family).activations.prompt_lengths) + PUBLISHED_MAX_NEW_TOKENS
    for window, is_plain in ((longest - 1, True), (longest, False)):
        worker = make(family, sliding_window=window, **changes)
        assert (worker.judge.plain_decoding is not None) == is_plain
    assert scores_of(worker.run(parameters([1])).evaluation) == by_the_page(worker, [1])[0]
    # Qwen's checkpoints name a window and do not use it.
    unused = make("qwen2", sliding_window=8, use_sliding_window=False)
    assert unused.judge.plain_decoding is None
