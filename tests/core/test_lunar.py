"""LUNAR's fits are what other code computes: least squares, a plain torch loop, the page."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import jaxtyping
import method_examples as examples
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, mse_loss

from lunar_tune import reference
from lunar_tune.errors import DivergenceError, InputError
from lunar_tune.methods.lunar import LunarSettings, solvers
from lunar_tune.methods.lunar.method import PreparedLunar
from lunar_tune.methods.lunar.solvers import (
    Solution,
    Tokens,
    solve_adamw,
    solve_closed_form,
    solve_ridge,
)
from lunar_tune.models.loading import LoadedModel

D_MODEL, D_FF = 7, 12


def problem(*, tokens: int = 200, seed: int = 0, repeated: int = 0) -> Tokens:
    """Return random data; the first `repeated` tokens are the same, as template tokens are."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, D_FF, generator=generator) + 0.3
    inputs[:repeated] = inputs[0].clone()
    is_forget = torch.zeros(tokens, dtype=torch.bool)
    is_forget[: max(1, tokens // 4)] = True
    return Tokens(
        weight=torch.randn(D_MODEL, D_FF, generator=generator) * 0.2,
        inputs=inputs,
        nodes=torch.arange(tokens),
        is_forget=is_forget,
        shift=torch.randn(D_MODEL, generator=generator),
    )


def adamw(p: Tokens, *, learning_rate: float = 0.01, seed: int = 3, **fixed: Any) -> Solution:
    return solve_adamw(p, learning_rate=learning_rate, settings=LunarSettings(**fixed), seed=seed)


def test_tests_check_shapes_at_every_call() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        solve_ridge(torch.ones(4, 3), torch.ones(5).bool(), ridge=1.0)


@given(
    tokens=st.integers(1, 40),
    ridge=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 100.0]),
    repeated=st.integers(0, 10),
    part=st.sampled_from([1, 7, 2**20]),
)
@settings(max_examples=60, deadline=None)
def test_ridge_is_numpys_least_squares(tokens: int, ridge: float, repeated: int, part: int) -> None:
    """On stacked rows [H; sqrt(λ)I] → [1_forget; 0], with few and with many tokens."""
    p = problem(tokens=tokens, seed=tokens, repeated=repeated)
    h = p.inputs.double().numpy()
    strength = ridge * float(np.trace(h.T @ h)) / D_FF
    stacked = np.vstack([h, math.sqrt(strength) * np.eye(D_FF)])
    target = np.concatenate([p.is_forget.numpy().astype(float), np.zeros(D_FF)])
    expected = np.linalg.lstsq(stacked, target, rcond=None)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "PART", part)
        solved = solve_ridge(p.inputs, p.is_forget, ridge=ridge)
    np.testing.assert_allclose(solved.coefficients.numpy(), expected, rtol=1e-6, atol=1e-8)
    missing = np.square(h @ expected - target[:tokens]).mean()
    assert solved.error == pytest.approx(missing, rel=1e-5, abs=1e-9)


def test_a_closed_form_leaves_the_loss_that_it_tells_or_is_refused() -> None:
    """A ridge that is not positive, inputs that are all zero, an edit too large for its format."""
    p = problem()
    h, w0, solved = p.inputs, p.weight.double(), solve_ridge(p.inputs, p.is_forget, ridge=1e-3)
    solution = solve_closed_form(w0, p.shift.double(), solved)
    targets = linear(h.double(), w0) + p.is_forget[:, None] * p.shift
    remaining = float(mse_loss(linear(h.double(), solution.weight), targets))
    assert solution.losses == pytest.approx((remaining,), rel=1e-6)
    assert torch.equal(solve_closed_form(p.weight, 0 * p.shift, solved).weight, p.weight)
    for ridge in (0.0, math.nan, math.inf):
        with pytest.raises(InputError, match=r"ridge .*a positive number"):
            solve_ridge(h, p.is_forget, ridge=ridge)
    with pytest.raises(DivergenceError, match="singular"):
        solve_ridge(0 * h, p.is_forget, ridge=1e-3)
    with pytest.raises(DivergenceError, match="infinite"):
        solve_closed_form(p.weight.half(), 1e9 * p.shift, solved)


