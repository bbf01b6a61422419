"""Fits over rows that tokens share and in parts are those over all tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
@pytest.mark.parametrize(("n_nodes", "n_tokens"), [(9, 150), (5, 3)])
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
    other = adamw(inputs, ~is_forget, nodes=tokens, master_dtype=master)
    assert not torch.equal(shared.weight, other.weight)
    assert shared.losses == written.losses


@pytest.mark.parametrize("tokens", [5, 60])
@pytest.mark.parametrize("part", [1, 7, 59])
def test_a_ridge_solution_in_parts_and_of_any_format_is_that_in_float64_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, tokens: int, part: int
) -> None:
    """Which is numpy's: `test_lunar_solvers`."""
    inputs, is_forget = drawn(tokens, D_FF).bfloat16(), torch.arange(tokens) % 3 == 0
    before, whole = inputs.clone(), solve_ridge(inputs.double(), is_forget, ridge=1e-2)
    monkeypatch.setattr(solvers_module, "PART", part)
    solved = solve_ridge(inputs, is_forget, ridge=1e-2)
    assert solved.coefficients.dtype == torch.float64
    torch.testing.assert_close(solved.coefficients, whole.coefficients, rtol=1e-7, atol=1e-9)
    assert solved.error == pytest.approx(whole.error, rel=1e-7, abs=1e-12)
    missing = inputs.double() @ solved.coefficients - is_forget.double()
    assert solved.error == pytest.approx(float(missing.square().mean()), rel=1e-7)
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
