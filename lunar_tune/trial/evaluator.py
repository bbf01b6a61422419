"""Judges a worker's model as it is: which questions are asked, who answers, which scores follow."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING

from lunar_tune.config.run_options import PUBLISHED_MAX_NEW_TOKENS
from lunar_tune.data.splits import sample_by_edge
from lunar_tune.engine.answering import Answerer
from lunar_tune.engine.decoding import PlainAnswerer, token_budget
from lunar_tune.metrics.evaluate import (
    JUDGED,
    AnswerRow,
    AnswerSource,
    Evaluation,
    EvaluationSet,
    Evaluator,
)
from lunar_tune.models.layout import why_not_resumable
from lunar_tune.trial.checks import CHECKED_ROWS, Check
from lunar_tune.trial.further_scores import FurtherScores
from lunar_tune.trial.reference_engine import reference_answers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lunar_tune.data.records import Record
    from lunar_tune.engine.prompt_activations import PromptActivations
    from lunar_tune.methods.contract import Fit
    from lunar_tune.models.device import DeviceMemory
    from lunar_tune.models.loading import LoadedModel
    from lunar_tune.trial.encoder import Encoder
    from lunar_tune.trial.spec import DataSets, TrialSpec

__all__ = ["Judge", "asked_sets"]


def asked_sets(data: DataSets, *, full: bool) -> dict[str, tuple[Record, ...]]:
    """Return the questions of a trial, or of a full evaluation, by set."""
    if full and (held := data.held_out) is not None:
        return {"forget": held.forget, "retain": held.retain, "factual": held.factual}
    retain = data.retain if full else data.retain_sample
    return {"forget": data.forget, "retain": retain, "factual": data.factual}


class Judge:
    """Asks the questions of a study.

    Args:
        spec: What is asked and how.
        loaded: The model.
        activations: Of the base model on the questions.
        encoder: Encodes them.
        memory: What may be used.
    """

    def __init__(
        self,
        spec: TrialSpec,
        loaded: LoadedModel,
        activations: PromptActivations,
        encoder: Encoder,
        memory: DeviceMemory,
    ) -> None:
        self.spec, self.loaded, self.activations = spec, loaded, activations
        self._encoder, self._memory = encoder, memory

    @property
    def plain_decoding(self) -> str | None:
        """Why answers are decoded from the first token on; None where they go on from streams."""
        if not self.spec.engine.reuse or self.spec.engine.reference:
            return "it was asked for"
        longest = max(PUBLISHED_MAX_NEW_TOKENS, self.max_new_tokens)
        longest += max(self.activations.prompt_lengths)
        return why_not_resumable(self.loaded.model.config, longest)

    @cached_property
    def max_new_tokens(self) -> int:
        """Token budget of a trial's answers."""
        data = self.spec.data
        records = (*data.forget, *data.retain, *data.factual)
        truths = [record.answer for record in records]
        return token_budget(self.spec.max_new_tokens, self.loaded.tokenizer, truths)

    def evaluate(
        self, edited_layer: int | None, *, full: bool, bounded: bool
    ) -> tuple[Evaluation, int]:
        """Judge the model as it is now; return the evaluation and its token budget.

        Args:
            edited_layer: See `FitReport`.
            full: Whether to ask all rows with the published token budget.
            bounded: Whether to stop asking once the retain floor is missed for certain.
        """
        budget = max(PUBLISHED_MAX_NEW_TOKENS, self.max_new_tokens) if full else self.max_new_tokens
        evaluation = (self._full_evaluator if full else self._evaluator).evaluate(
            edited_layer=edited_layer,
            max_new_tokens=budget,
            floor=self.spec.engine.retain_floor if bounded else None,
        )
        evaluation = dataclasses.replace(evaluation, rows=self._numbered(evaluation.rows))
        return self._further.added_to(evaluation, asked_sets(self.spec.data, full=full)), budget

    def _numbered(self, rows: tuple[AnswerRow, ...]) -> tuple[AnswerRow, ...]:
        """Return answers with the numbers of their questions."""
        numbers = self._row_numbers
        return tuple(
            dataclasses.replace(row, row=numbers[row.set_name, row.edge, row.question, row.truth])
            for row in rows
        )

    @cached_property
    def _row_numbers(self) -> Mapping[tuple[str, str, str, str], int]:
        return self.spec.row_numbers

    def check(self, fit: Fit, epochs: int) -> Check:
        """Look at the model between two epochs."""
        with fit.evaluating():
            evaluation = self._checker.evaluate(
                edited_layer=None, max_new_tokens=self.max_new_tokens
            )
        return Check(
            epochs=epochs,
            forget_rouge1=evaluation.scores["forget_rouge1"],
            retain_rouge1=evaluation.scores["retain_rouge1"],
        )

    @cached_property
    def _evaluator(self) -> Evaluator:
        """Asks what a trial asks."""
        return self._evaluator_of(asked_sets(self.spec.data, full=False))

    @cached_property
    def _full_evaluator(self) -> Evaluator:
        """Asks everything."""
        return self._evaluator_of(asked_sets(self.spec.data, full=True))

    @cached_property
    def _checker(self) -> Evaluator:
        """Asks a few questions, by edge."""
        seed = self.spec.seed
        return self._evaluator_of(
            {
                name: sample_by_edge(records, CHECKED_ROWS, seed=seed)
                for name, records in asked_sets(self.spec.data, full=False).items()
                if name in JUDGED
            }
        )

    @cached_property
    def _further(self) -> FurtherScores:
        """Adds the scores beyond ROUGE that were asked for."""
        return FurtherScores(self.spec.metrics, self._encoder.pairs, self.loaded, self._memory)

    def _evaluator_of(self, sets: Mapping[str, tuple[Record, ...]]) -> Evaluator:
        return Evaluator(
            self.answers,
            self.loaded.tokenizer,
            [self._evaluation_set(name, records) for name, records in sets.items() if records],
            rouge_tokenizer=self.spec.rouge_tokenizer,
            early_exit=self.spec.engine.early_exit,
            seed=self.spec.seed,
        )

    @cached_property
    def answers(self) -> AnswerSource:
        """Who answers; made at first use, from the base model."""
        if self.plain_decoding is not None:
            lengths, rows = self.activations.prompt_lengths, self.activations.tree.sequences
            prompts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
            generate = reference_answers if self.spec.engine.reference else None
            return PlainAnswerer(self.loaded, prompts, generate)
        deepest = max(self.spec.layers, default=self.loaded.n_layers - 1)
        return Answerer(
            self.activations,
            deepest=deepest if self.spec.method.edits_one_layer else -1,
        )

    def _evaluation_set(self, name: str, records: tuple[Record, ...]) -> EvaluationSet:
        prompts = self._encoder.prompts([record.question for record in records])
        rows = tuple(self.activations.rows_of(prompts))
        return EvaluationSet(name=name, records=records, rows=rows)
