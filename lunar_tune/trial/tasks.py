"""The tasks of a search and their outcomes, plain and picklable; files are written by who asked."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from typing import TYPE_CHECKING, Any, Final

from lunar_tune.errors import EditedModelError, InputError, LunarTuneError
from lunar_tune.models.device import give_back, is_out_of_memory
from lunar_tune.models.fingerprint import Identity, identity_of
from lunar_tune.secrets import without_secrets
from lunar_tune.trial.references import References
from lunar_tune.trial.spec import TrialSpec

if TYPE_CHECKING:
    from lunar_tune.metrics.evaluate import AnswerRow
    from lunar_tune.trial.worker import TrialResult, Worker

BASE_MODEL: Final = "base model"
TRIAL: Final = "trial"
CONFIRMATION: Final = "confirmation"
NEW_QUESTIONS: Final = "new questions"
_LOGGER = logging.getLogger("lunar_tune")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thing to do with the loaded model."""

    kind: str  # `BASE_MODEL`, `TRIAL`, `CONFIRMATION` or `NEW_QUESTIONS`
    number: int = -1  # number of the trial; -1 for the base model
    parameters: Mapping[str, Any] = field(default_factory=dict)  # the setting
    layer_coefficient: float | None = None  # with which layers are scored; None scores none
    known_model: Identity | None = None  # what the search's first worker has found its model to be
    known_references: References | None = None  # and what that does with the reference prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a task gave no result."""

    reason: str
    transient: bool = False  # whether it is not the setting's, and may succeed when run again
    crashed: bool = False  # whether the worker was lost, at last perhaps the setting's own doing
    wrong_input: bool = False  # whether the user has to mend something
    no_worker: bool = False  # whether that is the model, which nothing can be run on

    def __post_init__(self) -> None:
        """Leave secrets out: the reason is kept in study, tables, page and MLflow."""
        object.__setattr__(self, "reason", without_secrets(self.reason))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a task gives: a result or a failure, and what comes with it."""

    result: TrialResult | None = None
    failure: Failure | None = None
    baseline: TrialResult | None = None  # with held-out questions: the base model on the same
    unseen: tuple[AnswerRow, ...] = ()
    """Of new questions: answers to retain questions of fits that did not see them."""
    plain_decoding: str | None = None  # with the base model: why answers are decoded plainly
    layer_prior: str | None = None  # with the base model: its scored layers, as a file's text
    model: Identity | None = None  # with the base model: what tells it from another
    references: References | None = None  # with the base model: what it does with those prompts
    number_format: str | None = None  # with the base model: what its weights are held in, to show
    warnings: tuple[str, ...] = ()  # what this package warned of meanwhile


class TaskRunner:
    """Runs tasks on one model, which is loaded by the first.

    `watch` is called before each part of a task with its trial's number and whether it asks every
    question to its end; whoever limits a task's time counts from there.
    """

    def __init__(
        self, spec: TrialSpec, watch: Callable[[int, bool], None] = lambda _number, _full: None
    ) -> None:
        self._spec, self._watch = spec, watch
        self._worker: Worker | None = None
        self._warnings = BufferingHandler(capacity=sys.maxsize)
        self._warnings.setLevel(logging.WARNING)
        _LOGGER.addHandler(self._warnings)

    def run(self, task: Task) -> Outcome:
        """Run a task; what goes wrong for a reason that can be told is its outcome.

        After an EditedModelError the model must not be used again; after what nobody foresaw the
        process may be in any state.
        """
        try:
            outcome = self._outcome(task)
        except EditedModelError:
            raise
        except LunarTuneError as error:
            wrong_input = isinstance(error, InputError)
            no_worker = wrong_input and self._worker is None
            failure = Failure(reason=str(error), wrong_input=wrong_input, no_worker=no_worker)
            outcome = Outcome(failure=failure)
        except (OSError, RuntimeError, MemoryError) as error:
            transient = isinstance(error, OSError)  # a full disk, a folder gone: no setting's fault
            if not (transient or is_out_of_memory(error)):
                raise
            outcome = Outcome(failure=Failure(reason=format_error(error), transient=transient))
        if outcome.failure is not None:
            give_back()  # outside the handlers, where no error holds tensors any more
        warnings = tuple(record.getMessage() for record in self._warnings.buffer)
        self._warnings.flush()  # of a BufferingHandler: forgets them
        return dataclasses.replace(outcome, warnings=warnings)

    def close(self) -> None:
        """Hear no more warnings."""
        _LOGGER.removeHandler(self._warnings)

    def _outcome(self, task: Task) -> Outcome:
        if self._worker is None:  # may take longer than a trial may take
            from lunar_tune.trial.worker import Worker

            model, references = task.known_model, task.known_references
            spec = dataclasses.replace(self._spec, known_model=model, known_references=references)
            self._worker = Worker(spec)
        worker = self._worker
        if task.kind == BASE_MODEL:
            self._watch(task.number, True)
            result = _light(worker.baseline(reported=True))
            prior = None
            coefficient = task.layer_coefficient
            if coefficient is not None and worker.reference_prompts:  # else nothing is searched
                from lunar_tune.trial.layer_scores import layer_scores

                layers = self._spec.layers
                prior = layer_scores(worker, coefficient=coefficient, layers=layers)[0].document()
            plain = worker.judge.plain_decoding
            return Outcome(
                result=result,
                plain_decoding=plain,
                layer_prior=prior,
                model=identity_of(worker.loaded, self._spec.chat),
                references=worker.references,
                number_format=worker.number_format,
            )
        if worker.judge.plain_decoding is None and not worker.drafts:
            # A worker that began later: its trials check these answers.
            self._watch(task.number, True)
            worker.baseline()
        self._watch(task.number, task.kind != TRIAL)
        if task.kind == TRIAL:
            return Outcome(result=_light(worker.run(task.parameters)))
        if task.kind == NEW_QUESTIONS:
            return Outcome(unseen=worker.unseen(task.parameters))
        held_out = self._spec.data.held_out is not None  # there it is reported, not judged
        result = _light(worker.run(task.parameters, full=True, bounded=not held_out, reported=True))
        # Of held-out questions nothing is known yet of the base model.
        baseline = _light(worker.baseline(full=True, reported=True)) if held_out else None
        return Outcome(result=result, baseline=baseline)


def _light(result: TrialResult) -> TrialResult:
    """Return a result without the tokens of its answers, which are of use in the worker alone."""
    evaluation = dataclasses.replace(result.evaluation, tokens={})
    return dataclasses.replace(result, evaluation=evaluation)


def format_error(error: BaseException) -> str:
    """Return an error in one line, with advice where memory ran out."""
    text = next(iter(f"{type(error).__name__}: {error}".splitlines()), type(error).__name__)
    if "OutOfMemory" in type(error).__name__:
        text += " (give a trial a larger share with --gpus-per-trial)"
    return text
