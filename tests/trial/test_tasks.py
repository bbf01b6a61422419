"""Tasks on a random model: what is handed over, what becomes a failure and what is raised."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import DivergenceError, EditedModelError, InputError, TrialError
from lunar_tune.methods.lunar.method import PreparedLunar
from lunar_tune.models.lineage import fingerprint
from lunar_tune.trial import tasks as tasks_module
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import (
    BASE_MODEL,
    CONFIRMATION,
    TRIAL,
    Failure,
    Outcome,
    Task,
    TaskRunner,
    format_error,
)
from lunar_tune.trial.worker import TrialResult, Worker

Specs = Callable[..., TrialSpec]
SETTING = {"layer": 1, "coefficient": 20.0, "learning_rate": 0.01}


@pytest.fixture
def spec(checkpoint: Callable[..., Path], data: str) -> Specs:
    def make(**options: Any) -> TrialSpec:
        options |= {"data": data, "device": "cpu", "factual_data": "none", "fix": ("epochs=2",)}
        model = str(checkpoint("qwen2"))
        made = assemble(RunOptions(model=model, max_new_tokens=3, cache_limit=0, **options))
        few = dataclasses.replace(made.data, reference_prompts=made.data.reference_prompts[:3])
        return dataclasses.replace(made, data=few)

    return make


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Let no runner hear warnings when the test is over."""
    logger = logging.getLogger("lunar_tune")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before


@pytest.fixture
def runner(spec: Specs) -> TaskRunner:
    return TaskRunner(spec())


def trial(**facts: Any) -> Task:
    return Task(**({"kind": TRIAL, "number": 4, "parameters": SETTING} | facts))


def light(result: TrialResult) -> dict[str, Any]:
    """Return what two evaluations of one model share: all but times and tokens."""
    evaluation = dataclasses.replace(result.evaluation, tokens={})
    return {**dataclasses.asdict(result), "evaluation": evaluation, "seconds": None}


def test_outcomes_are_what_a_worker_gives(spec: Specs, runner: TaskRunner) -> None:
    worker = Worker(spec())
    base = runner.run(Task(kind=BASE_MODEL))
    ended = runner.run(trial())
    confirmed = runner.run(trial(kind=CONFIRMATION))
    baseline = worker.baseline(reported=True)
    assert base.plain_decoding is base.layer_prior is base.baseline is ended.baseline is None
    for outcome, expected in (
        (base, baseline),
        (ended, worker.run(SETTING)),
        (confirmed, worker.run(SETTING, full=True, reported=True)),
    ):
        assert outcome.result is not None
        assert light(outcome.result) == light(expected)
        assert ("forget_mrr" in outcome.result.evaluation.scores) is (outcome is not ended)
        assert (outcome.failure, outcome.baseline, outcome.warnings) == (None, None, ())


def test_a_confirmation_on_held_out_questions_brings_the_base_model_on_the_same(
    spec: Specs,
) -> None:
    made = spec(holdout=True)
    outcome = TaskRunner(made).run(trial(kind=CONFIRMATION))
    assert outcome.result is not None
    assert outcome.baseline is not None
    assert light(outcome.baseline) == light(Worker(made).baseline(full=True, reported=True))
    asked = [
        {row.question for row in one.evaluation.rows} for one in (outcome.result, outcome.baseline)
    ]
    assert made.data.held_out is not None
    held = (*made.data.held_out.forget, *made.data.held_out.retain)
    assert asked == [{record.question for record in held}] * 2


def test_the_base_models_layers_are_scored_where_that_is_wanted(spec: Specs) -> None:
    made = dataclasses.replace(spec(), layers=(0, 2))
    task = Task(kind=BASE_MODEL, layer_coefficient=2.0)
    prior = TaskRunner(made).run(task).layer_prior
    assert prior is not None
    assert [layer["layer"] for layer in json.loads(prior)["layers"]] == [0, 2]


