"""A loaded model ready for trials, by the engine or by the page of `lunar_tune.reference`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from lunar_tune.config.options import AUTO
from lunar_tune.data.records import Record
from lunar_tune.data.splits import folds
from lunar_tune.display import Concise
from lunar_tune.engine.activations import ActivationSource, PromptActivations
from lunar_tune.engine.cache import ActivationCache
from lunar_tune.errors import EditedModelError, InputError, TrialError
from lunar_tune.methods.contract import Edit, Fit, Method, PreparedMethod, UnlearningTask
from lunar_tune.methods.lunar import LunarMethod, LunarSettings
from lunar_tune.methods.lunar.method import edited
from lunar_tune.metrics.embedding import load_sentence_embedder
from lunar_tune.metrics.evaluate import AnswerRow, Evaluation
from lunar_tune.metrics.goal import EMBEDDINGS, need_of
from lunar_tune.models.device import SMALL_MODEL, DeviceMemory, limit_threads, shown_dtype
from lunar_tune.models.fingerprint import check_same, fingerprint, number_format_of
from lunar_tune.models.layout import check_layers
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.training.answer_loss import Encoder
from lunar_tune.trial.evaluator import Check, Judge, drive
from lunar_tune.trial.references import References, ask_references, judge_references
from lunar_tune.trial.spec import TrialSpec

if TYPE_CHECKING:
    from lunar_tune.reference import Solver

LEFT_OUT: Final = 1 / 8  # of the retain questions: how many a further fit does not see
FITS, LONG_FITS = 4, 1  # of such; where a fit takes most of a trial's time


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrialResult(Concise):
    """What one trial, or an evaluation of the base model, gives."""

    parameters: Mapping[str, Any]  # empty for the base model
    evaluation: Evaluation
    losses: tuple[float, ...] = ()  # training loss of each epoch; none for the base model
    seconds: Mapping[str, float]
    """`prepare` (captures, at the first trial), `fit`, `evaluate` and their sum `trial`."""
    max_new_tokens: int
    checks: tuple[Check, ...] = ()  # what was seen while the fit went on


class Worker:
    """A model and its prompts, loaded once for many trials.

    The model is loaded unless it is given. A small one on a CPU makes torch use one thread in this
    process. Activations on disk are in `cache_root`, or else in the user's cache.
    """

    def __init__(
        self, spec: TrialSpec, loaded: LoadedModel | None = None, *, cache_root: Path | None = None
    ) -> None:
        if spec.data.unanswered:
            raise AssertionError("the model is asked for its answers before anything is scored")
        if spec.known_model is not None and spec.model.dtype == AUTO:  # chosen once for a search
            dtype = number_format_of(spec.known_model)
            spec = replace(spec, model=replace(spec.model, dtype=dtype))
        self.spec = spec
        self._sentences = None
        if spec.embedding_model is not None and EMBEDDINGS in need_of(spec.metrics):
            # What is wrong with it is said before the long load.
            self._sentences = load_sentence_embedder(spec.embedding_model, device=spec.model.device)
        self.loaded = loaded if loaded is not None else load_model(spec.model, spec.chat)
        if spec.known_model is not None:
            check_same(self.loaded, spec.chat, spec.known_model)
        if self.loaded.device.type == "cpu" and self.loaded.model.num_parameters() < SMALL_MODEL:
            limit_threads(1)
        memory = DeviceMemory(self.loaded.device, spec.memory_budget)
        memory.enforce()
        limit = spec.cache_limit
        cache = ActivationCache(limit, cache_root) if limit != 0 else None
        self._source = ActivationSource(self.loaded, cache, memory)
        self.encoder = Encoder(self.loaded, spec.chat.of_fit)
        self._asker = Encoder(self.loaded, spec.chat) if spec.chat.second_bos else self.encoder
        data = spec.data  # what the model cannot read is said before it is asked anything
        sets = (data.fit_forget, data.fit_retain, *data.asked(full=False).values(), data.retain)
        records = [record for some in (*sets, *(data.held_out or ())) for record in some]
        self.encoder.prompts([*(record.question for record in records), *data.reference_prompts])
        self.encoder.answers([*(record.answer for record in records), *data.refusals])
        # The base model's answers by prompt; empty before `baseline` or `draft`.
        self.drafts: Mapping[tuple[int, ...], tuple[int, ...]] = {}

    @property
    def number_format(self) -> str:
        """What the model's weights are held in, to show."""
        return shown_dtype(self.loaded.model.dtype, self.loaded.device)

    @cached_property
    def activations(self) -> PromptActivations:
        """What the base model computes on all questions; captured as it is needed."""
        data = self.spec.data
        # Other methods encode their own pairs; what is asked is all that is kept for them.
        by_edit = self.spec.method.edits_one_layer
        fitted = (*data.fit_forget, *data.fit_retain) if by_edit else ()
        sets = (some for full in (False, True) for some in data.asked(full=full).values())
        prompts = (
            *self.encoder.prompts([record.question for record in fitted]),
            *self._asker.prompts([record.question for some in sets for record in some]),
        )
        return PromptActivations(
            self._source,
            prompts,
            drafts=self.drafts,
            layers=self.spec.layers,
            fitted=len(fitted),
        )

    @cached_property
    def judge(self) -> Judge:
        """Who judges the model; made at first use, from the base model."""
        return Judge(self.spec, self._asker, self.activations, self._sentences)

    @cached_property
    def references(self) -> References | None:
        """What the base model does with the reference prompts; None where that is not asked."""
        spec, data = self.spec, self.spec.data
        if spec.known_references is not None or not spec.checks_references:
            return spec.known_references
        return ask_references(self.encoder, data.reference_prompts, data.refusals, text=spec.text)

    @property
    def reference_prompts(self) -> tuple[str, ...]:
        """The reference prompts that make an unlearning vector."""
        prompts, found = self.spec.data.reference_prompts, self.references
        return prompts if found is None else found.chosen(prompts, self.spec.reference_check)

    @cached_property
    def prepared(self) -> PreparedMethod:
        """The method made ready for this model and split; done at first use."""
        return self._prepared_with(self.spec.data.fit_retain)

    def _prepared_with(self, kept: Sequence[Record]) -> PreparedMethod:
        spec, data = self.spec, self.spec.data
        forget, retain = map(self.encoder.pairs, (data.fit_forget, kept))
        if not self.reference_prompts:
            judge_references(self.references, spec.reference_check)
        task = UnlearningTask(
            activations=self.activations,
            forget_pairs=forget,
            retain_pairs=retain,
            reference_prompts=self.encoder.prompts(self.reference_prompts),
            refusals=self.encoder.answers(data.refusals),
        )
        if spec.engine == "reference":
            return PreparedReference(check_reference(spec.method), task)
        return spec.method.prepare(task)

    def draft(self, answers: Mapping[tuple[int, ...], tuple[int, ...]]) -> None:
        """Take the `drafts` of a worker with the same model, which trials check first."""
        self.drafts = answers
        for name in ("activations", "judge", "prepared"):
            self.__dict__.pop(name, None)  # made again, with the drafts

    def run(
        self,
        parameters: Mapping[str, Any],
        *,
        full: bool = False,
        bounded: bool = True,
        reported: bool = False,
        seed: int | None = None,
        inside: Callable[[LoadedModel, Edit], None] = lambda _model, _edit: None,
    ) -> TrialResult:
        """Unlearn, evaluate (see `Judge.evaluate`) and put the model back as it was.

        `inside` is called with the unlearned model after its evaluation, and with what the fit
        changed. Wrong parameters are an InputError, a fit that fails or diverges is a TrialError.
        """
        start = self._clock()
        prepared = self.prepared
        self.judge.answers.prepare()
        ready = self._clock()
        floor = self.spec.retain_floor if bounded and not full else None
        seed = self.spec.seed if seed is None else seed
        with self._left_as_it_was(), prepared.unlearning(parameters, seed=seed) as fit:
            checks = drive(fit, floor, partial(self.judge.check, fit))
            fit.finish()
            fitted = self._clock()
            evaluation, budget = self.judge.evaluate(
                fit.edited_layer, full=full, bounded=bounded, reported=reported
            )
            ended = self._clock()
            inside(self.loaded, fit.edit)
        restored = self._clock()
        evaluation = self.judge.by_base_model(evaluation, reported=reported)
        judged = self._clock() - restored
        return TrialResult(
            parameters=dict(parameters),
            evaluation=evaluation,
            losses=fit.losses,
            seconds={
                "prepare": ready - start,
                "fit": fitted - ready,
                "evaluate": ended - fitted + judged,
                "trial": ended - start + judged,
            },
            max_new_tokens=budget,
            checks=checks,
        )

    def unseen(self, parameters: Mapping[str, Any]) -> tuple[AnswerRow, ...]:
        """Return answers of further fits to retain questions that each of them does not see.

        `LEFT_OUT` of the questions at a time, `FITS` times (of cross-validation some folds, and not
        all, for each takes as long as a fit). All else is as in a trial. None where no fit sees
        what trials are judged on. Errors are those of `run`.
        """
        data, seed, method = self.spec.data, self.spec.seed, self.spec.method
        sets, rows = (data.fit_retain, data.retain_sample), list[AnswerRow]()
        times = FITS if method.edits_one_layer else LONG_FITS
        if not method.sees_retain(parameters):
            return ()
        self.judge.answers.prepare()  # from the base model
        for kept, asked in folds(*sets, share=LEFT_OUT, times=times, seed=seed):
            prepared = self._prepared_with(kept)
            with self._left_as_it_was(), prepared.unlearning(parameters, seed=seed) as fit:
                for _ in fit:
                    pass
                fit.finish()
                rows += self.judge.ask_retain(fit.edited_layer, asked)
        return tuple(rows)

    def baseline(self, *, full: bool = False, reported: bool = False) -> TrialResult:
        """Evaluate the base model, as `run` does, and keep its answers as drafts for trials.

        Whether those of a `reported` one decline is read in answers that are long enough for that.
        """
        start = self._clock()
        evaluation, budget = self.judge.evaluate(None, full=full, bounded=False, reported=reported)
        read = self.judge.read_on(evaluation) if reported and not full else None
        evaluation = self.judge.by_base_model(evaluation, reported=reported, read=read)
        seconds = self._clock() - start
        if self.judge.plain_decoding is None and not self.drafts:
            prompts, lengths = self.activations.tree.sequences, self.activations.prompt_lengths
            self.draft(
                {prompts[row][: lengths[row]]: answer for row, answer in evaluation.tokens.items()}
            )
        return TrialResult(
            parameters={},
            evaluation=evaluation,
            seconds={"fit": 0.0, "evaluate": seconds, "trial": seconds},
            max_new_tokens=budget,
        )

    @contextmanager
    def _left_as_it_was(self) -> Iterator[None]:
        """Check after a trial, where that is wanted, that every weight is what it was."""
        before = self._source.model_key if self.spec.verify_weights else None
        try:
            yield
        finally:
            if before is not None and fingerprint(self.loaded) != before:
                raise EditedModelError("a trial has left the model's weights changed")

    def _clock(self) -> float:
        """Return seconds, after all work on the device has ended."""
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def check_reference(method: Method) -> LunarMethod:
    """Return a method that the page can do, or raise an InputError."""
    if not isinstance(method, LunarMethod) or method.variant not in ("adamw", "closed_form"):
        raise InputError(
            f"--engine reference: runs only lunar with adamw or closed_form, not {method.name} "
            f"({method.variant})."
        )
    settings = method.settings
    if settings != LunarSettings(solver=settings.solver, epochs=settings.epochs):
        raise InputError(
            "--engine reference: of lunar's settings only solver and epochs may be set; this "
            "engine moves all prompt tokens, keeps all retain tokens and trains in float32."
        )
    return method


