"""Tasks on a random model: what is handed over, what becomes a failure and what is raised."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from lunar_tune.errors import DivergenceError, EditedModelError, InputError
from lunar_tune.methods.lunar.method import PreparedLunar
from lunar_tune.trial import worker as worker_module
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import (
    BASE_MODEL,
    CONFIRMATION,
    NEW_QUESTIONS,
    TRIAL,
    Failure,
    Outcome,
    Task,
    TaskRunner,
)
from lunar_tune.trial.worker import TrialResult, Worker

Specs = Callable[..., TrialSpec]
SETTING = {"layer": 1, "coefficient": 20.0, "learning_rate": 0.01}
LOGGER = logging.getLogger("lunar_tune")


@pytest.fixture(scope="module", autouse=True)
def _handlers() -> Iterator[None]:
    before = list(LOGGER.handlers)
    yield
    LOGGER.handlers[:] = before


@pytest.fixture(scope="module")
def runner(spec: Specs) -> TaskRunner:
    return TaskRunner(spec())


@pytest.fixture(scope="module")
def expected(spec: Specs) -> dict[str, Any]:
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
        outcome = runner.run(trial(kind=kind))
        assert light(outcome.result) == expected[kind]
        measured = outcome.result is not None and outcome.result.evaluation.scores
        assert ("forget_mrr" in (measured or {})) is (kind != TRIAL)
        told = {"model": outcome.model, "number_format": outcome.number_format}
        assert outcome == Outcome(result=outcome.result, **told)
        assert (outcome.model is not None) is (kind == BASE_MODEL)
        assert outcome.number_format == ("float32" if kind == BASE_MODEL else None)


def test_answers_to_new_questions_are_a_workers(runner: TaskRunner, spec: Specs) -> None:
    outcome = runner.run(trial(kind=NEW_QUESTIONS))
    assert outcome == Outcome(unseen=Worker(spec()).unseen(SETTING))
    assert outcome.unseen


def test_workers_of_a_search_take_the_number_format_of_the_first(spec: Specs) -> None:
    """Whatever each would choose: the second's processor has nothing for bfloat16."""
    first = TaskRunner(spec(dtype="bfloat16")).run(Task(kind=BASE_MODEL))
    second = TaskRunner(spec(dtype="auto"))
    outcome = second.run(Task(kind=BASE_MODEL, known_model=first.model))
    assert (outcome.model, outcome.warnings) == (first.model, ())
    assert outcome.result is not None
    assert first.result is not None
    assert light(outcome.result) == light(first.result)
    second.close()


def test_a_confirmation_on_held_out_questions_brings_the_base_model(spec: Specs) -> None:
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


def test_layers_are_scored_and_why_a_model_is_decoded_plainly_is_told(spec: Specs) -> None:
    made = dataclasses.replace(spec(engine="plain"), layers=(0, 2))
    runner, wanted = TaskRunner(made), Task(kind=BASE_MODEL, layer_coefficient=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            worker_module, "Worker", Mock(side_effect=ConnectionError("the disk is gone"))
        )
        lost = Failure(reason="ConnectionError: the disk is gone", transient=True)
        assert runner.run(wanted).failure == lost
    outcome = runner.run(wanted)
    assert outcome.plain_decoding == "--engine plain"
    assert outcome.layer_prior is not None
    assert [layer["layer"] for layer in json.loads(outcome.layer_prior)["layers"]] == [0, 2]


def test_a_model_is_asked_before_the_trials(spec: Specs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that did not evaluate the base model itself does so for its drafts, and once."""
    events: list[Any] = []

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **how: events.append(name) or work(*given, **how)

    monkeypatch.setattr(worker_module, "Worker", noted("load", Worker))
    monkeypatch.setattr(Worker, "baseline", noted("ask", Worker.baseline))
    runner = TaskRunner(spec(), lambda number, full: events.append((number, full)))
    for task in (trial(number=3), trial(parameters={}), trial(kind=CONFIRMATION)):
        runner.run(task)
    assert events == ["load", (3, True), "ask", (3, False), (4, False), (4, True)]


ADVICE = "(give a trial a larger share with --gpus-per-trial)"


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


def test_what_goes_wrong_for_a_known_reason_is_the_outcome_and_the_runner_goes_on(
    runner: TaskRunner, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunar_tune.trial.tasks.give_back", lambda: None)  # it takes a second
    for error, failure in (
        (InputError("not so"), Failure(reason="not so", wrong_input=True)),
        (DivergenceError("in epoch 2"), Failure(reason="in epoch 2")),
        (OSError(28, "full"), Failure(reason="OSError: [Errno 28] full", transient=True)),
        (OutOfMemoryError("much\nmore"), Failure(reason=f"OutOfMemoryError: much {ADVICE}")),
        (MemoryError(), Failure(reason="MemoryError: ")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PreparedLunar, "unlearning", Mock(side_effect=error))
            assert runner.run(trial()) == Outcome(failure=failure)
    for wrong in ({"layer": 9}, {"learning_rate": 1e39}):
        told = runner.run(trial(parameters={**SETTING, **wrong})).failure
        assert told is not None
        assert (told.wrong_input, told.transient) == ("layer" in wrong, False)
    assert light(runner.run(trial()).result) == expected[TRIAL]


def test_what_leaves_doubt_is_raised(spec: Specs, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TaskRunner(spec(changed={"verify_weights": True}))
    with monkeypatch.context() as patch:
        patch.setattr(PreparedLunar, "unlearning", Mock(side_effect=RuntimeError("CUDA error")))
        with pytest.raises(RuntimeError, match="CUDA error"):
            runner.run(trial())
    plain, weight = PreparedLunar.unlearning, runner._worker.loaded.model.lm_head.weight

    @contextmanager
    def editing(self: PreparedLunar, parameters: Any, **how: Any) -> Iterator[Any]:
        with torch.no_grad(), plain(self, SETTING, **how) as fit:
            weight[0, 0] += 1
            if not parameters:
                raise DivergenceError("in the middle")
            yield fit

    monkeypatch.setattr(PreparedLunar, "unlearning", editing)
    for parameters in ({}, SETTING):
        with pytest.raises(EditedModelError, match="left the model's weights changed"):
            runner.run(trial(parameters=parameters))
    runner._worker.spec = dataclasses.replace(runner._worker.spec, verify_weights=False)
    assert runner.run(trial()).failure is None, "nobody looked"


def test_warnings_come_with_their_task(spec: Specs, monkeypatch: pytest.MonkeyPatch) -> None:
    before, runner, plain = list(LOGGER.handlers), TaskRunner(spec()), Worker.run

    def run(self: Worker, *given: Any, **how: Any) -> TrialResult:
        logging.getLogger("lunar_tune.models.device").warning("%d at once are too many", 8)
        logging.getLogger("lunar_tune.models.device").info("nothing to hear")
        logging.getLogger("somebody.else").warning("not ours")
        return plain(self, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", run)
        for parameters in (SETTING, {}):
            outcome = runner.run(trial(parameters=parameters))
            assert (outcome.failure is None) == bool(parameters)
            assert outcome.warnings == ("8 at once are too many",)
    assert runner.run(trial()).warnings == ()
    runner.close()
    assert LOGGER.handlers == before
