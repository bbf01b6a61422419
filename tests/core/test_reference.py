"""LUNAR on one page is LUNAR, and a trial of the engine scores row by row as the page does."""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import FAMILIES, build_model
from rouge_score import rouge_scorer

from lunar_tune import reference
from lunar_tune.config.run_options import RunOptions
from lunar_tune.data.records import Record
from lunar_tune.errors import InputError
from lunar_tune.models.loading import LoadedModel
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

Load = Callable[..., LoadedModel]
BUDGET = 12
PARAMETERS: dict[str, dict[str, Any]] = {
    "adamw": {"coefficient": 2.0, "learning_rate": 0.003},
    "closed_form": {"coefficient": 2.0, "ridge": 0.1},
}
FITS: dict[str, reference.Solver] = {
    "adamw": partial(reference.fit_adamw, learning_rate=0.003),
    "closed_form": partial(reference.fit_closed_form, ridge=0.1),
}
# No two begin alike: equal prefixes have equal h, and cannot go different ways.
FORGET = ((11, 51, 91), (12, 52, 92, 132))
RETAIN = ((13, 53, 93, 133, 173), (14, 54, 94))
DECLINED = ((15, 55, 95), (16, 56), (17, 57, 97, 137))


def asked(spec: TrialSpec) -> Sequence[Record]:
    return (*spec.data.forget, *spec.data.retain, *spec.data.factual)


def answers_of(worker: Worker, model: Any) -> tuple[list[list[int]], list[str]]:
    """Return tokens and texts of the page's answers to all questions."""
    tokens = reference.greedy_answers(
        model,
        worker.encoder.prompts([record.question for record in asked(worker.spec)]),
        eos_ids=worker.loaded.eos_ids,
        max_new_tokens=BUDGET,
    )
    return tokens, worker.loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def worker_of(model: LoadedModel, solver: str, **engine: Any) -> Worker:
    """Return a worker with a few questions, whose true answers are what the model says and more."""
    spec = assemble(
        RunOptions(
            model=model.spec.source,
            device="cpu",
            solver=solver,
            max_new_tokens=BUDGET,
            cache_limit=0,
        )
    )
    spec = dataclasses.replace(spec, engine=dataclasses.replace(spec.engine, **engine))
    data = spec.data
    forget, retain, factual = data.forget[:3], data.retain[::9][:5], data.factual[:2]
    few = dataclasses.replace(
        data,
        forget=forget,
        retain=retain,
        factual=factual,
        reference_prompts=data.reference_prompts[:4],
    )
    worker = Worker(dataclasses.replace(spec, data=few), model)
    _, texts = answers_of(worker, model.model)
    known = iter(texts)

    def with_truths(records: Sequence[Record]) -> tuple[Record, ...]:
        return tuple(
            dataclasses.replace(record, answer=f"{record.answer} {next(known)}")
            for record in records
        )

    forget, retain, factual = map(with_truths, (forget, retain, factual))
    few = dataclasses.replace(
        few,
        fit_forget=forget,
        fit_retain=retain,
        forget=forget,
        retain=retain,
        retain_sample=retain,
        factual=factual,
    )
    return Worker(dataclasses.replace(spec, data=few), model)


