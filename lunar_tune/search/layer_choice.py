"""What scored layers make of a search space: fewer layers, and one to begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lunar_tune.errors import InputError
from lunar_tune.methods.method_registry import METHODS
from lunar_tune.search.space.space import Choice, IntRange, Parameter, SearchSpace

if TYPE_CHECKING:
    from lunar_tune.trial.layer_scores import LayerPrior  # loads torch

__all__ = ["LAYER_PRIOR", "LayerChoice", "check_has_choice", "choose_layers"]

LAYER_PRIOR: Final = "--layer-prior"
LAYER: Final = "layer"
EQUAL = 1e-9  # similarities are means of float32 products; what differs by less is a tie


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """What a prior made of a space."""

    space: SearchSpace
    """Narrowed, or as it was."""
    best: int | None
    """The layer to begin with; None where the scores give no advice."""
    text: str
    """What was made of the scores, to show behind the word layer."""


def check_has_choice(space: SearchSpace, *, option: str) -> None:
    """Check that scores of layers mean something for a space.

    Args:
        space: What is searched.
        option: As it was given, for the message.

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


def choose_layers(space: SearchSpace, prior: LayerPrior, *, origin: str) -> LayerChoice:
    """Narrow a space to the recommended layers, if the scores give advice.

    Args:
        space: With several layers; starting points are left as they are.
        prior: Of the same model.
        origin: Where the prior comes from, to show.

    Raises:
        InputError: It recommends no layer of the space.
    """
    silent = _no_advice(prior)
    kind = space.parameters[LAYER]
    if silent is not None:
        text = f"{kind.describe()}, as in the space: {silent} ({origin}){_warning(prior)}"
        return LayerChoice(space=space, best=None, text=text)
    wanted = [value for value in space.values_of(LAYER) if value in prior.recommended]
    if not wanted:
        recommended = ", ".join(map(str, prior.recommended))
        raise InputError(
            f"{LAYER_PRIOR} {origin}: recommends layer {recommended}, and the space "
            f"({space.origin}) has {kind.describe()}. Give a space that holds the layer, or leave "
            "the option out."
        )
    scores = {one.layer: one.score for one in prior.layers}
    narrowed = _narrowed(kind, wanted)
    return LayerChoice(
        space=dataclasses.replace(space, parameters={**space.parameters, LAYER: narrowed}),
        best=max(wanted, key=lambda layer: (scores[layer], -layer)),
        text=f"{_shown(narrowed)} by s1 - s2 ({origin}){_warning(prior)}",
    )


def _no_advice(prior: LayerPrior) -> str | None:
    """Say why the scores tell nothing; None if they do."""
    scores = [one.score for one in prior.layers]
    if len(scores) == 1:
        return f"layer {prior.best} alone was scored, and compared with none"
    if max(scores) - min(scores) <= EQUAL:
        return "all layers score the same"
    if max(scores) - prior.unmodified.score <= EQUAL:
        return "no layer gains on the base model"
    return None


def _warning(prior: LayerPrior) -> str:
    """Say that the curve hardly tells layers apart, if most answers of its best do not end."""
    unfinished = next(one.unfinished for one in prior.layers if one.layer == prior.best)
    if unfinished * 2 <= prior.rows:
        return ""
    return "; most answers there do not end, a smaller coefficient would tell more"


def _narrowed(kind: Parameter, wanted: Sequence[int]) -> Parameter:
    """Return the smallest range, or the choice, that holds the layers."""
    if isinstance(kind, IntRange):
        return IntRange(low=min(wanted), high=max(wanted))
    if isinstance(kind, Choice):
        return Choice(values=tuple(value for value in kind.values if value in wanted))
    return kind


def _shown(kind: Parameter) -> str:
    low, high = kind.bounds
    return str(low) if low == high else kind.describe()