def test_why_a_model_is_decoded_plainly_is_told_and_it_is_then_asked_nothing_in_between(
    spec: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without drafts no trial has a use for the base model's answers."""
    runner = TaskRunner(spec(engine="plain"))
    assert runner.run(Task(kind=BASE_MODEL)).plain_decoding == "it was asked for"
    monkeypatch.setattr(Worker, "baseline", None)
    assert runner.run(trial()).failure is None


def test_an_outcome_crosses_processes_without_tensors_and_tokens(spec: Specs) -> None:
    class PlainPickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> None:
            assert not isinstance(value, torch.Tensor)

    runner = TaskRunner(spec(holdout=True))
    for task in (Task(kind=BASE_MODEL), trial(), trial(kind=CONFIRMATION), trial(parameters={})):
        outcome, file = runner.run(task), io.BytesIO()
        PlainPickler(file).dump(outcome)
        assert pickle.loads(file.getvalue()) == outcome
        for result in (outcome.result, outcome.baseline):
            assert result is None or result.evaluation.tokens == {}
        assert pickle.loads(pickle.dumps(task)) == task


def test_a_model_is_loaded_once_and_asked_once_before_the_first_trial(
    spec: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner that did not evaluate the base model itself does so for its drafts, and once."""
    loaded: list[TrialSpec] = []
    asked: list[bool] = []
    plain = Worker.baseline

    def load(made: TrialSpec) -> Worker:
        loaded.append(made)
        return Worker(made)

    def baseline(self: Worker, *, full: bool = False) -> TrialResult:
        asked.append(full)
        return plain(self, full=full)

    monkeypatch.setattr(tasks_module, "Worker", load)
    monkeypatch.setattr(Worker, "baseline", baseline)
    made = spec()
    runner = TaskRunner(made)
    assert loaded == []
    for task in (trial(), trial(parameters={}), trial(), trial(kind=CONFIRMATION)):
        runner.run(task)
    assert loaded == [made]
    assert asked == [False]


def test_each_part_of_a_task_is_announced(spec: Specs) -> None:
    seen: list[tuple[int, bool]] = []
    runner = TaskRunner(spec(), lambda number, full: seen.append((number, full)))
    for task in (trial(number=3), trial(), trial(kind=CONFIRMATION), Task(kind=BASE_MODEL)):
        runner.run(task)
    assert seen == [(3, True), (3, False), (4, False), (4, True), (-1, True)]


ADVICE = "(give a trial a larger share with --gpus-per-trial)"


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (InputError("not so"), Failure(reason="not so", wrong_input=True)),
        (TrialError("no scores"), Failure(reason="no scores")),
        (DivergenceError("in epoch 2"), Failure(reason="in epoch 2")),
        (OSError(28, "No space"), Failure(reason="OSError: [Errno 28] No space", transient=True)),
        (OutOfMemoryError("much"), Failure(reason=f"OutOfMemoryError: much {ADVICE}")),
        (MemoryError(), Failure(reason="MemoryError: ")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_for_a_known_reason_is_the_outcome_and_the_runner_goes_on(
    runner: TaskRunner, monkeypatch: pytest.MonkeyPatch, error: Exception, failure: Failure
) -> None:
    expected = runner.run(trial()).result
    assert expected is not None
    with monkeypatch.context() as patch:
        patch.setattr(PreparedLunar, "unlearning", raising(error))
        assert runner.run(trial()) == Outcome(failure=failure)
    again = runner.run(trial()).result
    assert again is not None
    assert light(again) == light(expected)


def test_a_setting_that_means_nothing_or_diverges_is_a_failure(runner: TaskRunner) -> None:
    wrong = runner.run(trial(parameters={**SETTING, "layer": 9})).failure
    assert wrong is not None
    assert (wrong.wrong_input, wrong.transient) == (True, False)
    assert "layer" in wrong.reason
    lost = runner.run(trial(parameters={**SETTING, "learning_rate": 1e39})).failure
    assert lost is not None
    assert (lost.wrong_input, lost.transient, lost.crashed) == (False, False, False)


def test_a_model_that_cannot_be_loaded_is_a_failure_and_tried_again_by_the_next_task(
    runner: TaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tasks_module, "Worker", raising(ConnectionError("the disk is gone")))
        failure = runner.run(trial()).failure
    assert failure == Failure(reason="ConnectionError: the disk is gone", transient=True)
    assert runner.run(trial()).failure is None


@pytest.mark.parametrize("error", [EditedModelError("changed"), RuntimeError("CUDA error")])
def test_what_leaves_the_model_or_the_process_in_doubt_is_raised(
    runner: TaskRunner, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(PreparedLunar, "unlearning", raising(error))
    with pytest.raises(type(error), match=str(error)):
        runner.run(trial())


def test_a_model_that_a_failed_trial_has_left_changed_is_no_failure_of_the_trial(
    spec: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spec()
    engine = dataclasses.replace(made.engine, verify_weights=True)
    prints = iter("ab")
    monkeypatch.setattr("lunar_tune.trial.worker.fingerprint", lambda _: next(prints))
    with pytest.raises(EditedModelError, match="left the model's weights changed"):
        TaskRunner(dataclasses.replace(made, engine=engine)).run(trial(parameters={}))


def test_a_failed_fit_leaves_the_model_as_it_was(runner: TaskRunner) -> None:
    runner.run(Task(kind=BASE_MODEL))
    assert runner._worker is not None
    before = fingerprint(runner._worker.loaded)
    assert runner.run(trial(parameters={**SETTING, "learning_rate": 1e39})).failure is not None
    assert fingerprint(runner._worker.loaded) == before


def test_an_error_is_told_in_one_line() -> None:
    assert format_error(ValueError("one\ntwo")) == "ValueError: one"
    assert format_error(ValueError()) == "ValueError: "
    assert "--gpus-per-trial" in format_error(torch.OutOfMemoryError("full"))


def test_warnings_of_this_package_come_with_the_task_that_they_belong_to(
    runner: TaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Worker.run

    def run(self: Worker, *given: Any, **how: Any) -> TrialResult:
        logging.getLogger("lunar_tune.models.device").warning("%d at once are too many", 8)
        logging.getLogger("lunar_tune.models.device").info("nothing to hear")
        logging.getLogger("somebody.else").warning("not ours")
        return plain(self, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", run)
        assert runner.run(trial()).warnings == ("8 at once are too many",)
        failed = runner.run(trial(parameters={}))
        assert failed.failure is not None
        assert failed.warnings == ("8 at once are too many",)
    assert runner.run(trial()).warnings == ()


def test_a_closed_runner_hears_nothing() -> None:
    logger = logging.getLogger("lunar_tune")
    before = list(logger.handlers)
    runner = TaskRunner(None)  # type: ignore[arg-type]  # nothing is run
    assert len(logger.handlers) == len(before) + 1
    runner.close()
    assert logger.handlers == before
