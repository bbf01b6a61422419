"""A single run by the page of `lunar_tune.reference`, judged as any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError, TrialError
from lunar_tune.methods.contract import Fit, Method, PreparedMethod, UnlearningTask
from lunar_tune.methods.lunar import LunarMethod, LunarSettings
from lunar_tune.methods.lunar.method import edited
from lunar_tune.models.layout import check_layers

if TYPE_CHECKING:
    from lunar_tune.reference import Solver


def check_reference(method: Method) -> LunarMethod:
    """Return a method that the page can do, or raise an InputError."""
    if not isinstance(method, LunarMethod) or method.variant not in ("adamw", "closed_form"):
        raise InputError(
            f"--engine reference: does lunar with adamw or closed_form, not {method.name} "
            f"({method.variant})."
        )
    settings = method.settings
    if settings != LunarSettings(solver=settings.solver, epochs=settings.epochs):
        raise InputError(
            "--engine reference: of lunar's settings only solver and epochs may be set; the page "
            "moves all prompt tokens, keeps all retain tokens and trains in float32."
        )
    return method


class PreparedReference(PreparedMethod):
    """What the page needs of a run: model and encoded prompts; nothing is computed ahead."""

    def __init__(self, method: LunarMethod, task: UnlearningTask) -> None:
        self._method, self._task = method, task

    @contextmanager
    def unlearning(self, parameters: Mapping[str, Any], *, seed: int) -> Iterator[Fit]:
        """Return a context in which the page's matrices stand in the model; see the contract."""
        from lunar_tune import reference  # loads transformers' models

        method, task, loaded = self._method, self._task, self._task.loaded
        layout = loaded.layout
        chosen, own, _ = method.resolved(parameters)
        layers, coefficients = tuple(chosen), set(chosen.values())
        check_layers(layers, loaded.n_layers)
        if len(coefficients) > 1:
            raise InputError("--engine reference: takes one coefficient for all layers.")
        solver: Solver
        if method.variant == "closed_form":
            solver = partial(reference.fit_closed_form, ridge=own)
        else:
            epochs = method.settings.epochs
            solver = partial(reference.fit_adamw, learning_rate=own, epochs=epochs, seed=seed)
        try:
            unlearned = reference.unlearn(
                loaded.model,
                layers=layers,
                coefficient=coefficients.pop(),
                reference=task.reference_prompts,
                forget=[pair.prompt for pair in task.forget_pairs],
                retain=[pair.prompt for pair in task.retain_pairs],
                solver=solver,
            )
        except ValueError as error:
            raise TrialError(str(error)) from error
        weights = {
            layer: layout.down_projection_of(unlearned, layer).weight.detach() for layer in layers
        }
        with edited(loaded, weights) as fit:
            yield fit
