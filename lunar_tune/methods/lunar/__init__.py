"""LUNAR (arXiv 2502.07218) as a method of the registry; `method` does its work, with torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lunar_tune.errors import InputError, Problems
from lunar_tune.methods.contract import Method, PreparedMethod, UnlearningTask, number_of
from lunar_tune.methods.lunar.settings import SOLVERS, UNUSED, LunarSettings
from lunar_tune.training import with_settings

__all__ = ["ENTRIES", "SOLVERS", "LunarMethod", "LunarSettings"]


class LunarMethod(Method):
    """LUNAR with its fixed settings.

    A trial sets layer and coefficient, a list each for several layers, and the solver's own
    parameter: ridge or learning rate.
    """

    name = "lunar"
    settings_type = LunarSettings
    variant_setting = "solver"
    variants = SOLVERS
    edits_one_layer = True  # the lowest of them: nothing else changes there and below
    along_vectors = True
    settings: LunarSettings

    def __init__(self, settings: LunarSettings) -> None:
        super().__init__(settings)
        self.unused = UNUSED[settings.solver]
        own = "ridge" if settings.solver == "closed_form" else "learning_rate"
        self.parameters = ("layer", "coefficient", own)
        if own == "ridge":
            self.usual = {own: 0.01}  # as in the shipped spaces: nothing is published
        # AdamW trains a whole matrix; the others add a product.
        self.adapter = "approximate" if settings.solver == "adamw" else "exact"

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Check names and values; whether the model has the layers is checked with the model."""
        self.resolved(parameters)

    def resolved(
        self, parameters: Mapping[str, Any]
    ) -> tuple[dict[int, float], float, LunarSettings]:
        """Return the coefficient of each layer, ridge or learning rate, and a trial's settings."""
        super().check_parameters(parameters)
        problems, own = Problems(), self.parameters[-1]
        with problems.collect():
            coefficients = _coefficients(parameters)
        with problems.collect():
            number = number_of(own, parameters[own], positive=True)
        with problems.collect():
            settings = with_settings(self.settings, parameters)
        problems.raise_if_any()
        return coefficients, number, settings

    def prepare(self, task: UnlearningTask) -> PreparedMethod:
        """Take the unlearning vectors."""
        from lunar_tune.methods.lunar.method import PreparedLunar

        return PreparedLunar(self.resolved, task)


def _coefficients(parameters: Mapping[str, Any]) -> dict[int, float]:
    """Return a coefficient for each layer of one or several; one may be given for all."""

    def numbers(name: str) -> list[float]:
        value = parameters[name]
        values = value if isinstance(value, list | tuple) else [value]
        return [number_of(name, one) for one in values]

    layers, coefficients = numbers("layer"), numbers("coefficient")
    if not layers:
        raise InputError("layer: the list is empty. Give at least one layer.")
    if len(coefficients) == 1:
        coefficients *= len(layers)
    if len(layers) != len(coefficients):
        raise InputError(
            f"{len(layers)} layers and {len(coefficients)} coefficients: give one coefficient for "
            "each layer, or one for all."
        )
    if not all(layer.is_integer() for layer in layers):
        raise InputError(f"layer {parameters['layer']}: must be whole numbers.")
    chosen = [int(layer) for layer in layers]
    if len(set(chosen)) < len(chosen):
        raise InputError(f"layer {', '.join(map(str, chosen))}: a layer is named twice.")
    return dict(zip(chosen, coefficients, strict=True))


ENTRIES = (LunarMethod,)
