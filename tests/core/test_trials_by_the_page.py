"""LUNAR on one page is LUNAR; a worker's trials score row by row as it does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import BIASED, FAMILIES, build_model
from rouge_score.rouge_scorer import RougeScorer
from trial_specs import random_spec

from lunar_tune import reference
from lunar_tune.config.options import PUBLISHED_MAX_NEW_TOKENS, RunOptions
from lunar_tune.data.records import Record
from lunar_tune.engine import activations
from lunar_tune.errors import InputError
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
        change: Callable[[LoadedModel], LoadedModel] = lambda model: model,
        run: dict[str, str] | None = None,
        changed: dict[str, Any] | None = None,
        **of_model: Any,
    ) -> Worker:
        model, own = change(loaded(family, **of_model)), {"solver": "closed_form"} | (run or {})
        spec = random_spec(
            Path(model.spec.source),
            "mini",
            factual_data=RunOptions().factual_data,
            max_new_tokens=BUDGET,
            **own,
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
            **dict.fromkeys(("fit_forget", "forget"), forget),
            **dict.fromkeys(("fit_retain", "retain", "retain_sample"), retain),
            factual=factual,
        )
        return Worker(dataclasses.replace(spec, data=data, **(changed or {})), model)

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
    ("family", "layers", "solver", "of_model"),
    [
        *zip(
            FAMILIES,
            ([0], [1], [2], [1], [0, 2], [2], [1]),
            islice(cycle(SOLVERS), len(FAMILIES)),
            repeat({}, len(FAMILIES)),
            strict=True,
        ),
        ("llama", [0, 2], "adamw", BIASED),
        ("llama", [1], "closed_form", BIASED),
    ],
)
def test_trials_score_as_the_page(
    make: Make, family: str, layers: list[int], solver: str, of_model: dict[str, bool]
) -> None:
    worker, other = (make(family, run={"solver": solver}, **of_model) for _ in range(2))
    assert worker.judge.plain_decoding is None
    scores, tokens = by_the_page(worker, layers, solver)
    assert not worker.drafts
    setting = parameters(layers, solver)
    before, base = worker.run(setting).evaluation, worker.baseline().evaluation
    assert sorted(map(list, worker.drafts.values())) == sorted(tokens_of(worker, base))
    other.draft(worker.drafts)
    for evaluation in (before, *(one.run(setting).evaluation for one in (worker, other))):
        assert scores_of(evaluation) == scores
        assert tokens_of(worker, evaluation) == tokens != tokens_of(worker, base)
    assert other.baseline().evaluation == base
    assert scores_of(base) != scores


@pytest.mark.parametrize(
    ("options", "layers", "share"),
    [
        ({}, [0, 2], 0.0),  # the reads of one block alone fit
        ({"changed": {"layers": (1,)}}, [2], 0.4),  # beyond the blocks that were announced
        ({"changed": {"early_exit": True, "retain_floor": 0.0}}, [1], 0.4),  # held
        ({"changed": {"engine": "reference"}}, [1], 0.4),
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
    worker.run(parameters([1]))  # of which nothing may stay
    evaluation = worker.run(parameters(layers)).evaluation
    assert evaluation.complete
    assert scores_of(evaluation) == by_the_page(worker, layers)[0]


def eager(model: LoadedModel) -> LoadedModel:
    other = dataclasses.replace(model, model=copy.deepcopy(model.model))
    other.model.set_attn_implementation("eager")
    return other


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "reaches back 8 tokens, and a row may have"),
        ("qwen2", {"sliding_window": 8, **MIXED}, "reaches back 8 tokens"),
        ("llama", {"change": eager}, "the model's attention is 'eager', not sdpa"),
        ("qwen2", {"run": {"engine": "plain"}}, "--engine plain"),
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
def test_a_window_counts_from_its_length(make: Make, family: str, changes: dict[str, Any]) -> None:
    """A row may have its prompt's tokens and the published budget of 512, as a full evaluation."""
    longest = max(make(family).activations.prompt_lengths) + PUBLISHED_MAX_NEW_TOKENS
    for window, is_plain in ((longest - 1, True), (longest, False)):
        worker = make(family, sliding_window=window, **changes)
        assert (worker.judge.plain_decoding is not None) == is_plain
    assert scores_of(worker.run(parameters([1])).evaluation) == by_the_page(worker, [1])[0]
    # Qwen's checkpoints name a window and do not use it.
    unused = make("qwen2", sliding_window=8, use_sliding_window=False)
    assert unused.judge.plain_decoding is None


# No two begin alike: equal prefixes have equal h, and cannot go different ways.
FORGET = ((11, 51, 91), (12, 52, 92, 132))
RETAIN = ((13, 53, 93, 133, 173), (14, 54, 94))
DECLINED = ((15, 55, 95), (16, 56), (17, 57, 97, 137))
PROMPTS: dict[str, Any] = {"reference": DECLINED, "forget": FORGET, "retain": RETAIN}


@pytest.mark.parametrize("family", FAMILIES)
def test_forget_tokens_move_by_the_shift_and_retain_tokens_stay(family: str) -> None:
    """With fewer tokens than features and next to no ridge, every token reaches its target."""
    model = build_model(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    @torch.no_grad()
    def outputs_of(some: Any, prompt: tuple[int, ...]) -> torch.Tensor:
        """Return what block 1 gives; entry 0 of the hidden states is the embedding."""
        done = some(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        return done.hidden_states[2][0].double()

    exact = partial(reference.fit_closed_form, ridge=1e-9)
    unlearned = reference.unlearn(model, layers=[1], coefficient=2.0, solver=exact, **PROMPTS)
    declined, forgotten = (
        torch.stack([outputs_of(model, prompt)[-1] for prompt in prompts]).mean(0)
        for prompts in (DECLINED, FORGET)
    )
    for prompts, moves in ((FORGET, 2.0 * (declined - forgotten)), (RETAIN, 0.0)):
        for prompt in prompts:
            moved = outputs_of(unlearned, prompt) - outputs_of(model, prompt)
            torch.testing.assert_close(moved, torch.zeros_like(moved) + moves, atol=2e-3, rtol=1e-3)
    after = unlearned.state_dict()
    changed = [name for name in before if not before[name].equal(after[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())


def test_what_the_page_cannot_do_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"gemma2: .*Use Llama, .*Gemma 1 or Phi-3"):
        reference.unlearning_vector(build_model("gemma2"), 0, DECLINED, FORGET)
    model = build_model("llama")
    with pytest.raises(ValueError, match=r"layer 3: the model has blocks 0 to 2"):
        reference.mlp_inputs(model, 3, FORGET)
    with pytest.raises(ValueError, match=r"layer 0: not finite; lower"):
        reference.add_difference(model, 0, torch.tensor(float("inf")))
    with pytest.raises(ValueError, match=r"ridge 0: choose a positive number"):
        reference.fit_closed_form(torch.ones(2, 3), torch.ones(2), torch.ones(4), ridge=0)
    for options, message in (
        ({"method": "ga"}, "not ga"),
        ({"solver": "lora"}, r"not lunar \(lora\)"),
        ({"fix": ("positions=last",)}, "only solver and epochs"),
    ):
        with pytest.raises(InputError, match=message):
            assemble(RunOptions(engine="reference", **options))