@pytest.mark.parametrize("solver", PARAMETERS)
@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_a_trial_scores_row_by_row_as_the_page_does(
    loaded: Load, solver: str, layers: list[int]
) -> None:
    """Without drafts and with them, with an early exit and a floor that is held, on the page."""
    model = loaded("qwen2")
    worker = worker_of(model, solver)
    data, encode = worker.spec.data, worker.encoder.prompts
    unlearned = reference.unlearn(
        model.model,
        layers=layers,
        coefficient=PARAMETERS[solver]["coefficient"],
        reference=encode(data.reference_prompts),
        forget=encode([record.question for record in data.fit_forget]),
        retain=encode([record.question for record in data.fit_retain]),
        solver=FITS[solver],
    )
    tokens, texts = answers_of(worker, unlearned)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [
        scorer.score(record.answer, text)
        for record, text in zip(asked(worker.spec), texts, strict=True)
    ]
    expected = [(score["rouge1"].recall, score["rougeL"].recall) for score in scores]

    parameters = {"layer": layers if len(layers) > 1 else layers[0], **PARAMETERS[solver]}
    without_drafts = worker.run(parameters).evaluation
    baseline = worker.baseline().evaluation
    with_drafts = worker.run(parameters).evaluation
    rows = worker.activations.rows_of(encode([record.question for record in asked(worker.spec)]))
    for evaluation in (without_drafts, with_drafts):
        assert [(row.rouge1, row.rouge_l) for row in evaluation.rows] == expected
        assert [list(evaluation.tokens[row]) for row in rows] == tokens
    for engine in ({"early_exit": True, "retain_floor": 0.0}, {"kind": "reference"}):
        evaluation = worker_of(model, solver, **engine).run(parameters).evaluation
        assert evaluation.complete
        assert [(row.rouge1, row.rouge_l) for row in evaluation.rows] == expected
    # The trial does something, and not to all.
    before = [(row.rouge1, row.rouge_l) for row in baseline.rows]
    assert before != expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_forget_tokens_move_by_the_shift_and_retain_tokens_stay(family: str) -> None:
    """With fewer tokens than features and next to no ridge, every token reaches its target."""
    layer, coefficient = 1, 2.0
    model = build_model(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def outputs_of(some: Any, prompt: tuple[int, ...]) -> torch.Tensor:
        """Return x of the prompt's tokens; entry 0 of the hidden states is the embedding."""
        with torch.no_grad():
            done = some(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        states: torch.Tensor = done.hidden_states[layer + 1][0].double()
        return states

    unlearned = reference.unlearn(
        model,
        layers=[layer],
        coefficient=coefficient,
        reference=DECLINED,
        forget=FORGET,
        retain=RETAIN,
        solver=partial(reference.fit_closed_form, ridge=1e-9),
    )
    declined, forgotten = (
        torch.stack([outputs_of(model, prompt)[-1] for prompt in prompts]).mean(0)
        for prompts in (DECLINED, FORGET)
    )
    for prompts, moves in ((FORGET, coefficient * (declined - forgotten)), (RETAIN, 0.0)):
        for prompt in prompts:
            moved = outputs_of(unlearned, prompt) - outputs_of(model, prompt)
            torch.testing.assert_close(moved, torch.zeros_like(moved) + moves, atol=2e-3, rtol=1e-3)
    after = unlearned.state_dict()
    edited = f"model.layers.{layer}.mlp.down_proj.weight"
    assert [name for name in before if not before[name].equal(after[name])] == [edited]
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("solver", FITS)
def test_a_bfloat16_model_stays_one(solver: str) -> None:
    model = build_model("qwen2").to(torch.bfloat16)
    unlearned = reference.unlearn(
        model,
        layers=[2],
        coefficient=2.0,
        reference=DECLINED,
        forget=FORGET,
        retain=RETAIN,
        solver=FITS[solver],
    )
    old, new = (some.model.layers[2].mlp.down_proj.weight for some in (model, unlearned))
    assert new.dtype == torch.bfloat16
    assert not new.equal(old)


@pytest.mark.parametrize("tokens", [5, 12])
def test_the_closed_form_is_the_minimum(tokens: int) -> None:
    """With ridge: least squares with √λ·I below H. Without, in the limit: the pseudo-inverse."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    shift = torch.randn(3, generator=generator, dtype=torch.float64)
    is_forget = torch.arange(tokens) < 2
    targets = is_forget[:, None] * shift
    below = (0.3 * h.square().sum() / 8).sqrt() * torch.eye(8, dtype=h.dtype)
    expected = torch.linalg.lstsq(
        torch.cat([h, below]), torch.cat([targets, torch.zeros(8, 3, dtype=h.dtype)])
    ).solution.T
    torch.testing.assert_close(reference.fit_closed_form(h, is_forget, shift, ridge=0.3), expected)
    limit = (torch.linalg.pinv(h) @ targets).T
    torch.testing.assert_close(
        reference.fit_closed_form(h, is_forget, shift, ridge=1e-11), limit, atol=1e-7, rtol=1e-7
    )


def test_the_first_step_of_adamw_is_that_of_its_paper() -> None:
    """From Δ = 0 both corrected averages are the gradient G and its square: Δ = −lr·G/(|G| + ε).

    Of the mean of (Δh − t)² over n tokens and d_model numbers, G is −2/(n·d_model)·Σ t·hᵀ.
    """
    generator = torch.Generator().manual_seed(0)
    h, shift = torch.randn(6, 4, generator=generator), torch.randn(3, generator=generator)
    is_forget = torch.tensor([True, False, True, False, False, False])
    gradient = -2 / (6 * 3) * torch.outer(shift, h[0] + h[2])
    expected = -0.01 * gradient / (gradient.abs() + 1e-8)
    difference = reference.fit_adamw(h, is_forget, shift, learning_rate=0.01, epochs=1)
    torch.testing.assert_close(difference, expected)


def test_an_answer_ends_before_its_end_of_sequence_token() -> None:
    model, prompts = build_model("llama"), FORGET + RETAIN
    whole = reference.greedy_answers(model, prompts, eos_ids=(), max_new_tokens=6)
    assert [len(answer) for answer in whole] == [6] * len(prompts)
    eos = whole[0][2]
    assert reference.greedy_answers(model, prompts, eos_ids=[eos], max_new_tokens=6) == [
        answer[: answer.index(eos)] if eos in answer else answer for answer in whole
    ]


def test_what_the_page_cannot_do_is_refused_before_any_work() -> None:
    for family in ("gemma2", "gemma3_text", "granite", "mixtral"):
        with pytest.raises(ValueError, match=rf"{family}: .*Use Llama, .*Gemma 1 or Phi-3"):
            reference.unlearning_vector(build_model(family), 0, DECLINED, FORGET)
    model = build_model("llama")
    with pytest.raises(ValueError, match=r"layer 3: the model has blocks 0 to 2"):
        reference.mlp_inputs(model, 3, FORGET)
    with pytest.raises(ValueError, match=r"layer 0: not finite; lower"):
        reference.add_difference(model, 0, torch.tensor(float("inf")))
    with pytest.raises(ValueError, match=r"ridge 0: choose a positive number"):
        reference.fit_closed_form(torch.ones(2, 3), torch.ones(2), torch.ones(4), ridge=0)
    with pytest.raises(ValueError, match=r"at least one prompt each"):
        reference.unlearn(
            model,
            layers=[0],
            coefficient=1.0,
            reference=DECLINED,
            forget=FORGET,
            retain=(),
            solver=FITS["adamw"],
        )


def test_the_page_is_one_page_and_needs_nothing_of_this_package() -> None:
    text = Path(reference.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    imported: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ga"}, "not ga"),
        ({"solver": "lora"}, r"not lunar \(lora\)"),
        ({"fix": ("positions=last",)}, "only solver and epochs"),
    ],
)
def test_the_page_is_asked_for_what_it_does(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assemble(RunOptions(engine="reference", **options))
