"""LUNAR's edit is that of the page; several layers, retain points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_examples import (
    FORGET,
    REFERENCE,
    RETAIN,
    assert_fails,
    lunar,
    same,
    task_on,
    unlearned,
    weights,
    weights_inside,
)

from lunar_tune import reference
from lunar_tune.errors import InputError
from lunar_tune.methods.lunar.method import PreparedLunar
from lunar_tune.models.loading import LoadedModel

N_FORGET_TOKENS, N_RETAIN_TOKENS = 7, 12
OWN = {"adamw": {"learning_rate": 0.01}, "closed_form": {"ridge": 1e-3}}


@pytest.fixture
def model(loaded: Callable[..., LoadedModel], unchanged: Callable[[Any], None]) -> LoadedModel:
    one = loaded("qwen2")
    unchanged(one.model)
    return one


@pytest.mark.parametrize(
    ("positions", "moved"), [("all", list(range(N_FORGET_TOKENS))), ("last", [3, 6])]
)
@pytest.mark.parametrize("layer", [0, 2])
def test_the_edit_is_that_of_the_page(
    model: LoadedModel, layer: int, positions: str, moved: list[int]
) -> None:
    """With `last`, only the last tokens of the two forget prompts (3 and 6) are moved."""
    prepared = lunar(solver="closed_form", positions=positions).prepare(task_on(model))
    h = reference.mlp_inputs(model.model, layer, [*FORGET, *RETAIN])
    shift = 1.5 * reference.unlearning_vector(model.model, layer, REFERENCE, FORGET)
    is_moved = torch.isin(torch.arange(len(h)), torch.tensor(moved))
    expected = reference.fit_closed_form(h, is_moved, shift, ridge=1e-2)
    down_projection = model.model.model.layers[layer].mlp.down_proj
    before = down_projection.weight.clone()
    with unlearned(prepared, {"layer": layer, "coefficient": 1.5, "ridge": 1e-2}, seed=0):
        difference = (down_projection.weight - before).double()
    torch.testing.assert_close(difference, expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["adamw", "closed_form"])
def test_several_layers_are_each_fitted_on_the_base_model(model: LoadedModel, solver: str) -> None:
    prepared = lunar(solver=solver).prepare(task_on(model))

    def at(layer: Any, coefficient: Any) -> dict[str, Any]:
        return {"layer": layer, "coefficient": coefficient} | OWN[solver]

    with unlearned(prepared, at([2, 0], [1.0, -3.0]), seed=0) as two:
        both = weights(model)
    losses = []
    for layer, coefficient in ((2, 1.0), (0, -3.0)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        with unlearned(prepared, at(layer, coefficient), seed=0) as one:
            assert torch.equal(both[name], weights(model)[name])
            losses.append(one.losses)
    assert two.losses == pytest.approx([sum(epoch) for epoch in zip(*losses, strict=True)])
    shared = weights_inside(prepared, model, at([2, 0], 1.0))
    listed = weights_inside(prepared, model, at([2, 0], [1.0, 1.0]))
    assert same(shared, listed)


def test_layers_that_are_not_there_or_do_not_match_coefficients_are_refused(
    model: LoadedModel,
) -> None:
    prepared = lunar(solver="closed_form").prepare(task_on(model))
    for layer, coefficient, message in (
        (3, 1.0, "layer 3: the model has 3 decoder blocks"),
        ([0, 1, 2], [1.0, 2.0], "3 layers and 2 coefficients"),
        (1.5, 1.0, "layer 1.5: whole numbers"),
        ([], [], "at least one layer"),
    ):
        parameters = {"layer": layer, "coefficient": coefficient, "ridge": 1e-3}
        assert_fails(prepared, parameters, InputError, message)


def test_retain_points_are_so_many_for_each_forget_token(model: LoadedModel) -> None:
    """Seven forget and twelve retain tokens; .5 × 7 = 3.5 is rounded to 4 (to even)."""
    for k, expected in ((0.5, 4), (1.6, 11), (2.0, N_RETAIN_TOKENS), (None, 12)):
        method = lunar(retain_points=k)
        prepared = method.prepare(task_on(model))
        assert isinstance(prepared, PreparedLunar)
        (chosen, is_forget), (other, _) = (prepared._points(method.settings, n) for n in (0, 1))
        assert torch.equal(chosen, other) == (expected == N_RETAIN_TOKENS)
        tree = prepared._activations.tree
        assert chosen[:N_FORGET_TOKENS].tolist() == tree.nodes_of([0, 1]).tolist()
        assert is_forget.tolist() == [True] * N_FORGET_TOKENS + [False] * expected
        # Each retain token at most once; several tokens may have one node.
        retain = Counter(chosen[N_FORGET_TOKENS:].tolist())
        assert retain.total() == expected
        assert retain <= Counter(tree.nodes_of([2, 3, 4]).tolist())
