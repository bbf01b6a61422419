"""What a worker's trials ask and leave; both models asked side by side, as `generate` is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
from method_examples import same, weights
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trial_specs import generated

from lunar_tune.errors import TrialError
from lunar_tune.methods.contract import Fit
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.trial.evaluator import Check, drive
from lunar_tune.trial.layer_scores import layer_scores
from lunar_tune.trial.single import asking
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import TRIAL, Task, TaskRunner
from lunar_tune.trial.worker import FITS, LONG_FITS, Worker

Specs = Callable[..., TrialSpec]
SETTING = {"layer": 1, "coefficient": 20.0, "learning_rate": 0.01}


def test_a_full_evaluation_takes_all_rows_and_the_published_budget(
    spec: Specs, full_budget: int
) -> None:
    worker = Worker(spec(retain_rows=2, evaluation_rows=5))
    trial, full = worker.run(SETTING), worker.baseline(full=True)
    assert (trial.max_new_tokens, trial.evaluation.scores["retain_rows"]) == (3, 2)
    assert (full.max_new_tokens, full.evaluation.scores["retain_rows"]) == (full_budget, 5)


def test_a_failed_trial_leaves_the_worker_ready_for_the_next(spec: Specs) -> None:
    worker = Worker(spec(seed=3))
    before = weights(worker.loaded)
    first = worker.run(SETTING)
    with pytest.raises(TrialError):
        worker.run(SETTING | {"learning_rate": 1e30})
    with pytest.raises(ZeroDivisionError):
        worker.run(SETTING, inside=lambda *_: 1 / 0)
    assert same(weights(worker.loaded), before)
    again = worker.run(SETTING, seed=3)
    assert (again.evaluation, again.losses) == (first.evaluation, first.losses)
    assert worker.run(SETTING, seed=1).losses != first.losses
    assert Worker(spec(seed=1)).run(SETTING).losses == worker.run(SETTING, seed=1).losses


@pytest.mark.parametrize(
    ("options", "setting"),
    [({}, SETTING | {"learning_rate": 0.05}), ({"method": "gd"}, {"learning_rate": 0.01})],
)
def test_a_question_is_left_out_as_if_the_data_never_had_it(
    spec: Specs, options: dict[str, Any], setting: dict[str, float]
) -> None:
    """The same answers as of a worker whose fit has one question less, asked by `run`."""
    made = spec(**options)
    first = Worker(made)
    rows = first.unseen(setting)
    retain = made.data.fit_retain
    assert len(rows) == (LONG_FITS if options else FITS), "an eighth of so few is one question"
    for row in rows:
        kept = tuple(one for one in retain if one.question != row.question)
        assert len(kept) == len(retain) - 1
        worker = Worker(
            dataclasses.replace(made, data=dataclasses.replace(made.data, fit_retain=kept))
        )
        answers = worker.run(setting).evaluation.rows
        assert row in answers
    fitted = first.run(setting).evaluation.rows
    assert fitted == Worker(made).run(setting).evaluation.rows, "it leaves the worker as it was"
    assert options or any(row not in fitted for row in rows), "it makes a difference"
    unseen = dataclasses.replace(made.data, fit_retain=made.data.fit_forget)
    assert Worker(dataclasses.replace(made, data=unseen)).unseen(setting) == ()


def test_nothing_is_left_out_of_a_fit_that_keeps_nothing(spec: Specs) -> None:
    rate = {"learning_rate": 0.01}
    worker = Worker(spec(method="npo"))
    assert worker.unseen(rate) == ()
    assert len(worker.unseen({**rate, "retain_weight": 1.0})) == LONG_FITS
    assert Worker(spec(method="ga", fix=("retain_weight=1",))).unseen(rate) == ()
    steered = {**rate, "layer": 1, "coefficient": 5.0}
    assert Worker(spec(method="rmu", fix=("steering_alpha=0",))).unseen(steered) == ()
    assert len(Worker(spec(method="rmu")).unseen(steered)) == LONG_FITS


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("method", ["ga", "rmu"])
def test_a_16_bit_fit_is_looked_at_as_evaluated(spec: Specs, method: str, trained: str) -> None:
    """All rows are asked in a look here: it scores as a trial of that length. The rate is small."""
    own = {"layer": 1, "coefficient": 5.0} if method == "rmu" else {}

    def run(epochs: int) -> Any:
        fix = (f"trained={trained}", f"epochs={epochs}", "dropout=0")
        changed = {"retain_floor": 0.0}
        worker = Worker(spec(dtype="bfloat16", method=method, fix=fix, changed=changed))
        before = weights(worker.loaded)
        result = worker.run({**own, "learning_rate": 1e-6})
        assert same(weights(worker.loaded), before)
        return result

    (look,) = run(2).checks
    scores = run(1).evaluation.scores
    assert (look.epochs, look.forget_rouge1) == (1, scores["forget_rouge1"])
    assert look.retain_rouge1 == scores["retain_rouge1"]


REPORTING: dict[str, dict[str, Any]] = {
    "metrics": {"metrics": ("retain_mrr", "forget_perplexity", "refusal_quality")},
    "no texts": {"text": False},
    "factual": {"factual_data": "factual"},
    "rows": {"evaluation_rows": 2, "retain_rows": 1},
    "budget": {"max_new_tokens": 9},
    "plain": {"engine": "plain"},
    "early": {"changed": {"early_exit": True, "layers": (1,)}},
}
BY_MATRIX = ({"fix": ("epochs=2", "master_dtype=bfloat16")}, SETTING)
BY_LOSS = ({"method": "gd", "fix": ("epochs=2", "batch_size=1")}, {"learning_rate": 0.01})


@pytest.mark.parametrize(("options", "setting"), [BY_MATRIX, BY_LOSS])
def test_what_reports_changes_no_bit_of_a_fit(
    spec: Specs, options: dict[str, Any], setting: dict[str, float]
) -> None:
    """In 16 bits every batch of another shape rounds differently, and a fit amplifies that."""

    def fitted(
        before: Callable[[Worker], object] = lambda _: None, **more: Any
    ) -> dict[str, torch.Tensor]:
        worker = Worker(spec(dtype="bfloat16", **(options | more)))
        before(worker)
        seen: dict[str, torch.Tensor] = {}
        worker.run(
            setting,
            inside=lambda _, edit: seen.update({n: w.clone() for n, w in edit.weights().items()}),
        )
        return seen

    alone = fitted()
    assert same(alone, fitted(lambda worker: worker.baseline(reported=True)))
    assert same(alone, fitted(lambda worker: worker.run(setting, seed=5, full=True)))
    if setting is SETTING:
        scored = partial(layer_scores, coefficient=2.0, layers=(0, 1), rows=2)
        assert same(alone, fitted(scored))
    for name, more in REPORTING.items():
        assert same(alone, fitted(Worker.baseline, **more)), name


QUESTIONS = ("What of A_B, 1?", "Who are you?", "What of C_D, 0?")
GA = {"method": "ga", "fix": ("epochs=3", "batch_size=1")}
RATE = {"learning_rate": 0.05}
BUDGET = 9
BY_RIDGE = {"layer": 1, "coefficient": 20.0, "ridge": 0.1}
Say = Callable[[Any], list[str]]


@pytest.fixture
def say(checkpoint: Callable[..., Path]) -> Say:
    """Return what transformers' own `generate` says with a model."""
    return partial(generated, checkpoint("qwen2"), questions=QUESTIONS, budget=BUDGET)