class PreparedReference(PreparedMethod):
    """What the page needs of a run: model and encoded prompts; nothing is computed ahead."""

    def __init__(self, method: LunarMethod, task: UnlearningTask) -> None:
        self._method, self._task = method, task

    @contextmanager
    def unlearning(self, parameters: Mapping[str, Any], *, seed: int) -> Iterator[Fit]:
        """Return a context in which the page's matrices stand in the model; see the contract."""
        from lunar_tune import reference  # loads transformers' models

        method, task, loaded = self._method, self._task, self._task.loaded
        layout = loaded.layout
        chosen, own, _ = method.resolved(parameters)
        layers, coefficients = tuple(chosen), set(chosen.values())
        check_layers(layers, loaded.n_layers)
        if len(coefficients) > 1:
            raise InputError("--engine reference: takes only one coefficient for all layers.")
        solver: Solver
        if method.variant == "closed_form":
            solver = partial(reference.fit_closed_form, ridge=own)
        else:
            epochs = method.settings.epochs
            solver = partial(reference.fit_adamw, learning_rate=own, epochs=epochs, seed=seed)
        try:
            unlearned = reference.unlearn(
                loaded.model,
                layers=layers,
                coefficient=coefficients.pop(),
                reference=task.reference_prompts,
                forget=[pair.prompt for pair in task.forget_pairs],
                retain=[pair.prompt for pair in task.retain_pairs],
                solver=solver,
            )
        except ValueError as error:
            raise TrialError(str(error)) from error
        weights = {
            layer: layout.down_projection_of(unlearned, layer).weight.detach() for layer in layers
        }
        with edited(loaded, weights) as fit:
            yield fit
