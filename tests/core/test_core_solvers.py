"""The fits are what other code computes: numpy's least squares, a plain torch loop."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, mse_loss

from lunar_tune.errors import DivergenceError, InputError
from lunar_tune.methods.lunar import LunarSettings
from lunar_tune.methods.lunar.solvers import (
    Solution,
    Tokens,
    solve_adamw,
    solve_closed_form,
    solve_ridge,
)

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


def numpy_ridge(p: Tokens, ridge: float) -> np.ndarray:
    """Solve the ridge problem as least squares on stacked rows [H; sqrt(λ)I] → [1_forget; 0]."""
    h = p.inputs.double().numpy()
    strength = ridge * float(np.trace(h.T @ h)) / D_FF
    stacked = np.vstack([h, math.sqrt(strength) * np.eye(D_FF)])
    target = np.concatenate([p.is_forget.numpy().astype(float), np.zeros(D_FF)])
    return np.asarray(np.linalg.lstsq(stacked, target, rcond=None)[0])


def adamw(p: Tokens, *, learning_rate: float = 0.01, seed: int = 3, **fixed: object) -> Solution:
    settings = LunarSettings(**fixed)  # type: ignore[arg-type]
    return solve_adamw(p, learning_rate=learning_rate, settings=settings, seed=seed)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_tests_check_shapes_and_kinds_at_every_call(kind: torch.dtype) -> None:
    """Four tokens and a mask for five; whole numbers where real ones belong."""
    with pytest.raises(jaxtyping.TypeCheckError):
        solve_ridge(torch.ones(4, 3, dtype=kind), torch.ones(5).bool(), ridge=1.0)


# Closed form


@given(
    tokens=st.integers(1, 40),
    ridge=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 100.0]),
    repeated=st.integers(0, 10),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_ridge_coefficients_are_numpys_least_squares_with_few_and_with_many_tokens(
    tokens: int, ridge: float, repeated: int, seed: int
) -> None:
    p = problem(tokens=tokens, seed=seed, repeated=repeated)
    v = solve_ridge(p.inputs, p.is_forget, ridge=ridge).coefficients
    np.testing.assert_allclose(v.numpy(), numpy_ridge(p, ridge), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tokens", [D_FF - 1, D_FF, D_FF + 1])
def test_feature_space_and_token_space_give_the_same_coefficients(tokens: int) -> None:
    """Both formulas of the docstring, written out, on each side of where the code switches."""
    p = problem(tokens=tokens)
    h, one = p.inputs.double(), p.is_forget.double()
    strength = 1e-2 * float((h.T @ h).trace()) / D_FF
    primal = torch.linalg.solve(h.T @ h + strength * torch.eye(D_FF).double(), h.T @ one)
    dual = h.T @ torch.linalg.solve(h @ h.T + strength * torch.eye(tokens).double(), one)
    v = solve_ridge(p.inputs, p.is_forget, ridge=1e-2).coefficients
    torch.testing.assert_close(v, primal, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(v, dual, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tokens", [5, 60])
def test_the_closed_form_is_where_the_ridge_objectives_gradient_is_zero(tokens: int) -> None:
    p = problem(tokens=tokens)
    h, w0 = p.inputs.double(), p.weight.double()
    ridge = solve_ridge(p.inputs, p.is_forget, ridge=1e-3)
    solved = solve_closed_form(w0, p.shift.double(), ridge).weight
    targets = h @ w0.T + p.is_forget[:, None] * p.shift.double()
    strength = 1e-3 * h.square().sum() / D_FF

    def objective(w: Tensor) -> Tensor:
        return (h @ w.T - targets).square().sum() + strength * (w - w0).square().sum()

    w = solved.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(w), w)
    assert float(gradient.abs().max()) < 1e-9
    noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).double()
    assert objective(solved) < objective(solved + 1e-4 * noise)


def test_the_closed_form_edit_has_rank_one_and_is_linear_in_the_coefficient() -> None:
    p = problem()
    ridge = solve_ridge(p.inputs, p.is_forget, ridge=1e-2)
    w0 = p.weight.double()
    once, thrice = (solve_closed_form(w0, c * p.shift, ridge).weight - w0 for c in (1, 3))
    assert torch.linalg.matrix_rank(once, rtol=1e-10) == 1
    torch.testing.assert_close(thrice, 3 * once)


def test_a_zero_coefficient_leaves_the_matrix_bit_for_bit_in_closed_form() -> None:
    p = problem()
    ridge = solve_ridge(p.inputs, p.is_forget, ridge=1e-2)
    for dtype in (torch.float32, torch.bfloat16):
        w0 = p.weight.to(dtype)
        solution = solve_closed_form(w0, 0 * p.shift, ridge)
        assert torch.equal(solution.weight, w0)
        assert solution.losses == (0.0,)


def test_the_loss_of_the_closed_form_is_the_mean_squared_error_that_remains() -> None:
    p = problem()
    ridge = solve_ridge(p.inputs, p.is_forget, ridge=1e-2)
    solution = solve_closed_form(p.weight.double(), p.shift, ridge)
    h = p.inputs.double()
    targets = h @ p.weight.double().T + p.is_forget[:, None] * p.shift
    expected = mse_loss(h @ solution.weight.T, targets)
    assert solution.losses == pytest.approx((float(expected),), rel=1e-9)


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.nan, math.inf])
def test_a_ridge_that_is_not_positive_is_refused(ridge: float) -> None:
    p = problem()
    with pytest.raises(InputError, match=r"ridge .*a positive number"):
        solve_ridge(p.inputs, p.is_forget, ridge=ridge)


def test_inputs_that_are_all_zero_are_singular_not_nan() -> None:
    p = problem()
    with pytest.raises(DivergenceError, match="singular"):
        solve_ridge(0 * p.inputs, p.is_forget, ridge=1e-3)


def test_an_edit_too_large_for_the_number_format_is_a_divergence() -> None:
    p = problem()
    ridge = solve_ridge(p.inputs, p.is_forget, ridge=1e-3)
    with pytest.raises(DivergenceError, match="infinite"):
        solve_closed_form(p.weight.half(), 1e9 * p.shift, ridge)


# AdamW


def plain_loop(
    p: Tokens, *, rate: float, seed: int, epochs: int, decay: float, dtype: torch.dtype
) -> tuple[Tensor, list[float]]:
    """Train by autograd: in float32 and float64 the difference to W₀, in bfloat16 the matrix."""
    h, w0 = p.inputs.to(dtype), p.weight.to(dtype)
    targets = linear(h, w0)
    targets[p.is_forget] += p.shift.to(dtype)
    whole = dtype == torch.bfloat16
    trained = torch.nn.Parameter(w0.clone() if whole else torch.zeros_like(w0))
    optimizer = torch.optim.AdamW([trained], lr=rate, weight_decay=decay)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.9**epoch
        batch_losses = []
        for batch in torch.randperm(len(h), generator=generator).split(64):
            optimizer.zero_grad()
            loss = mse_loss(linear(h[batch], trained if whole else w0 + trained), targets[batch])
            loss.backward()
            optimizer.step()
            batch_losses.append(loss.item())
        losses.append(sum(batch_losses) / len(batch_losses))
    weight = trained.detach() if whole else w0 + trained.detach()
    return weight.to(p.weight.dtype), losses


@pytest.mark.parametrize("decay", [None, 0.0, 0.5])
@pytest.mark.parametrize("tokens", [40, 200])
def test_adamw_in_float32_is_a_plain_autograd_loop(tokens: int, decay: float | None) -> None:
    p = problem(tokens=tokens)
    solution = adamw(p, epochs=4, weight_decay=decay)
    weight, losses = plain_loop(
        p, rate=0.01, seed=3, epochs=4, decay=decay or 0.0, dtype=torch.float64
    )
    torch.testing.assert_close(solution.weight, weight, rtol=1e-4, atol=1e-5)
    assert solution.losses == pytest.approx(losses, rel=1e-5)


def test_adamw_in_bfloat16_is_a_plain_autograd_loop_on_the_bfloat16_matrix() -> None:
    """To rounding: fused and plain AdamW round at different places (measured: 2 to 5 %)."""
    p = problem()
    for rate in (1e-2, 1e-3):
        solution = adamw(p, learning_rate=rate, epochs=8, master_dtype="bfloat16")
        weight, losses = plain_loop(
            p, rate=rate, seed=3, epochs=8, decay=0.01, dtype=torch.bfloat16
        )
        moved = (weight - p.weight.bfloat16().float()).norm()
        assert (solution.weight - weight).norm() < 0.1 * moved
        assert solution.losses == pytest.approx(losses, rel=0.01)


def test_adamw_with_many_epochs_reaches_what_least_squares_reaches() -> None:
    p = problem()
    solution = adamw(p, learning_rate=0.05, epochs=60)
    targets = p.inputs @ p.weight.T + p.is_forget[:, None] * p.shift
    best = torch.linalg.lstsq(p.inputs, targets).solution
    reached = mse_loss(p.inputs @ solution.weight.T, targets)
    assert float(reached) == pytest.approx(float(mse_loss(p.inputs @ best, targets)), rel=0.02)


# A product of low rank


def plain_low_rank(
    p: Tokens, *, rate: float, seed: int, epochs: int, rank: int
) -> tuple[Tensor, list[float]]:
    """Train W₀ + B·A in float64 with torch's own AdamW and autograd."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.empty(rank, D_FF).normal_(std=0.01, generator=generator).double().requires_grad_()
    second = torch.zeros(D_MODEL, rank, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([first, second], lr=rate, weight_decay=0.0)
    h, w0 = p.inputs.double(), p.weight.double()
    targets = h @ w0.T + p.is_forget[:, None] * p.shift.double()
    order = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = rate * 0.9**epoch
        of_batches = []
        for batch in torch.randperm(len(h), generator=order).split(64):
            optimizer.zero_grad()
            loss = mse_loss(linear(h[batch], w0 + second @ first), targets[batch])
            loss.backward()
            optimizer.step()
            of_batches.append(loss.item())
        losses.append(sum(of_batches) / len(of_batches))
    return (w0 + second @ first).detach().float(), losses


@pytest.mark.parametrize("rank", [1, 4])
def test_a_low_rank_fit_is_a_plain_autograd_loop_on_two_factors(rank: int) -> None:
    p = problem()
    solution = adamw(p, solver="lora", rank=rank, epochs=4)
    weight, losses = plain_low_rank(p, rate=0.01, seed=3, epochs=4, rank=rank)
    torch.testing.assert_close(solution.weight, weight, rtol=1e-4, atol=1e-5)
    assert solution.losses == pytest.approx(losses, rel=1e-5)
    rest = torch.linalg.svdvals(solution.weight - p.weight)[rank:]
    assert float(rest.sum()) < 1e-5


def test_the_loss_curve_has_a_value_an_epoch_and_falls() -> None:
    losses = adamw(problem(), learning_rate=1e-3, epochs=6, batch_size=200).losses
    assert len(losses) == 6
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_retain_tokens_alone_leave_the_matrix_bit_for_bit_in_float32() -> None:
    p = problem()
    p.is_forget[:] = False
    assert torch.equal(adamw(p, epochs=2).weight, p.weight)


def test_the_same_seed_gives_the_same_fit_and_another_seed_another_order() -> None:
    p = problem()
    first, again, other = (adamw(p, seed=seed, epochs=2).weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_original_matrix_is_not_modified() -> None:
    for master in ("float32", "bfloat16"):
        for dtype in (torch.float32, torch.bfloat16):
            p = problem()
            p = dataclasses.replace(p, weight=p.weight.to(dtype))
            before = p.weight.clone()
            solution = adamw(p, epochs=1, master_dtype=master)
            assert torch.equal(p.weight, before)
            assert solution.weight.dtype == dtype


def test_float32_keeps_updates_that_a_bfloat16_master_loses() -> None:
    """At a learning rate of 1e-6 a step is below half a bfloat16 unit of weights near .2."""
    p = problem()
    p = dataclasses.replace(p, weight=torch.full_like(p.weight, 0.2).bfloat16().float())
    assert torch.equal(adamw(p, learning_rate=1e-6, master_dtype="bfloat16").weight, p.weight)
    assert not torch.equal(adamw(p, learning_rate=1e-6).weight, p.weight)


def test_weight_decay_is_none_in_float32_and_torchs_own_in_bfloat16_unless_given() -> None:
    torchs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).defaults["weight_decay"]
    assert LunarSettings().decay == 0.0
    assert LunarSettings(master_dtype="bfloat16").decay == torchs
    assert LunarSettings(master_dtype="bfloat16", weight_decay=0.0).decay == 0.0
    assert LunarSettings(weight_decay=0.3).decay == 0.3


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
def test_a_loss_that_leaves_the_numbers_is_a_divergence_that_names_the_epoch(master: str) -> None:
    with pytest.raises(DivergenceError, match="in epoch 2 of 3"):
        adamw(problem(tokens=60), learning_rate=1e30, epochs=3, master_dtype=master)


def test_a_weight_that_leaves_the_numbers_in_the_last_step_is_a_divergence() -> None:
    with pytest.raises(DivergenceError, match="infinite"):
        adamw(problem(tokens=60), learning_rate=1e39, epochs=1)


def test_inputs_that_are_not_numbers_are_a_divergence() -> None:
    p = problem()
    p.inputs[3, 4] = math.nan
    with pytest.raises(DivergenceError):
        adamw(p)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"master_dtype": "float16"}, "master_dtype float16: there are float32, bfloat16"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"weight_decay": math.nan}, "weight_decay nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LunarSettings(**wrong)  # type: ignore[arg-type]
