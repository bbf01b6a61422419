"""Fits over rows that tokens share and in parts are those over all tokens at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lunar_tune.methods.lunar import LunarSettings
from lunar_tune.methods.lunar import solvers as solvers_module
from lunar_tune.methods.lunar.solvers import (
    Solution,
    Tokens,
    solve_adamw,
    solve_closed_form,
    solve_ridge,
)

D_MODEL, D_FF = 7, 12


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def adamw(
    inputs: Tensor, is_forget: Tensor, *, nodes: Tensor | None = None, **fixed: Any
) -> Solution:
    """Fit; the rows of `inputs` are the tokens unless nodes are given."""
    tokens = Tokens(
        weight=drawn(D_MODEL, D_FF, seed=1),
        inputs=inputs,
        nodes=torch.arange(len(inputs)) if nodes is None else nodes,
        is_forget=is_forget,
        shift=drawn(D_MODEL, seed=2),
    )
    settings = LunarSettings(epochs=3, **fixed)
    return solve_adamw(tokens, learning_rate=0.01, settings=settings, seed=4)


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_nodes", "n_tokens"), [(9, 150), (5, 3), (1, 70)])
def test_adamw_on_rows_that_tokens_share_is_adamw_on_the_rows_written_out(
    master: str, dtype: torch.dtype, n_nodes: int, n_tokens: int
) -> None:
    """Some rows are read by many tokens, forget and retain ones alike, and some by none."""
    inputs = drawn(n_nodes, D_FF).to(dtype)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, n_nodes, (n_tokens,), generator=generator)
    is_forget = torch.rand(n_tokens, generator=generator) < 0.3
    shared = adamw(inputs, is_forget, nodes=tokens, master_dtype=master)
    written = adamw(inputs[tokens], is_forget, master_dtype=master)
    assert torch.equal(shared.weight, written.weight)
    assert shared.losses == written.losses


def test_a_token_is_moved_by_what_is_said_of_it_and_not_of_its_row() -> None:
    inputs, is_forget = drawn(30, D_FF), torch.arange(30) < 8
    first = adamw(inputs, is_forget, batch_size=16)
    turned = adamw(inputs, is_forget, batch_size=16, nodes=torch.arange(30).flip(0))
    assert not torch.equal(first.weight, turned.weight)


@given(
    tokens=st.integers(1, 40),
    part=st.integers(1, 45),
    ridge=st.sampled_from([1e-4, 1e-2, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_the_ridge_solution_in_parts_is_numpys_in_float64(
    tokens: int, part: int, ridge: float, dtype: torch.dtype
) -> None:
    """By the normal equations, with fewer tokens than features and with more."""
    inputs = drawn(tokens, D_FF).to(dtype)
    before, is_forget = inputs.clone(), torch.arange(tokens) % 3 == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers_module, "PART", part)
        solved = solve_ridge(inputs, is_forget, ridge=ridge)
    h, one = inputs.double().numpy(), is_forget.double().numpy()
    gram = h.T @ h
    v = np.linalg.solve(gram + ridge * np.trace(gram) / D_FF * np.eye(D_FF), h.T @ one)
    assert solved.coefficients.dtype == torch.float64
    np.testing.assert_allclose(solved.coefficients.numpy(), v, rtol=1e-7, atol=1e-9)
    assert solved.error == pytest.approx(np.mean((h @ v - one) ** 2), rel=1e-7, abs=1e-12)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("tokens", [5, 60])
def test_one_solution_serves_every_shift_and_its_loss_is_what_remains(tokens: int) -> None:
    """Against targets and outputs written out: W₀h + 1_forget·shift, and the fitted W's."""
    inputs = drawn(tokens, D_FF)
    is_forget = torch.arange(tokens) % 4 == 0
    weight = drawn(D_MODEL, D_FF, seed=1).double()
    solved = solve_ridge(inputs, is_forget, ridge=1e-2)
    for coefficient in (-3.0, 0.5, 20.0):
        shift = coefficient * drawn(D_MODEL, seed=2).double()
        solution = solve_closed_form(weight, shift, solved)
        h = inputs.double()
        targets = h @ weight.T + is_forget[:, None] * shift
        remains = (h @ solution.weight.T - targets).square().mean()
        assert solution.losses == pytest.approx((float(remains),), rel=1e-8)