def plain_loop(
    p: Tokens, *, dtype: torch.dtype = torch.float64, decay: float = 0.0, rank: int | None = None
) -> tuple[Tensor, list[float]]:
    """Train four epochs with torch's AdamW and autograd: the difference to W₀, or B·A.

    In bfloat16 the matrix itself is trained.
    """
    h, w0 = p.inputs.to(dtype), p.weight.to(dtype)
    targets = linear(h, w0)
    targets[p.is_forget] += p.shift.to(dtype)
    order, draw = (torch.Generator().manual_seed(3) for _ in range(2))
    whole = dtype == torch.bfloat16
    base = torch.zeros_like(w0) if whole else w0
    trained = [torch.nn.Parameter(w0.clone() if whole else torch.zeros_like(w0))]
    if rank is not None:
        first = torch.empty(rank, D_FF).normal_(std=0.01, generator=draw).to(dtype)
        trained = [torch.nn.Parameter(x) for x in (torch.zeros(D_MODEL, rank, dtype=dtype), first)]

    def weight() -> Tensor:
        return base + (trained[0] if rank is None else trained[0] @ trained[1])

    optimizer = torch.optim.AdamW(trained, weight_decay=decay)
    losses = []
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.9**epoch
        batch_losses = []
        for batch in torch.randperm(len(h), generator=order).split(64):
            optimizer.zero_grad()
            loss = mse_loss(linear(h[batch], weight()), targets[batch])
            loss.backward()
            optimizer.step()
            batch_losses.append(loss.item())
        losses.append(sum(batch_losses) / len(batch_losses))
    return weight().detach().to(p.weight.dtype), losses


def test_a_fit_in_float32_is_a_plain_autograd_loop() -> None:
    for tokens, fixed, plain in (
        (40, {}, {}),
        (200, {"weight_decay": 0.5}, {"decay": 0.5}),
        (200, {"solver": "lora", "rank": 4}, {"rank": 4}),
    ):
        p = problem(tokens=tokens)
        solution = adamw(p, epochs=4, **fixed)
        weight, losses = plain_loop(p, **plain)
        torch.testing.assert_close(solution.weight, weight, rtol=1e-4, atol=1e-5)
        assert solution.losses == pytest.approx(losses, rel=1e-5)


def test_adamw_in_bfloat16_is_a_plain_autograd_loop_on_the_bfloat16_matrix() -> None:
    """To rounding: fused and plain AdamW round at different places (measured: 2 to 5 %)."""
    p = problem()
    solution = adamw(p, epochs=4, master_dtype="bfloat16")
    weight, losses = plain_loop(p, dtype=torch.bfloat16, decay=0.01)
    moved = (weight - p.weight.bfloat16().float()).norm()
    assert (solution.weight - weight).norm() < 0.1 * moved
    assert solution.losses == pytest.approx(losses, rel=0.01)


def test_float32_keeps_updates_that_a_bfloat16_master_loses() -> None:
    """At a learning rate of 1e-6 a step is below half a bfloat16 unit of weights near .2."""
    p = problem()
    p = dataclasses.replace(p, weight=torch.full_like(p.weight, 0.2).bfloat16().float())
    assert torch.equal(adamw(p, learning_rate=1e-6, master_dtype="bfloat16").weight, p.weight)
    assert not torch.equal(adamw(p, learning_rate=1e-6).weight, p.weight)


def test_what_leaves_the_numbers_diverges() -> None:
    for rate, fixed, message in (
        (1e30, {"epochs": 3}, "in epoch 2 of 3"),
        (1e30, {"epochs": 3, "master_dtype": "bfloat16"}, "in epoch 2 of 3"),
        (1e39, {"epochs": 1}, "infinite"),  # in the last step
    ):
        with pytest.raises(DivergenceError, match=message):
            adamw(problem(tokens=60), learning_rate=rate, **fixed)


def prepared_for(model: LoadedModel, **settings: Any) -> PreparedLunar:
    prepared = examples.lunar(**settings).prepare(examples.task_on(model))
    assert isinstance(prepared, PreparedLunar)
    return prepared