@pytest.mark.parametrize(("options", "parameters"), [({}, SETTING), (GA, RATE)])
def test_each_model_says_what_generate_says_of_it(
    spec: Specs, say: Say, options: dict[str, Any], parameters: dict[str, float]
) -> None:
    made, unlearned = spec(**options), []
    expected = say(AutoModelForCausalLM.from_pretrained(made.model.source))
    Worker(made).run(parameters, inside=lambda loaded, _: unlearned.extend(say(loaded.model)))
    assert unlearned != expected
    with asking(made, parameters, max_new_tokens=BUDGET) as ask:
        together = ask(QUESTIONS)
        single = [one for question in reversed(QUESTIONS) for one in ask([question])]
    assert [one.question for one in together] == list(QUESTIONS)
    assert [one.truth for one in together] == ["Kettles 1.", None, "Kettles 0."]
    assert [one.set_name for one in together] == ["forget", None, "retain"]
    assert [one.base_model for one in together] == expected
    assert [one.unlearned for one in together] == unlearned
    assert single[::-1] == together


def test_the_published_evaluation_asks_with_a_second_bos_what_is_fitted_with_one(
    spec: Specs, tokenizer: PreTrainedTokenizerFast
) -> None:
    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
    )
    losses, said = [], []
    for template in ("published", "published-eval"):
        made = spec(chat_template=template, solver="closed_form", max_new_tokens=9)
        loaded = dataclasses.replace(load_model(made.model), tokenizer=begins)
        turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        records = (*made.data.forget, *made.data.retain)
        prompts = begins([turn.format(record.question) for record in records])["input_ids"]
        if template == "published-eval":
            prompts = begins(begins.batch_decode(prompts))["input_ids"]

        def say(
            model: LoadedModel,
            _: Any,
            ends: tuple[int, ...] = loaded.eos_ids,
            prompts: list[list[int]] = prompts,
        ) -> None:
            said.append(engine_cases.generated(model.model, prompts, budget=9, eos=ends))

        result = Worker(made, loaded).run(BY_RIDGE, inside=say)
        tokens = sorted(result.evaluation.tokens.items())
        assert [list(answer) for _, answer in tokens] == said[-1]
        losses.append(result.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert said[0] != said[1]


def test_a_fit_may_end_early_again(spec: Specs, say: Say) -> None:
    made, said = spec(**GA), []
    for epochs in (1, 3):
        with asking(made, RATE, epochs=epochs, max_new_tokens=BUDGET) as ask:
            said.append([one.unlearned for one in ask(QUESTIONS)])
    worker = Worker(made)
    with worker.prepared.unlearning(RATE, seed=made.seed) as fit:
        next(iter(fit))
        fit.finish()
        assert said[1] != said[0] == say(worker.loaded.model)


# What ends a gradient method's fit early


class MadeFit(Fit):
    """A fit that trains nothing, and counts its epochs."""

    def __init__(self, n_epochs: int) -> None:
        self.n_epochs, self.done = n_epochs, 0

    def __iter__(self) -> Iterator[int]:
        for epoch in range(1, self.n_epochs + 1):
            self.done = epoch
            yield epoch


def seen_of(fit: MadeFit, *retain: float, floor: float | None = 0.8) -> list[int]:
    """Return after which epochs a fit is looked at that keeps so much, look by look."""
    kept = iter(retain)

    def look(epochs: int) -> Check:
        return Check(epochs=epochs, forget_rouge1=0.0, retain_rouge1=next(kept, 1.0))

    return [check.epochs for check in drive(fit, floor, look)]


def test_a_fit_is_looked_at_at_even_distances_and_not_after_its_last_epoch() -> None:
    looks = {20: [4, 8, 12, 16], 12: [3, 6, 9], 3: [1, 2], 1: []}
    assert {epochs: seen_of(MadeFit(epochs)) for epochs in looks} == looks
    assert seen_of(MadeFit(20), floor=None) == []


def test_a_fit_that_is_below_half_of_the_floor_twice_in_a_row_ends() -> None:
    ends = {(0.39,): 20, (0.39, 0.39): 8, (0.39, 0.41): 20, (0.9, 0.4): 20, (0.2, 0.9, 0.39, 0): 16}
    for retain, done in ends.items():
        seen_of(fit := MadeFit(20), *retain)
        assert fit.done == done, retain


def test_a_task_tells_the_looks_and_looking_changes_no_score(spec: Specs) -> None:
    """A random model keeps nothing: below every floor but that of zero."""

    def result(floor: float | None) -> Any:
        changed = {"retain_floor": floor, "early_exit": True}
        runner = TaskRunner(spec(method="ga", fix=("epochs=12",), changed=changed))
        return runner.run(Task(kind=TRIAL, number=1, parameters={"learning_rate": 1e-3})).result

    lost, kept, whole = result(0.8), result(0.0), result(None)
    assert ([check.epochs for check in lost.checks], len(lost.losses)) == ([3, 6], 6)
    assert ([check.epochs for check in kept.checks], len(kept.losses)) == ([3, 6, 9], 12)
    assert whole.checks == ()
    assert whole.losses == kept.losses
    assert whole.evaluation.scores == kept.evaluation.scores


def test_every_engine_ends_an_answer_at_the_same_place_where_it_repeats_itself(
    spec: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where nobody named a length; a random model repeats a token a few times."""
    monkeypatch.setattr("lunar_tune.metrics.settling.LEAST_REPEATED", 4)
    for name in ("PUBLISHED_MAX_NEW_TOKENS", "READ_TOKENS"):
        monkeypatch.setattr(f"lunar_tune.trial.evaluator.{name}", 60)

    def confirmed(**options: Any) -> Any:
        worker = Worker(spec(evaluation_rows=4, **options))
        return worker.run(SETTING, full=True, bounded=False, reported=True).evaluation

    whole = confirmed(max_new_tokens=60)
    assert (whole.repeating, whole.whole_cost) == ({}, 1.0)
    fast = confirmed(max_new_tokens=None)
    for engine in ("plain", "reference"):
        other = confirmed(max_new_tokens=None, engine=engine)
        assert (other.rows, other.repeating) == (fast.rows, fast.repeating)
        assert other.whole_cost == fast.whole_cost > 1
    both = list(zip(fast.rows, whole.rows, strict=True))
    cut = [(row, one) for row, one in both if row.answer != one.answer]
    assert len(cut) == sum(fast.repeating.values()) > 0
    assert all(one.answer.startswith(row.answer) and not row.ended for row, one in cut)
