"""LUNAR's edit is the paper's formula by hand; several layers, retain points, kept reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
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

from lunar_tune.engine import activations
from lunar_tune.errors import InputError
from lunar_tune.methods.lunar.method import PreparedLunar
from lunar_tune.models.device import DeviceMemory
from lunar_tune.models.loading import LoadedModel

N_FORGET_TOKENS, N_RETAIN_TOKENS = 7, 12
OWN = {"adamw": {"learning_rate": 0.01}, "closed_form": {"ridge": 1e-3}}


@pytest.fixture
def model(loaded: Callable[..., LoadedModel], unchanged: Callable[[Any], None]) -> LoadedModel:
    """Return a model whose weights must be the same after the test, bit for bit."""
    one = loaded("qwen2")
    unchanged(one.model)
    return one


def edit_by_hand(
    model: LoadedModel, layer: int, coefficient: float, ridge: float, moved: list[int]
) -> np.ndarray:
    """Return W₀ + c·r·vᵀ in numpy, from hidden states of single prompts."""
    norm_inputs: list[torch.Tensor] = []
    block = model.model.model.layers[layer]
    handles = [
        block.mlp.down_proj.register_forward_hook(lambda _m, a, _o: norm_inputs.append(a[0][0])),
        block.register_forward_hook(lambda _m, _a, output: norm_inputs.append(output[0, -1])),
    ]
    h, last = [], []
    for prompt in (*FORGET, *RETAIN, *REFERENCE):
        norm_inputs.clear()
        with torch.no_grad():
            model.model(input_ids=torch.tensor([prompt]), use_cache=False)
        h.append(norm_inputs[0].double().numpy())
        last.append(norm_inputs[1].double().numpy())
    for handle in handles:
        handle.remove()
    r = np.mean(last[5:], axis=0) - np.mean(last[:2], axis=0)
    rows = np.concatenate(h[:5])
    indicator = np.isin(np.arange(len(rows)), moved).astype(float)
    gram = rows.T @ rows
    strength = ridge * np.trace(gram) / len(gram)
    v = np.linalg.solve(gram + strength * np.eye(len(gram)), rows.T @ indicator)
    weight = block.mlp.down_proj.weight.detach().double().numpy()
    return np.asarray(weight + coefficient * np.outer(r, v))


@pytest.mark.parametrize(
    ("positions", "moved"), [("all", list(range(N_FORGET_TOKENS))), ("last", [3, 6])]
)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_edit_is_the_papers_formula_computed_by_hand(
    model: LoadedModel, layer: int, positions: str, moved: list[int]
) -> None:
    """With `last`, only the last tokens of the two forget prompts (3 and 6) are moved."""
    prepared = lunar(solver="closed_form", positions=positions).prepare(task_on(model))
    expected = edit_by_hand(model, layer, 1.5, 1e-2, moved)
    parameters = {"layer": layer, "coefficient": 1.5, "ridge": 1e-2}
    with unlearned(prepared, parameters, seed=0):
        weight = model.model.model.layers[layer].mlp.down_proj.weight.numpy().copy()
    np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize(
    ("layer", "coefficient", "message"),
    [
        (3, 1.0, "layer 3: the model has 3 decoder blocks"),
        (-1, 1.0, "layer -1"),
        ([1, 1], 1.0, "a layer is named twice"),
        ([0, 1, 2], [1.0, 2.0], "3 layers and 2 coefficients"),
        (1.5, 1.0, "layer 1.5: whole numbers"),
        ([], 1.0, "at least one layer"),
        ([], [], "at least one layer"),
    ],
)
def test_layers_that_are_not_there_or_do_not_match_coefficients_are_refused(
    model: LoadedModel, layer: Any, coefficient: Any, message: str
) -> None:
    prepared = lunar(solver="closed_form").prepare(task_on(model))
    parameters = {"layer": layer, "coefficient": coefficient, "ridge": 1e-3}
    assert_fails(prepared, parameters, InputError, message)


@pytest.mark.parametrize(
    ("k", "expected"), [(1.0, 7), (0.5, 4), (1.6, 11), (2.0, N_RETAIN_TOKENS), (None, 12)]
)
def test_retain_points_are_so_many_for_each_forget_token(
    model: LoadedModel, k: float | None, expected: int
) -> None:
    """Seven forget and twelve retain tokens; .5 × 7 = 3.5 is rounded to 4 (to even)."""
    method = lunar(retain_points=k)
    prepared = method.prepare(task_on(model))
    assert isinstance(prepared, PreparedLunar)
    chosen, is_forget = prepared._points(method.settings, seed=0)
    tree = prepared._activations.tree
    assert chosen[:N_FORGET_TOKENS].tolist() == tree.nodes_of([0, 1]).tolist()
    assert is_forget.tolist() == [True] * N_FORGET_TOKENS + [False] * expected
    # Each retain token at most once; several tokens may have one node.
    retain = Counter(chosen[N_FORGET_TOKENS:].tolist())
    assert retain.total() == expected
    assert retain <= Counter(tree.nodes_of([2, 3, 4]).tolist())


@pytest.mark.parametrize("solver", ["adamw", "closed_form"])
def test_drawn_retain_points_follow_the_seed_and_take_part_in_the_fit(
    model: LoadedModel, solver: str
) -> None:
    parameters = {"layer": 0, "coefficient": 1.0} | OWN[solver]
    prepared = lunar(solver=solver, retain_points=0.5).prepare(task_on(model))
    first = weights_inside(prepared, model, parameters, seed=1)
    assert not same(weights_inside(prepared, model, parameters, seed=2), first)
    assert same(weights_inside(prepared, model, parameters, seed=1), first)


def test_reads_are_dropped_when_they_no_longer_fit_and_come_back_the_same(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block's reads are 48 + 32 numbers of 4 bytes for each of 16 distinct prefixes.

    There is room for two blocks: what is held is no longer free. Reads get a millionth of what is
    free, so that the batches of a sweep have room always and round alike.
    """
    known = task_on(model).activations
    assert known.tree.n_nodes == 16
    size = 16 * (48 + 32) * 4
    monkeypatch.setattr(activations, "READS_SHARE", 1e-6)
    monkeypatch.setattr(
        DeviceMemory, "free_bytes", lambda _: (2 - len(known._reads)) * size * 10**6 + 10**9
    )
    first = known.reads(0).inputs.clone()
    for layer in (1, 2):
        known.reads(layer)
    assert set(known._reads) == {1, 2}
    assert torch.equal(known.reads(0).inputs, first)
    assert set(known._reads) == {2, 0}
