"""Tasks on a random model: what is handed over, what becomes a failure and what is raised."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lunar_tune.errors import DivergenceError, EditedModelError, InputError, TrialError
from lunar_tune.methods.lunar.method import PreparedLunar
from lunar_tune.trial import worker as worker_module
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
LOGGER = logging.getLogger("lunar_tune")


@pytest.fixture(scope="module", autouse=True)
def _handlers() -> Iterator[None]:
    """Let no runner hear warnings when the module is over."""
    before = list(LOGGER.handlers)
    yield
    LOGGER.handlers[:] = before


@pytest.fixture(scope="module")
def runner(spec: Specs) -> TaskRunner:
    """Return a runner that goes on after whatever another test made go wrong."""
    return TaskRunner(spec())


@pytest.fixture(scope="module")
def expected(spec: Specs) -> dict[str, Any]:
    """Return what a worker gives for each kind of task."""
    worker = Worker(spec())
    return {
        BASE_MODEL: light(worker.baseline(reported=True)),
        TRIAL: light(worker.run(SETTING)),
        CONFIRMATION: light(worker.run(SETTING, full=True, reported=True)),
    }


def trial(**facts: Any) -> Task:
    return Task(**({"kind": TRIAL, "number": 4, "parameters": SETTING} | facts))


def light(result: TrialResult | None) -> dict[str, Any]:
    """Return what two evaluations of one model share: all but times and tokens."""
    assert result is not None
    evaluation = dataclasses.replace(result.evaluation, tokens={})
    return {**dataclasses.asdict(result), "evaluation": evaluation, "seconds": None}


def test_outcomes_are_what_a_worker_gives(runner: TaskRunner, expected: dict[str, Any]) -> None:
    for kind in (BASE_MODEL, TRIAL, CONFIRMATION):
        outcome = runner.run(Task(kind=BASE_MODEL) if kind == BASE_MODEL else trial(kind=kind))
        assert light(outcome.result) == expected[kind]
        measured = outcome.result is not None and outcome.result.evaluation.scores
        assert ("forget_mrr" in (measured or {})) is (kind != TRIAL)
        assert outcome == Outcome(result=outcome.result)


def test_a_confirmation_on_held_out_questions_brings_the_base_model_on_the_same(
    spec: Specs,
) -> None:
    """An outcome crosses processes without tensors and tokens."""

    class PlainPickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> None:
            assert not isinstance(value, torch.Tensor)

    made = spec(holdout=True)
    runner = TaskRunner(made)
    for task in (Task(kind=BASE_MODEL), trial(parameters={}), trial(), trial(kind=CONFIRMATION)):
        outcome, file = runner.run(task), io.BytesIO()
        PlainPickler(file).dump(outcome)
        assert pickle.loads(file.getvalue()) == outcome
        assert pickle.loads(pickle.dumps(task)) == task
        for result in (outcome.result, outcome.baseline):
            assert result is None or result.evaluation.tokens == {}
    assert outcome.result is not None
    assert light(outcome.baseline) == light(Worker(made).baseline(full=True, reported=True))
    assert made.data.held_out is not None
    held = {record.question for record in (*made.data.held_out.forget, *made.data.held_out.retain)}
    assert {row.question for row in outcome.result.evaluation.rows} == held


def test_the_base_models_layers_are_scored_where_that_is_wanted(spec: Specs) -> None:
    made = dataclasses.replace(spec(), layers=(0, 2))
    prior = TaskRunner(made).run(Task(kind=BASE_MODEL, layer_coefficient=2.0)).layer_prior
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


def test_a_model_is_loaded_and_asked_once_before_the_first_trial_and_each_part_is_announced(
    spec: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner that did not evaluate the base model itself does so for its drafts, and once."""
    loaded: list[TrialSpec] = []
    asked: list[bool] = []
    seen: list[tuple[int, bool]] = []
    plain = Worker.baseline

    def load(made: TrialSpec) -> Worker:
        loaded.append(made)
        return Worker(made)

    def baseline(self: Worker, *, full: bool = False, reported: bool = False) -> TrialResult:
        asked.append(full)
        return plain(self, full=full, reported=reported)

    monkeypatch.setattr(worker_module, "Worker", load)
    monkeypatch.setattr(Worker, "baseline", baseline)
    made = spec()
    runner = TaskRunner(made, lambda number, full: seen.append((number, full)))
    assert loaded == []
    for task in (trial(number=3), trial(parameters={}), trial(kind=CONFIRMATION)):
        runner.run(task)
    assert loaded == [made]
    assert asked == [False]
    runner.run(Task(kind=BASE_MODEL))
    assert seen == [(3, True), (3, False), (4, False), (4, True), (-1, True)]


ADVICE = "(give a trial a larger share with --gpus-per-trial)"


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_what_goes_wrong_for_a_known_reason_is_the_outcome_and_the_runner_goes_on(
    runner: TaskRunner, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, failure in (
        (InputError("not so"), Failure(reason="not so", wrong_input=True)),
        (TrialError("no scores"), Failure(reason="no scores")),
        (DivergenceError("in epoch 2"), Failure(reason="in epoch 2")),
        (OSError(28, "full"), Failure(reason="OSError: [Errno 28] full", transient=True)),
        (OutOfMemoryError("much"), Failure(reason=f"OutOfMemoryError: much {ADVICE}")),
        (MemoryError(), Failure(reason="MemoryError: ")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PreparedLunar, "unlearning", raising(error))
            assert runner.run(trial()) == Outcome(failure=failure)
        assert light(runner.run(trial()).result) == expected[TRIAL]


def test_a_setting_that_means_nothing_or_diverges_is_a_failure(
    runner: TaskRunner, expected: dict[str, Any]
) -> None:
    wrong = runner.run(trial(parameters={**SETTING, "layer": 9})).failure
    assert wrong is not None
    assert (wrong.wrong_input, wrong.transient) == (True, False)
    assert "layer" in wrong.reason
    lost = runner.run(trial(parameters={**SETTING, "learning_rate": 1e39})).failure
    assert lost is not None
    assert (lost.wrong_input, lost.transient, lost.crashed) == (False, False, False)
    assert light(runner.run(trial()).result) == expected[TRIAL]


def test_a_model_that_cannot_be_loaded_is_a_failure_and_tried_again_by_the_next_task(
    spec: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = TaskRunner(spec())
    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "Worker", raising(ConnectionError("the disk is gone")))
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
    prints = iter("ab")
    monkeypatch.setattr("lunar_tune.trial.worker.fingerprint", lambda _: next(prints))
    with pytest.raises(EditedModelError, match="left the model's weights changed"):
        TaskRunner(spec(changed={"verify_weights": True})).run(trial(parameters={}))


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


def test_a_closed_runner_hears_nothing(spec: Specs) -> None:
    before = list(LOGGER.handlers)
    runner = TaskRunner(spec())
    assert len(LOGGER.handlers) == len(before) + 1
    runner.close()
    assert LOGGER.handlers == before
