"""Each loss against a number derived by hand, and against a formula written in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.methods.ascent import kl_to_reference
from lunar_tune.methods.preference import dpo, npo, simnpo
from lunar_tune.methods.rmu import rmu_loss

LN2 = math.log(2)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_kl_to_the_reference_is_the_sum_over_the_vocabulary_and_the_mean_over_tokens() -> None:
    """Reference (1/2, 1/2) and model (1/4, 3/4): ½ ln 2 + ½ ln(2/3) = ½ ln(4/3).

    A second token on which both agree halves the mean. Logits may be shifted by any constant.
    """
    half, skew = [-LN2] * 2, [math.log(0.25) + 7, math.log(0.75) + 7]
    one = kl_to_reference(torch.tensor([half]), torch.tensor([skew]))
    assert float(one) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    two = kl_to_reference(torch.tensor([half, half]), torch.tensor([skew, half]))
    assert float(two) == pytest.approx(0.25 * math.log(4 / 3), abs=1e-6)


def test_rmu_is_the_mean_square_to_the_control_and_alpha_times_that_to_the_original() -> None:
    """Forget (1, 3) to control (1, 1): 4/2 = 2. Keep (0, 2) for (0, 0): 4/2 = 2, times α = 10."""
    forget, kept, was = (torch.tensor([row]) for row in ((1.0, 3.0), (0.0, 2.0), (0.0, 0.0)))
    value = rmu_loss(forget, tensor(1.0, 1.0), kept, was, alpha=10.0)
    assert float(value) == pytest.approx(22.0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 6),
    beta=st.floats(0.01, 2.0),
    gamma=st.floats(0.0, 2.0),
)
@settings(max_examples=40, deadline=None)
def test_the_preference_losses_are_their_formulas_in_double_precision(
    seed: int, n: int, beta: float, gamma: float
) -> None:
    draw = np.random.default_rng(seed)
    win, lose, ref_win, ref_lose = (-draw.uniform(0.1, 20, n) for _ in range(4))
    lengths = draw.integers(1, 9, n).astype(float)
    of = [torch.tensor(x) for x in (win, lose, ref_win, ref_lose, lengths)]
    expected = -np.log(sigmoid(beta * ((win - ref_win) - (lose - ref_lose)))).mean()
    assert float(dpo(*of[:4], beta=beta)) == pytest.approx(expected)
    expected = 2 / beta * np.log(1 + np.exp(beta * (lose - ref_lose))).mean()
    assert float(npo(of[1], of[3], beta=beta)) == pytest.approx(expected)
    expected = -2 / beta * np.log(sigmoid(-beta / lengths * lose - gamma)).mean()
    assert float(simnpo(of[1], of[4], beta=beta, gamma=gamma)) == pytest.approx(expected)
