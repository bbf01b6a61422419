"""Scored layers made up by hand, for whoever tests what a search makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lunar_tune.trial.layer_scores import LayerPrior, LayerSimilarities, Similarities


def prior_of(
    scores: Mapping[int, float],
    recommended: Sequence[int],
    *,
    base_model: float = -1.0,
    unfinished: int = 0,
    **changes: Any,
) -> LayerPrior:
    """Return a prior of 12 answers; the highest score is the best one's, the lowest layer's first.

    Args:
        scores: s1 - s2 of each layer.
        recommended: Said by the test, which knows it.
        base_model: s1 - s2 without anything added.
        unfinished: Answers of every layer that do not end.
        changes: Other values of the prior.
    """
    best = min(scores, key=lambda layer: (-scores[layer], layer))
    values: dict[str, Any] = {
        "model": "tiny",
        "n_layers": 4,
        "best": best,
        "recommended": tuple(recommended),
        "data": "mini",
        "forget_edges": ("A_B",),
        "rows": 12,
        "coefficient": 0.5,
        "max_new_tokens": 32,
        "seed": 0,
        "embedding": "by hand",
        "base_model": Similarities(s1=base_model, s2=0.0, unfinished=0),
        "layers": tuple(
            LayerSimilarities(layer=layer, s1=score, s2=0.0, unfinished=unfinished)
            for layer, score in sorted(scores.items())
        ),
    }
    return LayerPrior(**(values | changes))