N_FORGET_TOKENS, N_RETAIN_TOKENS = 7, 12


@pytest.mark.parametrize(("positions", "moved"), [("all", list(range(7))), ("last", [3, 6])])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_edit_is_that_of_the_page(
    model: LoadedModel, layer: int, positions: str, moved: list[int]
) -> None:
    """With `last`, only the last tokens of the two forget prompts (3 and 6) are moved."""
    h = reference.mlp_inputs(model.model, layer, [*examples.FORGET, *examples.RETAIN])
    shift = reference.unlearning_vector(model.model, layer, examples.REFERENCE, examples.FORGET)
    is_moved = torch.isin(torch.arange(len(h)), torch.tensor(moved))
    expected = reference.fit_closed_form(h, is_moved, 1.5 * shift, ridge=1e-2)
    weight = model.model.model.layers[layer].mlp.down_proj.weight
    before, parameters = weight.clone(), {"layer": layer, "coefficient": 1.5, "ridge": 1e-2}
    prepared = prepared_for(model, solver="closed_form", positions=positions)
    with examples.unlearned(prepared, parameters, seed=0):
        difference = (weight - before).double()
    torch.testing.assert_close(difference, expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("solver", "own"), [("adamw", {"learning_rate": 0.01}), ("closed_form", {"ridge": 1e-3})]
)
def test_several_layers_are_each_fitted_on_the_base_model(
    model: LoadedModel, solver: str, own: dict[str, float]
) -> None:
    prepared = prepared_for(model, solver=solver)

    def fitted(layer: Any, coefficient: Any) -> tuple[dict[str, Tensor], Any]:
        parameters = {"layer": layer, "coefficient": coefficient, **own}
        with examples.unlearned(prepared, parameters, seed=0) as fit:
            return examples.weights(model), fit.losses

    both, summed = fitted([2, 0], [1.0, -3.0])
    losses = []
    for layer, coefficient in ((2, 1.0), (0, -3.0)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        alone, own_losses = fitted(layer, coefficient)
        assert torch.equal(both[name], alone[name])
        losses.append(own_losses)
    assert summed == pytest.approx([sum(epoch) for epoch in zip(*losses, strict=True)])
    assert examples.same(fitted([2, 0], 1.0)[0], fitted([2, 0], [1.0, 1.0])[0])


def test_layers_that_are_missing_or_match_no_coefficients_are_refused(model: LoadedModel) -> None:
    prepared = prepared_for(model, solver="closed_form")
    for layer, coefficient, message in (
        (3, 1.0, "layer 3: the model has 3 decoder blocks"),
        ([0, 1, 2], [1.0, 2.0], "3 layers and 2 coefficients"),
        (1.5, 1.0, "layer 1.5: must be whole numbers"),
        ([], [], "at least one layer"),
    ):
        parameters = {"layer": layer, "coefficient": coefficient, "ridge": 1e-3}
        examples.assert_fails(prepared, parameters, InputError, message)


def test_retain_points_are_so_many_for_each_forget_token(model: LoadedModel) -> None:
    """Seven forget and twelve retain tokens; .5 × 7 = 3.5 is rounded to 4 (to even)."""
    for k, expected in ((0.5, 4), (1.6, 11), (2.0, N_RETAIN_TOKENS), (None, 12)):
        prepared, chosen = prepared_for(model), LunarSettings(retain_points=k)
        (nodes, is_forget), (other, _) = (prepared._points(chosen, seed) for seed in (0, 1))
        assert torch.equal(nodes, other) == (expected == N_RETAIN_TOKENS)
        tree = prepared._activations.tree
        assert nodes[:N_FORGET_TOKENS].tolist() == tree.nodes_of([0, 1]).tolist()
        assert is_forget.tolist() == [True] * N_FORGET_TOKENS + [False] * expected
        # Each retain token at most once; several tokens may have one node.
        retain = Counter(nodes[N_FORGET_TOKENS:].tolist())
        assert retain.total() == expected
        assert retain <= Counter(tree.nodes_of([2, 3, 4]).tolist())
