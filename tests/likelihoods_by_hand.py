"""Likelihoods of true answers in numpy, place by place, from a forward of each row alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lunar_tune.metrics.likelihood import AnswerLikelihood
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training.answer_loss import Pair


def logits_after(loaded: LoadedModel, ids: Sequence[int]) -> np.ndarray:
    """Return a row's logits at every place in float64."""
    with torch.no_grad():
        return loaded.model(input_ids=torch.tensor([list(ids)])).logits[0].double().numpy()


def one_alone(loaded: LoadedModel, pair: Pair) -> AnswerLikelihood:
    """Judge an answer."""
    logits = logits_after(loaded, (*pair.prompt, *pair.answer))[len(pair.prompt) - 1 : -1]
    log_probs = logits - logits.max(1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(1))[:, None]
    places = list(enumerate(pair.answer))
    return AnswerLikelihood(
        ranks=tuple(int((logits[i] > logits[i][t]).sum()) + 1 for i, t in places[:-1]),
        chosen=tuple(int(logits[i].argmax()) == t for i, t in places[:-1]),
        log_probs=tuple(float(log_probs[i][t]) for i, t in places),
    )
