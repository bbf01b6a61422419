"""A loaded model ready for trials, and one trial on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lunar_tune.engine.cache import ActivationCache
from lunar_tune.engine.prompt_activations import ActivationSource, PromptActivations
from lunar_tune.errors import EditedModelError
from lunar_tune.methods.contract import Change, FitReport, Preparation, Subject
from lunar_tune.metrics.evaluate import Evaluation
from lunar_tune.models.device import DeviceMemory, limit_threads
from lunar_tune.models.lineage import fingerprint
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.trial.checks import Check, Watch
from lunar_tune.trial.embedded_scores import EmbeddedScores, sentence_embedder
from lunar_tune.trial.encoder import Encoder
from lunar_tune.trial.evaluator import Judge, asked_sets
from lunar_tune.trial.reference_engine import ReferencePreparation, check_reference

if TYPE_CHECKING:
    from lunar_tune.trial.spec import TrialSpec

__all__ = ["TrialResult", "Worker"]

# Parameters below which one CPU thread serves better than several: the operations are too short to
# share. Measured on `tiny` (3 million) and two cores: a trial takes 1.1 s with one thread and 0.9 s
# with two, but 8 s against 65 s for a full evaluation while others compute on the same cores.
SMALL_MODEL = 20_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """What one trial, or an evaluation of the base model, gives."""

    parameters: Mapping[str, Any]
    """Empty for the base model."""
    evaluation: Evaluation
    fit: FitReport | None
    """None for the base model."""
    seconds: Mapping[str, float]
    """`prepare` (captures, at the first trial), `fit`, `evaluate` and their sum `trial`."""
    max_new_tokens: int
    """Token budget of the answers."""
    checks: tuple[Check, ...] = ()
    """What was seen while the fit went on."""


class Worker:
    """A model and its prompts, loaded once for many trials.

    A small model on a CPU makes torch use one thread in this process.

    Args:
        spec: Model, data and method.
        loaded: The model, if it is loaded already.
        cache_root: Folder of activations on disk; None is the user's cache.
    """

    def __init__(
        self,
        spec: TrialSpec,
        loaded: LoadedModel | None = None,
        *,
        cache_root: Path | None = None,
    ) -> None:
        self.spec = spec
        sentences = sentence_embedder(spec)  # what is wrong with it is said before the long load
        self.loaded = loaded if loaded is not None else load_model(spec.model)
        if self.loaded.device.type == "cpu" and self.loaded.n_parameters < SMALL_MODEL:
            limit_threads(1)
        self.memory = DeviceMemory(self.loaded.device, spec.engine.memory_budget)
        self.memory.enforce()
        limit = spec.engine.cache_limit
        self._source = ActivationSource(
            self.loaded, ActivationCache(limit, cache_root) if limit != 0 else None, self.memory
        )
        self.encoder = Encoder(self.loaded, spec.chat)
        self._embedded = EmbeddedScores(spec, self.loaded, self.encoder, self.memory, sentences)
        self._drafts: dict[tuple[int, ...], tuple[int, ...]] = {}

    @cached_property
    def activations(self) -> PromptActivations:
        """What the base model computes on all questions; captured as it is needed."""
        data = self.spec.data
        # Other methods encode their own pairs; what is asked is all that is kept for them.
        by_edit = self.spec.method.edits_one_layer
        fitted = (data.fit_forget, data.fit_retain, data.retain) if by_edit else ()
        asked = (
            set_of for full in (False, True) for set_of in asked_sets(data, full=full).values()
        )
        questions = [record.question for group in (*fitted, *asked) for record in group]
        return PromptActivations(
            self._source,
            self.encoder.prompts(questions),
            drafts=self._drafts,
            layers=self.spec.layers,
        )

    @cached_property
    def judge(self) -> Judge:
        """Who judges the model; made at first use, from the base model."""
        return Judge(self.spec, self.loaded, self.activations, self.encoder, self.memory)

    @property
    def plain_decoding(self) -> str | None:
        """Why answers are decoded from the first token on; None where they go on from streams."""
        return self.judge.plain_decoding

    @property
    def max_new_tokens(self) -> int:
        """Token budget of a trial's answers."""
        return self.judge.max_new_tokens

    @cached_property
    def preparation(self) -> Preparation:
        """The method made ready for this model and split; done at first use."""
        spec, data = self.spec, self.spec.data
        forget, retain = map(self.encoder.pairs, (data.fit_forget, data.fit_retain))
        subject = Subject(
            activations=self.activations,
            forget_prompts=tuple(pair.prompt for pair in forget),
            retain_prompts=tuple(pair.prompt for pair in retain),
            reference_prompts=self.encoder.prompts(data.reference_prompts),
            forget_pairs=forget,
            retain_pairs=retain,
            refusals=self.encoder.answers(data.refusals),
        )
        if spec.engine.reference:
            return ReferencePreparation(check_reference(spec.method), subject)
        return spec.method.prepare(subject)

    def draft(self, answers: Mapping[tuple[int, ...], tuple[int, ...]]) -> None:
        """Take the base model's answers, which trials check before they decode.

        Args:
            answers: Tokens of the answer by prompt, from `drafts` of a worker with the same model.
        """
        self._drafts = dict(answers)
        for name in ("activations", "preparation", "judge"):
            self.__dict__.pop(name, None)  # made again, with the drafts

    @property
    def drafts(self) -> Mapping[tuple[int, ...], tuple[int, ...]]:
        """The base model's answers by prompt; empty before `vanilla` or `draft`."""
        return self._drafts

    def run(
        self,
        parameters: Mapping[str, Any],
        *,
        full: bool = False,
        bounded: bool = True,
        seed: int | None = None,
        inside: Callable[[LoadedModel], None] | None = None,
        on_change: Callable[[LoadedModel, Change], None] | None = None,
    ) -> TrialResult:
        """Unlearn, evaluate and put the model back as it was.

        Args:
            parameters: A value for each of the method's parameters.
            full: Whether to evaluate all rows with the published token budget.
            bounded: Whether to stop asking once the spec's retain floor is missed for certain.
            seed: Of the fit; None takes the spec's.
            inside: Called with the unlearned model after its evaluation, for example to save it.
            on_change: Called likewise, and told what the fit changed.

        Raises:
            InputError: A parameter is missing, unknown or out of range.
            TrialError: The fit failed, for example by divergence.
        """
        start = self._clock()
        preparation = self.preparation
        self.judge.answers.prepare()
        ready = self._clock()
        floor = self.spec.engine.retain_floor if bounded and not full else None
        seed = self.spec.seed if seed is None else seed
        with self._left_as_it_was(), preparation.unlearning(parameters, seed=seed) as fit:
            watch = Watch(fit.n_epochs, floor)
            for epochs in fit:
                if watch.is_due(epochs):
                    watch.checks.append(self.judge.check(fit, epochs))
                if watch.is_lost:
                    break
            report = fit.finished()
            fitted = self._clock()
            evaluation, budget = self.judge.evaluate(
                report.edited_layer, full=full, bounded=bounded
            )
            ended = self._clock()
            if inside is not None:
                inside(self.loaded)
            if on_change is not None:
                on_change(self.loaded, fit.change)
        restored = self._clock()
        evaluation = self._embedded.added_to(evaluation)
        embedded = self._clock() - restored
        return TrialResult(
            parameters=dict(parameters),
            evaluation=evaluation,
            fit=report,
            seconds={
                "prepare": ready - start,
                "fit": fitted - ready,
                "evaluate": ended - fitted + embedded,
                "trial": ended - start + embedded,
            },
            max_new_tokens=budget,
            checks=tuple(watch.checks),
        )

    def vanilla(self, *, full: bool = False) -> TrialResult:
        """Evaluate the base model, and keep its answers as drafts for trials."""
        start = self._clock()
        evaluation, budget = self.judge.evaluate(None, full=full, bounded=False)
        evaluation = self._embedded.added_to(evaluation)
        seconds = self._clock() - start
        prompts = self.activations.tree.sequences
        if self.plain_decoding is None and not self._drafts:
            lengths = self.activations.prompt_lengths
            self.draft(
                {prompts[row][: lengths[row]]: answer for row, answer in evaluation.tokens.items()}
            )
        return TrialResult(
            parameters={},
            evaluation=evaluation,
            fit=None,
            seconds={"fit": 0.0, "evaluate": seconds, "trial": seconds},
            max_new_tokens=budget,
        )

    @contextmanager
    def _left_as_it_was(self) -> Iterator[None]:
        """Check after a trial, where that is wanted, that every weight is what it was.

        Raises:
            EditedModelError: One is not.
        """
        if not self.spec.engine.verify_weights:
            yield
            return
        before = self._untouched
        try:
            yield
        finally:
            if fingerprint(self.loaded) != before:
                raise EditedModelError("a trial has left the model's weights changed")

    @cached_property
    def _untouched(self) -> str:
        return fingerprint(self.loaded)

    def _clock(self) -> float:
        """Return seconds, after all work on the device has ended."""
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
