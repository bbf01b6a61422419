"""Judges a worker's model as it is: which questions are asked, who answers, which scores follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from lunar_tune.config.options import PUBLISHED_MAX_NEW_TOKENS, READ_TOKENS
from lunar_tune.data.records import Record
from lunar_tune.data.splits import sample_by_edge
from lunar_tune.engine.activations import PromptActivations
from lunar_tune.engine.answering import Answerer
from lunar_tune.engine.decoding import PlainAnswerer, generate_tokens, token_budget
from lunar_tune.methods.contract import Fit
from lunar_tune.metrics.declining import judged_row, verdict_means
from lunar_tune.metrics.embedding import Embedder, Refusals, StateEmbedder
from lunar_tune.metrics.evaluate import JUDGED, AnswerRow, Evaluation, Evaluator, Question
from lunar_tune.metrics.goal import (
    EMBEDDINGS,
    LIKELIHOODS,
    METRICS,
    VERDICTS,
    WHOLE_ANSWERS,
    need_of,
)
from lunar_tune.metrics.likelihood import LikelihoodScorer, likelihood_means
from lunar_tune.metrics.means import error_name
from lunar_tune.models.layout import check_answers_fit, why_not_resumable
from lunar_tune.training.answer_loss import Encoder, Pair
from lunar_tune.trial.spec import TrialSpec

# Looks in a whole fit, and the rows of each set that one asks.
LOOKS, CHECKED_ROWS = 4, 32
# A fit is lost when retain ROUGE-1 is below this share of the floor twice in a row: once may be a
# dip from which a loss with a retain term recovers.
LOST_SHARE = 0.5
LOST_CHECKS = 2
# Measured of what is reported, whatever was asked for: a model may rank high what it does not say.
# Whether answers decline is measured there, too.
REPORTED = "forget_mrr"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Scores of samples of the forget and the retain set in the middle of a fit."""

    epochs: int
    forget_rouge1: float
    retain_rouge1: float


def drive(fit: Fit, floor: float | None, look: Callable[[int], Check]) -> tuple[Check, ...]:
    """Train until the fit ends or is lost, looking at it a few times; return what was seen.

    It is not looked at after the last epoch, nor without a floor of retain ROUGE-1.
    """
    checks: list[Check] = []
    between = math.ceil(fit.n_epochs / (LOOKS + 1))
    for epochs in fit:
        if floor is None or epochs >= fit.n_epochs or epochs % between:
            continue
        checks.append(look(epochs))
        last = checks[-LOST_CHECKS:]
        if len(last) == LOST_CHECKS and all(c.retain_rouge1 < LOST_SHARE * floor for c in last):
            break
    return tuple(checks)


