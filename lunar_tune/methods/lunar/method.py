"""LUNAR (arXiv 2502.07218) at work: unlearning vectors, and an edited down-projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lunar_tune.methods.contract import Edit, Fit, PreparedMethod, UnlearningTask
from lunar_tune.methods.lunar.settings import LunarSettings
from lunar_tune.methods.lunar.solvers import (
    RidgeSolution,
    Solution,
    Tokens,
    solve_adamw,
    solve_closed_form,
    solve_ridge,
)
from lunar_tune.models.layout import check_layers
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training.adapting import Factors, holding


def unlearning_vectors(
    *,
    reference: Float[Tensor, "n_points reference_rows d_model"],
    forget: Float[Tensor, "n_points forget_rows d_model"],
) -> Float[Tensor, "n_layers d_model"]:
    """Return r_l = mean_reference(x_l) − mean_forget(x_l), x_l being the output of block l.

    Given are the base model's streams at last tokens, at the input of every block and the output of
    the last one. Means are taken in float64. Row l belongs to block l; the published code's array
    is shifted by one, since it records block inputs.
    """
    return reference[1:].double().mean(1) - forget[1:].double().mean(1)


@contextmanager
def edited(
    loaded: LoadedModel,
    weights: Mapping[int, Tensor],
    factors: Mapping[int, Factors] = MappingProxyType({}),
    losses: tuple[float, ...] = (),
) -> Iterator[Fit]:
    """Inside, block l's down-projection weight is `weights[l]`; after, what it was, bit for bit.

    `weights` `[d_model, d_ff]` are rounded to the model's number format; `factors` are what was
    added to them as products, if it was one. A weight of another shape raises a ValueError.
    """
    layout, name_of = loaded.layout, loaded.layout.down_projection_name
    parameters = [layout.down_projection_of(loaded.model, layer).weight for layer in weights]
    originals = [parameter.data for parameter in parameters]
    for (layer, weight), original in zip(weights.items(), originals, strict=True):
        if weight.shape != original.shape:
            raise ValueError(
                f"layer {layer}: shape {tuple(weight.shape)}, not {tuple(original.shape)}"
            )
    new = [w.to(p).contiguous() for w, p in zip(weights.values(), originals, strict=True)]
    names = [f"{name_of(layer)}.weight" for layer in weights]
    added = {name_of(layer): product for layer, product in factors.items()}
    edit = Edit(
        weights=lambda: dict(zip(names, new, strict=True)),
        factors=(lambda: added) if added else None,
    )
    with holding(parameters, new):
        yield Fit(
            base_model=lambda: holding(parameters, originals),
            edit=edit,
            losses=losses,
            edited_layer=min(weights, default=None),
        )


@contextmanager
def steered(loaded: LoadedModel, layer: int, shift: Float[Tensor, " d_model"]) -> Iterator[None]:
    """Inside, block `layer`'s output is `shift` more than it was; after, what it was.

    It is added at every position: all prompt tokens and all generated ones. That is activation
    addition as in LUNAR (arXiv 2502.07218, section 3) after Arditi et al. (arXiv 2406.11717), and
    what foretells the edit best, which moves all tokens of a forget prompt and generated ones too.
    Padding moves as well; nothing attends to it. Shifts of nested contexts add up.

    Raises:
        ModelError: The model has no such block.
        ValueError: The shift has another width than the stream; the sum would spread it.
    """
    check_layers((layer,), loaded.n_layers)
    width = loaded.model.config.hidden_size
    if shift.shape != (width,):
        raise ValueError(f"a shift of shape {tuple(shift.shape)} for a stream of width {width}")
    added = shift.to(device=loaded.device, dtype=loaded.model.dtype)

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    with loaded.layout.blocks_of(loaded.model)[layer].register_forward_hook(add):
        yield


class PreparedLunar(PreparedMethod):
    """Unlearning vectors, and what was solved from the activations so far.

    `resolve` gives a trial's coefficients by layer, its ridge or learning rate, and its settings.
    """

    def __init__(
        self,
        resolve: Callable[[Mapping[str, Any]], tuple[dict[int, float], float, LunarSettings]],
        task: UnlearningTask,
    ) -> None:
        self._resolve, self._loaded = resolve, task.loaded
        self._activations = task.activations
        source = task.activations.source
        self.vectors: Float[Tensor, "n_layers d_model"] = unlearning_vectors(
            reference=source.last_tokens(task.reference_prompts),
            forget=source.last_tokens([pair.prompt for pair in task.forget_pairs]),
        )
        pairs = (*task.forget_pairs, *task.retain_pairs)
        rows = self._activations.rows_of([pair.prompt for pair in pairs])
        lengths = [self._activations.prompt_lengths[row] for row in rows]
        self._lengths = torch.tensor(lengths)
        self._nodes = task.activations.tree.nodes_of(rows, lengths)
        self._n_forget = len(task.forget_pairs)
        self._ridge_solutions: dict[tuple[int, float, float | None, int], RidgeSolution] = {}

    @contextmanager
    def unlearning(self, parameters: Mapping[str, Any], *, seed: int) -> Iterator[Fit]:
        """Return a context in which the model is unlearned at once; see the contract."""
        coefficients, own, settings = self._resolve(parameters)
        check_layers(tuple(coefficients), self._loaded.n_layers)
        # The lowest layer last: an evaluation starts from what its MLP reads, which is then
        # held, and nothing must be captured from an edited model.
        solutions = {
            layer: self._solve(layer, coefficients[layer], own, settings, seed)
            for layer in sorted(coefficients, reverse=True)
        }
        # The published code sums the layers' losses; they share no parameter.
        losses = tuple(map(math.fsum, zip(*(s.losses for s in solutions.values()), strict=True)))
        weights = {layer: s.weight for layer, s in solutions.items()}
        factors = {layer: s.factors for layer, s in solutions.items() if s.factors is not None}
        with edited(self._loaded, weights, factors, losses) as fit:
            yield fit

    @torch.no_grad()
    def _solve(
        self, layer: int, coefficient: float, own: float, settings: LunarSettings, seed: int
    ) -> Solution:
        weight = self._loaded.layout.down_projection_of(self._loaded.model, layer).weight
        inputs = self._activations.reads(layer).inputs
        nodes, is_forget = (points.to(inputs.device) for points in self._points(settings, seed))
        shift = (coefficient * self.vectors[layer]).to(inputs.device)
        if settings.solver == "closed_form":
            drawn = seed if settings.retain_points is not None else 0
            key = (layer, own, settings.retain_points, drawn)
            if key not in self._ridge_solutions:
                self._ridge_solutions[key] = solve_ridge(inputs[nodes], is_forget, ridge=own)
            return solve_closed_form(weight, shift, self._ridge_solutions[key])
        tokens = Tokens(weight, inputs, nodes, is_forget, shift)
        return solve_adamw(tokens, learning_rate=own, settings=settings, seed=seed)

    def _points(
        self, settings: LunarSettings, seed: int
    ) -> tuple[Int[Tensor, " points"], Bool[Tensor, " points"]]:
        """Return the nodes of the tokens that take part in the fit, and which of them are moved."""
        ends = self._lengths.cumsum(0)
        n_forget_tokens = int(ends[self._n_forget - 1])
        moved = torch.zeros(int(ends[-1]), dtype=torch.bool)
        if settings.positions == "all":
            moved[:n_forget_tokens] = True
        else:
            moved[ends[: self._n_forget] - 1] = True
        if settings.retain_points is None:
            return self._nodes, moved
        retain = torch.arange(n_forget_tokens, len(moved))
        count = min(len(retain), round(settings.retain_points * n_forget_tokens))
        generator = torch.Generator().manual_seed(seed)
        drawn = retain[torch.randperm(len(retain), generator=generator)[:count]]
        chosen = torch.cat([torch.arange(n_forget_tokens), drawn.sort().values])
        return self._nodes[chosen], moved[chosen]
