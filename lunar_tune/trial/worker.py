"""A loaded model ready for trials, and one trial on it.

Covers: the worker's lifetime (model, encoded prompts, the method's preparation) and a trial's
(unlearn, evaluate, restore); the unmodified model's own scores.
Does not cover: who decides on parameters; a search, a single run and a proof call the same `run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lunar_tune.evaluation.decoding import token_budget
from lunar_tune.evaluation.evaluate import Evaluation, EvaluationSet, evaluate
from lunar_tune.evaluation.settings import PUBLISHED_MAX_NEW_TOKENS
from lunar_tune.methods.contract import FitReport, Preparation, Subject
from lunar_tune.models.chat import encode_prompts
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.runtime import limit_threads

if TYPE_CHECKING:
    from lunar_tune.data.records import Record
    from lunar_tune.trial.spec import TrialSpec

__all__ = ["TrialResult", "Worker"]

# Parameters below which one CPU thread serves better than several: the operations are too short to
# share. Measured on `tiny` (3 million) and two cores: a trial takes 1.1 s with one thread and 0.9 s
# with two, but 8 s against 65 s for a full evaluation while others compute on the same cores.
SMALL_MODEL = 20_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """What one trial, or an evaluation of the unmodified model, gives."""

    parameters: Mapping[str, Any]
    """Empty for the unmodified model."""
    evaluation: Evaluation
    fit: FitReport | None
    """None for the unmodified model."""
    seconds: Mapping[str, float]
    """`fit`, `evaluate` and their sum `trial`."""
    max_new_tokens: int
    """Token budget of the answers."""


class Worker:
    """A model and its prompts, loaded once for many trials.

    A small model on a CPU makes torch use one thread in this process.

    Args:
        spec: Model, data and method.
        loaded: The model, if it is loaded already.
    """

    def __init__(self, spec: TrialSpec, loaded: LoadedModel | None = None) -> None:
        self.spec = spec
        self.loaded = loaded if loaded is not None else load_model(spec.model)
        if self.loaded.device.type == "cpu" and self.loaded.n_parameters < SMALL_MODEL:
            limit_threads(1)
        self._encoded: dict[str, tuple[int, ...]] = {}

    @cached_property
    def preparation(self) -> Preparation:
        """The method made ready for this model and split; done at first use."""
        spec = self.spec
        return spec.method.prepare(
            Subject(
                loaded=self.loaded,
                forget_prompts=self._encode([record.question for record in spec.data.fit_forget]),
                retain_prompts=self._encode([record.question for record in spec.data.fit_retain]),
                reference_prompts=self._encode(spec.data.reference_prompts),
            )
        )

    def run(
        self,
        parameters: Mapping[str, Any],
        *,
        full: bool = False,
        seed: int | None = None,
        inside: Callable[[LoadedModel], None] | None = None,
    ) -> TrialResult:
        """Unlearn, evaluate and put the model back as it was.

        Args:
            parameters: A value for each of the method's parameters.
            full: Whether to evaluate all rows with the published token budget.
            seed: Of the fit; None takes the spec's.
            inside: Called with the unlearned model after its evaluation, for example to save it.

        Raises:
            InputError: A parameter is missing, unknown or out of range.
            TrialError: The fit failed, for example by divergence.
        """
        preparation = self.preparation
        start = self._clock()
        with preparation.unlearned(
            parameters, seed=self.spec.seed if seed is None else seed
        ) as fit:
            fitted = self._clock()
            evaluation, budget = self._evaluate(full=full)
            ended = self._clock()
            if inside is not None:
                inside(self.loaded)
        return TrialResult(
            parameters=dict(parameters),
            evaluation=evaluation,
            fit=fit,
            seconds={"fit": fitted - start, "evaluate": ended - fitted, "trial": ended - start},
            max_new_tokens=budget,
        )

    def vanilla(self, *, full: bool = False) -> TrialResult:
        """Evaluate the unmodified model."""
        start = self._clock()
        evaluation, budget = self._evaluate(full=full)
        seconds = self._clock() - start
        return TrialResult(
            parameters={},
            evaluation=evaluation,
            fit=None,
            seconds={"fit": 0.0, "evaluate": seconds, "trial": seconds},
            max_new_tokens=budget,
        )

    @cached_property
    def max_new_tokens(self) -> int:
        """Token budget of a trial's answers."""
        data = self.spec.data
        truths = [record.answer for record in (*data.forget, *data.retain, *data.factual)]
        return token_budget(self.spec.decoding, self.loaded.tokenizer, truths)

    def _evaluate(self, *, full: bool) -> tuple[Evaluation, int]:
        data = self.spec.data
        sets = {
            "forget": data.forget,
            "retain": data.retain if full else data.retain_sample,
            "factual": data.factual,
        }
        budget = max(PUBLISHED_MAX_NEW_TOKENS, self.max_new_tokens) if full else self.max_new_tokens
        evaluation = evaluate(
            self.loaded,
            [self._evaluation_set(name, records) for name, records in sets.items() if records],
            self.spec.decoding,
            max_new_tokens=budget,
            rouge_tokenizer=self.spec.rouge_tokenizer,
        )
        return evaluation, budget

    def _evaluation_set(self, name: str, records: tuple[Record, ...]) -> EvaluationSet:
        prompts = self._encode([record.question for record in records])
        return EvaluationSet(name=name, records=records, prompts=prompts)

    def _encode(self, questions: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return prompt ids, each question encoded once in a worker's life."""
        new = [question for question in dict.fromkeys(questions) if question not in self._encoded]
        encoded = encode_prompts(
            self.loaded.tokenizer, new, self.spec.chat, family=self.loaded.family
        )
        self._encoded.update(zip(new, encoded, strict=True))
        return tuple(self._encoded[question] for question in questions)

    def _clock(self) -> float:
        """Return seconds, after all work on the device has ended."""
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
