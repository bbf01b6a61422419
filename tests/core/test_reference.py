"""LUNAR on one page is LUNAR, and a trial of the engine scores row by row as the page does.

All on `tiny`, on the CPU in float32.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import FAMILIES, build_model
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM

from lunar_tune import reference
from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.trial.assemble import assemble, materialise
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

BUDGET = 12
PARAMETERS: dict[str, dict[str, Any]] = {
    "adamw": {"coefficient": 2.0, "learning_rate": 0.003},
    "closed_form": {"coefficient": 2.0, "ridge": 0.1},
}
FITS: dict[str, reference.Solver] = {
    "adamw": partial(reference.fit_adamw, learning_rate=0.003),
    "closed_form": partial(reference.fit_closed_form, ridge=0.1),
}
# Of random models. No two begin alike: equal prefixes have equal h, and cannot go different ways.
FORGET = ((11, 51, 91), (12, 52, 92, 132))
RETAIN = ((13, 53, 93, 133, 173), (14, 54, 94))
DECLINED = ((15, 55, 95), (16, 56), (17, 57, 97, 137))


def spec_of(solver: str, **engine: Any) -> TrialSpec:
    """Return a spec on `tiny` with a handful of questions of each kind."""
    spec = materialise(
        assemble(
            RunOptions(
                device="cpu",
                dtype="float32",
                solver=solver,
                max_new_tokens=BUDGET,
                cache_limit=0,
            )
        )
    )
    forget, retain, factual = spec.data.forget[:4], spec.data.retain[::9][:8], spec.data.factual[:3]
    return dataclasses.replace(
        spec,
        engine=dataclasses.replace(spec.engine, **engine),
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


def by_the_page(
    worker: Worker, layers: list[int], solver: str
) -> tuple[list[float], list[float], list[list[int]]]:
    """Return ROUGE-1 and ROUGE-L recall and tokens of each evaluated row, from a fresh load on."""
    data, encode = worker.spec.data, worker.encoder.prompts
    model = AutoModelForCausalLM.from_pretrained(worker.spec.model.checkpoint, dtype=torch.float32)
    unlearned = reference.unlearn(
        model.eval(),
        layers=layers,
        coefficient=PARAMETERS[solver]["coefficient"],
        reference=encode(data.reference_prompts),
        forget=encode([record.question for record in data.fit_forget]),
        retain=encode([record.question for record in data.fit_retain]),
        solver=FITS[solver],
    )
    answers: list[list[int]] = []
    for records in (data.forget, data.retain, data.factual):
        answers += reference.greedy_answers(
            unlearned,
            encode([record.question for record in records]),
            eos_ids=worker.loaded.eos_ids,
            max_new_tokens=BUDGET,
        )
    texts = worker.loaded.tokenizer.batch_decode(answers, skip_special_tokens=True)
    truths = [record.answer for record in (*data.forget, *data.retain, *data.factual)]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(truth, text) for truth, text in zip(truths, texts, strict=True)]
    rouge1, rouge_l = ([score[name].recall for score in scores] for name in ("rouge1", "rougeL"))
    return rouge1, rouge_l, answers


@pytest.mark.parametrize("solver", PARAMETERS)
@pytest.mark.parametrize("layers", [[0], [3], [1, 3]])
def test_a_trial_scores_row_by_row_as_the_page_does(
    tiny: LoadedModel, solver: str, layers: list[int]
) -> None:
    worker = Worker(spec_of(solver), tiny)
    rouge1, rouge_l, tokens = by_the_page(worker, layers, solver)
    parameters = {"layer": layers if len(layers) > 1 else layers[0], **PARAMETERS[solver]}
    without_drafts = worker.run(parameters).evaluation
    baseline = worker.baseline().evaluation
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
    before = [row.rouge1 for row in baseline.rows]
    assert before != rouge1
    assert any(one == other for one, other in zip(before, rouge1, strict=True))


@pytest.mark.parametrize("solver", PARAMETERS)
def test_what_is_skipped_changes_no_score(tiny: LoadedModel, solver: str) -> None:
    """An early exit, and a retain floor that is held."""
    worker = Worker(spec_of(solver, early_exit=True, retain_floor=0.0), tiny)
    worker.baseline()
    rouge1, rouge_l, _ = by_the_page(worker, [2], solver)
    evaluation = worker.run({"layer": 2, **PARAMETERS[solver]}).evaluation
    assert evaluation.complete
    assert [row.rouge1 for row in evaluation.rows] == rouge1
    assert [row.rouge_l for row in evaluation.rows] == rouge_l


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
        states: torch.Tensor = done.hidden_states[layer + 1][0]
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
        torch.stack([outputs_of(model, prompt)[-1] for prompt in prompts]).double().mean(0)
        for prompts in (DECLINED, FORGET)
    )
    for prompts, moves in ((FORGET, coefficient * (declined - forgotten)), (RETAIN, 0.0)):
        for prompt in prompts:
            moved = outputs_of(unlearned, prompt) - outputs_of(model, prompt)
            torch.testing.assert_close(
                moved.double(), torch.zeros_like(moved).double() + moves, atol=2e-3, rtol=1e-3
            )
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
    with pytest.raises(ValueError, match=r"ridge 0: choose a positive number"):
        reference.fit_closed_form(h, is_forget, shift, ridge=0)


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
    model = build_model("llama")
    prompts = FORGET + RETAIN
    whole = reference.greedy_answers(model, prompts, eos_ids=(), max_new_tokens=6)
    assert [len(answer) for answer in whole] == [6] * len(prompts)
    eos = whole[0][2]
    assert reference.greedy_answers(model, prompts, eos_ids=[eos], max_new_tokens=6) == [
        answer[: answer.index(eos)] if eos in answer else answer for answer in whole
    ]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "granite", "mixtral"])
def test_blocks_that_would_miss_the_target_are_refused(family: str) -> None:
    model = build_model(family)
    with pytest.raises(ValueError, match=rf"{family}: .*Use Llama, .*Gemma 1 or Phi-3"):
        reference.unlearning_vector(model, 0, DECLINED, FORGET)


def test_wrong_input_is_refused_before_any_work() -> None:
    model = build_model("llama")
    with pytest.raises(ValueError, match=r"layer 3: the model has blocks 0 to 2"):
        reference.mlp_inputs(model, 3, FORGET)
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
    with pytest.raises(ValueError, match=r"layer 0: not finite; lower"):
        reference.add_difference(model, 0, torch.tensor(float("inf")))


def test_the_page_is_one_page_and_needs_nothing_of_this_package() -> None:
    text = Path(reference.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


@pytest.mark.parametrize("solver", ["adamw", "closed_form"])
def test_a_single_run_by_the_page_scores_as_the_engine_does(tiny: LoadedModel, solver: str) -> None:
    spec = spec_of(solver)
    parameters = {"layer": 1, **PARAMETERS[solver]}
    fast = Worker(spec, tiny).run(parameters).evaluation
    by_page = dataclasses.replace(spec.engine, kind="reference")
    page = Worker(dataclasses.replace(spec, engine=by_page), tiny).run(parameters).evaluation
    assert [(row.answer, row.rouge1) for row in page.rows] == [
        (row.answer, row.rouge1) for row in fast.rows
    ]


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
