"""Likelihoods and refusal quality in plain transformers and numpy, one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lunar_tune.metrics.likelihood import AnswerLikelihood
from lunar_tune.training.answer_loss import Pair


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    """Return a question in the tokenizer's own chat template."""
    turn = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"])


@torch.no_grad()
def logits_after(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Return a row's logits at every place in float64."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0].double().numpy()


def likelihood_alone(model: Any, pair: Pair) -> AnswerLikelihood:
    """Judge an answer, place by place."""
    logits = logits_after(model, (*pair.prompt, *pair.answer))[len(pair.prompt) - 1 : -1]
    log_probs = logits - logits.max(1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(1))[:, None]
    places = list(enumerate(pair.answer))
    return AnswerLikelihood(
        ranks=tuple(int((logits[i] > logits[i][t]).sum()) + 1 for i, t in places[:-1]),
        chosen=tuple(int(logits[i].argmax()) == t for i, t in places[:-1]),
        log_probs=tuple(float(log_probs[i][t]) for i, t in places),
        entropies=tuple((-np.exp(log_probs) * log_probs).sum(1).tolist()),
    )


@torch.no_grad()
def states_behind(
    model: Any, tokenizer: Any, texts: Sequence[str], *, context: Sequence[int] | None = None
) -> Any:
    """Return the mean over each text's tokens of what the first of three blocks gives.

    A text of nothing but white space has a row of NaN. The context is that of an empty question.
    """
    before = prompt_of(tokenizer, "") if context is None else context
    means = []
    for text in texts:
        ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        output = model(input_ids=torch.tensor([[*before, *ids]]), output_hidden_states=True)
        stream = output.hidden_states[1][0, len(before) :].double().numpy()
        means.append(stream.mean(0) if ids else np.full(stream.shape[1], np.nan))
    return np.stack(means)


def unit(rows: Any) -> Any:
    """Return rows of length one; those of NaN are 0."""
    array = np.asarray(rows, dtype=np.float64)
    return np.nan_to_num(array / np.linalg.norm(array, axis=1, keepdims=True))
