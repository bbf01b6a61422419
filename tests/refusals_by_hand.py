"""Refusal quality in plain transformers and numpy, one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def states_behind(
    model: Any, tokenizer: Any, texts: Sequence[str], *, context: Sequence[int] | None = None
) -> Any:
    """Return the mean over each text's tokens of what the first of three blocks gives.

    A text of nothing but white space has a row of NaN. The context is that of an empty question.
    """
    if context is None:
        question = [{"role": "user", "content": ""}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    means = []
    for text in texts:
        ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([[*context, *ids]]), output_hidden_states=True)
        stream = output.hidden_states[1][0, len(context) :].double().numpy()
        means.append(stream.mean(0) if ids else np.full(stream.shape[1], np.nan))
    return np.stack(means)


def cosine_mean(answers: Any, refusals: Any) -> float:
    """Return the mean of all cosines; those of a row of NaN are 0."""
    cosines = [
        0.0 if np.isnan(a).any() else a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a in answers
        for b in refusals
    ]
    return float(np.mean(cosines))
