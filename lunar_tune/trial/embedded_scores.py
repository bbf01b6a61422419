"""Scores that compare answers as embeddings: how much they are like refusals.

The model's own states are read from the base model, also for the answers of an unlearned
one: an edit that moved the states of its own answers would otherwise be judged by itself.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING

from lunar_tune.metrics.embedding import Embedder, StateEmbedder, load_sentence_embedder
from lunar_tune.metrics.names import EMBEDDINGS, need_of
from lunar_tune.metrics.refusal import Refusals

if TYPE_CHECKING:
    from lunar_tune.metrics.evaluate import Evaluation
    from lunar_tune.models.device import DeviceMemory
    from lunar_tune.models.loading import LoadedModel
    from lunar_tune.trial.encoder import Encoder
    from lunar_tune.trial.spec import TrialSpec

__all__ = ["EmbeddedScores", "sentence_embedder"]


def sentence_embedder(spec: TrialSpec) -> Embedder | None:
    """Load the sentence-embedding model, if there is one and a score wants it.

    Raises:
        ModelError: It cannot be loaded.
    """
    if spec.embedding_model is None or EMBEDDINGS not in need_of(spec.metrics):
        return None
    return load_sentence_embedder(spec.embedding_model, device=spec.model.device)


class EmbeddedScores:
    """Adds to evaluations the scores that embed their answers, where they were asked for.

    Args:
        spec: What was asked for.
        loaded: The model.
        encoder: Encodes the prompt behind which the model's own states are read.
        memory: What may be used.
        sentences: The embedder; None takes the model's own states.
    """

    def __init__(
        self,
        spec: TrialSpec,
        loaded: LoadedModel,
        encoder: Encoder,
        memory: DeviceMemory,
        sentences: Embedder | None,
    ) -> None:
        self._wanted = EMBEDDINGS in need_of(spec.metrics)
        self._data, self._loaded = spec.data, loaded
        self._encoder, self._memory, self._sentences = encoder, memory, sentences

    def added_to(self, evaluation: Evaluation) -> Evaluation:
        """Return the evaluation with the further scores of its answers.

        One that was stopped early is returned as it is: that trial is judged already.

        Args:
            evaluation: Complete or not; the model must be the unmodified one again by now.
        """
        if not self._wanted or not evaluation.complete:
            return evaluation
        answers = [row.answer for row in evaluation.rows if row.set_name == "forget"]
        quality = {"refusal_quality": self._refusals.quality(answers)}
        return dataclasses.replace(evaluation, scores={**evaluation.scores, **quality})

    @cached_property
    def _refusals(self) -> Refusals:
        return Refusals(self._sentences or self._own_states(), self._data.refusals)

    def _own_states(self) -> Embedder:
        """Return the model's own states, with one origin for trials and full evaluations."""
        return StateEmbedder(
            self._loaded,
            context=self._encoder.prompts([""])[0],
            centre=(*self._data.refusals, *(record.answer for record in self._data.forget)),
            memory=self._memory,
        )
