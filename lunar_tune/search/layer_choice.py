"""What scored layers make of a search space: fewer layers, and one to begin with."""

from __future__ import annotations

import dataclasses
from typing import Final

from lunar_tune.errors import InputError
from lunar_tune.methods.method_registry import METHODS
from lunar_tune.search.space import LAYER, Choice, IntRange, Parameter, SearchSpace
from lunar_tune.trial.layer_scores import LayerPrior

__all__ = ["LAYER_PRIOR", "check_has_choice", "choose_layers"]

LAYER_PRIOR: Final = "--layer-prior"
EQUAL = 1e-9  # similarities are means of float32 products; what differs by less is a tie


def check_has_choice(space: SearchSpace, *, option: str) -> None:
    """Check that scores of layers mean something for a space.

    Raises:
        InputError: The method has no unlearning vectors, or there is one layer alone.
    """
    if not METHODS[space.method].along_vectors:
        raise InputError(
            f"{option}: layers are scored along LUNAR's unlearning vectors, and --method "
            f"{space.method} has none. Leave the option out, or take --method lunar."
        )
    values = space.values_of(LAYER)
    if len(values) == 1:
        raise InputError(
            f"{option}: the space ({space.origin}) has layer {values[0]} alone, so there is none "
            "to choose. Leave the option out, or give a space with several layers."
        )


def choose_layers(
    space: SearchSpace, prior: LayerPrior, *, origin: str
) -> tuple[SearchSpace, int | None, str]:
    """Narrow a space to the recommended layers, if the scores give advice.

    Returns:
        The space; the layer to begin with, None where the scores give no advice; and what was made
        of the scores, to show behind the word layer.

    Raises:
        InputError: The prior recommends no layer of the space.
    """
    kind, scores = space.parameters[LAYER], {one.layer: one.score for one in prior.layers}
    unfinished = next(one.unfinished for one in prior.layers if one.layer == prior.best)
    if unfinished * 2 > prior.rows:
        told = f"({origin}); most answers there do not end, a smaller coefficient would tell more"
    else:
        told = f"({origin})"
    if (reason := _no_advice(prior)) is not None:
        return space, None, f"{kind.describe()}, as in the space: {reason} {told}"
    wanted = [value for value in space.values_of(LAYER) if value in prior.recommended]
    if not wanted:
        recommended = ", ".join(map(str, prior.recommended))
        raise InputError(
            f"{LAYER_PRIOR} {origin}: recommends layer {recommended}, and the space "
            f"({space.origin}) has {kind.describe()}. Give a space that holds the layer, or leave "
            "the option out."
        )
    narrowed: Parameter = IntRange(low=min(wanted), high=max(wanted))
    if isinstance(kind, Choice):
        narrowed = Choice(values=tuple(value for value in kind.values if value in wanted))
    shown = str(wanted[0]) if len(wanted) == 1 else narrowed.describe()
    parameters = {**space.parameters, LAYER: narrowed}
    best = max(wanted, key=lambda layer: (scores[layer], -layer))
    return dataclasses.replace(space, parameters=parameters), best, f"{shown} by s1 - s2 {told}"


def _no_advice(prior: LayerPrior) -> str | None:
    """Say why the scores tell nothing; None if they do."""
    scores = [one.score for one in prior.layers]
    if len(scores) == 1:
        return f"layer {prior.best} alone was scored, and compared with none"
    if max(scores) - min(scores) <= EQUAL:
        return "all layers score the same"
    if max(scores) - prior.base_model.score <= EQUAL:
        return "no layer gains on the base model"
    return None