class Judge:
    """Asks the questions of a study and scores the answers, as long as its worker lives.

    Scores beside ROUGE are those of `TrialSpec.metrics` and, of what is reported, `forget_mrr` and
    the sets' shares of answers that decline and that are none; of what was stopped early there are
    the forget set's shares alone. No `sentences` embeds by the base model's own states.
    """

    def __init__(
        self,
        spec: TrialSpec,
        encoder: Encoder,
        activations: PromptActivations,
        sentences: Embedder | None,
    ) -> None:
        self.spec, self._encoder, self._sentences = spec, encoder, sentences
        source = activations.source
        self.loaded, self._memory = source.loaded, source.memory
        self._metrics = {name: METRICS[name] for name in spec.metrics}
        self._whole_sets, self._verdict_sets = (
            {name for one in self._metrics.values() if need in one.needs for name in one.sets}
            for need in (WHOLE_ANSWERS, VERDICTS)
        )
        self._row_numbers = spec.row_numbers
        self._scorer = LikelihoodScorer(source.loaded, source.memory)
        self.activations = activations
        self._evaluators: dict[tuple[bool, bool, int | None], Evaluator] = {}

    @property
    def plain_decoding(self) -> str | None:
        """Why answers are decoded from the first token on; None where they go on from streams."""
        if self.spec.engine != "fast":
            return f"--engine {self.spec.engine}"
        return why_not_resumable(self.loaded.model.config, self._longest)

    @property
    def _longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        budget = max(PUBLISHED_MAX_NEW_TOKENS, self.max_new_tokens)
        return budget + max(self.activations.prompt_lengths)

    @cached_property
    def max_new_tokens(self) -> int:
        """Token budget of a trial's answers."""
        data = self.spec.data
        truths = [record.answer for record in (*data.forget, *data.retain, *data.factual)]
        return token_budget(self.spec.max_new_tokens, self._encoder.texts(truths))

    @cached_property
    def answers(self) -> Answerer | PlainAnswerer:
        """Who answers; made at first use, from the base model."""
        check_answers_fit(self.loaded.model.config, self._longest)
        if self.plain_decoding is not None:
            lengths, rows = self.activations.prompt_lengths, self.activations.tree.sequences
            prompts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
            if self.spec.engine != "reference":
                return PlainAnswerer(partial(generate_tokens, self.loaded), prompts)
            from lunar_tune.reference import greedy_answers  # loads transformers' models

            eos_ids = self.loaded.eos_ids
            return PlainAnswerer(
                partial(greedy_answers, self.loaded.model, eos_ids=eos_ids), prompts
            )
        deepest = -1
        if self.spec.method.edits_one_layer:
            deepest = max(self.spec.layers, default=self.loaded.n_layers - 1)
        return Answerer(self.activations, deepest=deepest)

    def evaluate(
        self, edited_layer: int | None, *, full: bool, bounded: bool, reported: bool = False
    ) -> tuple[Evaluation, int]:
        """Judge the model as it is now; return the evaluation and its token budget.

        A `full` one asks all rows with the published budget, and ends answers that only repeat
        themselves unless a budget was named; a `bounded` one stops asking once the retain floor is
        missed for certain; of a `reported` one no answer ends for having said the truth, and
        `forget_mrr` is measured. It is a DivergenceError if a logit is NaN or infinite.
        """
        budget = max(PUBLISHED_MAX_NEW_TOKENS, self.max_new_tokens) if full else self.max_new_tokens
        read = self._read_tokens(budget)
        evaluation = self._evaluator(full=full, whole=reported).evaluate(
            edited_layer=edited_layer,
            max_new_tokens=budget,
            longer=dict.fromkeys(self._verdict_sets & {*self.spec.data.asked(full=full)}, read),
            floor=self.spec.retain_floor if bounded else None,
        )
        if self._verdict_sets:
            budget = read
        if not evaluation.complete:
            return evaluation, budget
        further: dict[str, float] = {}
        metrics = self._metrics | ({REPORTED: METRICS[REPORTED]} if reported else {})
        likelihoods = [metric for metric in metrics.values() if LIKELIHOODS in metric.needs]
        for name in dict.fromkeys(one for metric in likelihoods for one in metric.sets):
            records = self.spec.data.asked(full=full)[name]
            means = likelihood_means(self._scorer.score(self._encoder.pairs(records)))
            asked = {metric.quantity for metric in likelihoods if name in metric.sets}
            asked |= set(map(error_name, asked))
            further |= {f"{name}_{one}": mean for one, mean in means.items() if one in asked}
        return replace(evaluation, scores={**evaluation.scores, **further}), budget

    def ask_retain(self, edited_layer: int | None, records: Sequence[Record]) -> list[AnswerRow]:
        """Ask the model as it is now some of the retain questions, as a trial does."""
        budget = self.max_new_tokens
        evaluation = self._evaluator_of({"retain": records}, whole=self._whole_sets).evaluate(
            edited_layer=edited_layer,
            max_new_tokens=budget,
            longer=dict.fromkeys(self._verdict_sets & {"retain"}, self._read_tokens(budget)),
        )
        return list(evaluation.rows)

    def _read_tokens(self, budget: int) -> int:
        """Return the token budget of answers that are read, where others have `budget`."""
        return max(READ_TOKENS, budget) if self.spec.max_new_tokens is None else budget

    def read_on(self, evaluation: Evaluation) -> Evaluation | None:
        """Ask the base model for verdicts alone; None where its answers were long enough."""
        if self.spec.max_new_tokens is not None or self.max_new_tokens >= READ_TOKENS:
            return None
        if all(row.ended for row in evaluation.rows):  # with more tokens they are the same
            return None
        asked = self._evaluator(whole=True)
        return asked.evaluate(edited_layer=None, max_new_tokens=READ_TOKENS)

    def by_base_model(
        self, evaluation: Evaluation, *, reported: bool, read: Evaluation | None = None
    ) -> Evaluation:
        """Return the evaluation with what the base model makes of its answers, or of those `read`.

        It must be the base model again: one that was edited would judge itself.
        """
        names = {row.set_name for row in evaluation.rows}
        names &= names if reported else self._verdict_sets
        evaluation = self._with_verdicts(evaluation, names, read or evaluation)
        if not evaluation.complete:
            return evaluation
        scores = dict(evaluation.scores)
        for metric in self._metrics.values():
            if metric.compute is not None:
                rows = [row for row in evaluation.rows if row.set_name in metric.sets]
                scores[metric.name] = float(metric.compute(rows))
        if EMBEDDINGS in need_of(self._metrics):
            answers = [row.answer for row in evaluation.rows if row.set_name == "forget"]
            scores["refusal_quality"] = self._refusals.quality(answers)
        return replace(evaluation, scores=scores)

    def _with_verdicts(
        self, evaluation: Evaluation, names: Collection[str], read: Evaluation
    ) -> Evaluation:
        """Return the evaluation with verdicts on the answers of some sets, as they were `read`."""
        if not evaluation.complete:
            names = {"forget"}.intersection(names)
        rows = [row for row in read.rows if row.set_name in names]
        if not rows:
            return evaluation
        prompts = self._encoder.prompts([row.question for row in rows])
        pairs = [
            Pair(prompt, read.tokens[place] + ((self._encoder.end,) if row.ended else ()))
            for row, prompt, place in zip(
                rows, prompts, self.activations.rows_of(prompts), strict=True
            )
        ]
        refusals = self.spec.data.refusals
        found = zip(rows, self._scorer.score(pairs), strict=True)
        judged = [judged_row(row, one.typicality, refusals) for row, one in found]
        verdicts = iter(
            {name: getattr(one, name) for name in ("typicality", "refused", "degenerate")}
            for one in judged
        )
        all_rows = [
            replace(row, **next(verdicts)) if row.set_name in names else row
            for row in evaluation.rows
        ]
        scores = {**evaluation.scores, **verdict_means(all_rows)}
        return replace(evaluation, rows=tuple(all_rows), scores=scores)

    def check(self, fit: Fit, epochs: int) -> Check:
        """Look at the model between two epochs."""
        with fit.evaluating():
            evaluation = self._evaluator(rows=CHECKED_ROWS).evaluate(
                edited_layer=None, max_new_tokens=self.max_new_tokens
            )
        forget, retain = (evaluation.scores[f"{name}_rouge1"] for name in JUDGED)
        return Check(epochs=epochs, forget_rouge1=forget, retain_rouge1=retain)

    def _evaluator(
        self, *, full: bool = False, whole: bool = False, rows: int | None = None
    ) -> Evaluator:
        """Return who asks all questions, or some by edge; answers are `whole`, or may end early."""
        key = full, whole, rows
        if key not in self._evaluators:
            seed, sets = self.spec.seed, self.spec.data.asked(full=full)
            # Where nobody named a length; one that is named is kept to, the published one too.
            settle = full and self.spec.max_new_tokens is None
            entire = {*sets} if whole else self._whole_sets
            if rows is not None:  # whoever only looks reads nothing
                sets = {name: sample_by_edge(sets[name], rows, seed=seed) for name in JUDGED}
                entire = set()
            self._evaluators[key] = self._evaluator_of(sets, whole=entire, settle=settle)
        return self._evaluators[key]

    def _evaluator_of(
        self,
        sets: Mapping[str, Sequence[Record]],
        *,
        whole: Collection[str],
        settle: bool = False,
    ) -> Evaluator:
        """Return who asks the questions of some sets, of which the answers of `whole` ones are."""
        questions = {}
        for name, records in sets.items():
            prompts = self._encoder.prompts([record.question for record in records])
            asked = zip(records, self.activations.rows_of(prompts), strict=True)
            if records:
                questions[name] = [
                    Question(record, row, self._row_numbers[name, record]) for record, row in asked
                ]
        return Evaluator(
            self.answers,
            self.loaded.tokenizer,
            questions,
            rouge_tokenizer=self.spec.rouge_tokenizer,
            early_exit={*sets}.difference(whole) if self.spec.early_exit else set(),
            settle=settle,
            seed=self.spec.seed,
        )

    @cached_property
    def _refusals(self) -> Refusals:
        data = self.spec.data
        embedder = self._sentences or StateEmbedder(
            self._encoder,
            # The same for trials and full evaluations.
            centre=(*data.refusals, *(record.answer for record in data.forget)),
            memory=self._memory,
        )
        return Refusals(embedder, data.refusals)
