"""Scores beyond ROUGE, for the sets and metrics that were asked for and no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from lunar_tune.metrics.likelihood import LikelihoodScorer, likelihood_means
from lunar_tune.metrics.names import LIKELIHOODS, find_metric

if TYPE_CHECKING:
    from lunar_tune.data.records import Record
    from lunar_tune.metrics.evaluate import Evaluation
    from lunar_tune.models.device import DeviceMemory
    from lunar_tune.models.loading import LoadedModel
    from lunar_tune.training.answer_loss import Pair

__all__ = ["FurtherScores"]


class FurtherScores:
    """Adds to evaluations what was asked for beside ROUGE.

    Args:
        metrics: Names of scores; those that an evaluation has anyway are left alone.
        encode: Gives records as pairs of token ids.
        loaded: The model.
        memory: What may be used.
    """

    def __init__(
        self,
        metrics: Iterable[str],
        encode: Callable[[Sequence[Record]], tuple[Pair, ...]],
        loaded: LoadedModel,
        memory: DeviceMemory,
    ) -> None:
        wanted = [find_metric(name) for name in metrics]
        self._likelihoods = [metric for metric in wanted if LIKELIHOODS in metric.needs]
        self._of_answers = [metric for metric in wanted if metric.compute is not None]
        self._encode, self._loaded, self._memory = encode, loaded, memory
        self._pairs: dict[Record, Pair] = {}

    def added_to(self, evaluation: Evaluation, sets: Mapping[str, Sequence[Record]]) -> Evaluation:
        """Return the evaluation with the further scores of the model as it is now.

        One that was stopped early is returned as it is: that trial is judged already.

        Args:
            evaluation: Of the model as it is now.
            sets: The records that it asked, by name of the set.

        Raises:
            DivergenceError: A logit is NaN or infinite.
        """
        if not evaluation.complete:
            return evaluation
        further: dict[str, float] = {}
        for metric in self._of_answers:
            if metric.compute is not None:
                rows = [row for row in evaluation.rows if row.set_name in metric.sets]
                further[metric.name] = float(metric.compute(rows))
        for name in dict.fromkeys(one for metric in self._likelihoods for one in metric.sets):
            means = likelihood_means(self._scorer.score(self._pairs_of(sets[name])))
            further |= {
                metric.name: means[metric.quantity]
                for metric in self._likelihoods
                if name in metric.sets
            }
        return dataclasses.replace(evaluation, scores={**evaluation.scores, **further})

    @cached_property
    def _scorer(self) -> LikelihoodScorer:
        return LikelihoodScorer(self._loaded, self._memory)

    def _pairs_of(self, records: Sequence[Record]) -> list[Pair]:
        new = [record for record in dict.fromkeys(records) if record not in self._pairs]
        self._pairs.update(zip(new, self._encode(new), strict=True))
        return [self._pairs[record] for record in records]
