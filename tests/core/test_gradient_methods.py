"""Gradient methods against loops written out, with full logits and a second model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_examples import (
    FORGET_PAIRS,
    GRADIENT_METHODS,
    REFUSALS,
    RETAIN_PAIRS,
    assert_fails,
    gradient,
    same,
    task_on,
    unlearned,
    weights,
    weights_inside,
)
from torch.nn.functional import kl_div, log_softmax

from lunar_tune.errors import InputError, TrialError
from lunar_tune.methods.losses import GradientAscent, dpo, npo, simnpo
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training import TRAINED
from lunar_tune.training.answer_loss import Pair

Load = Callable[..., LoadedModel]
TWO_KEPT = RETAIN_PAIRS[:2]
RATE = {"learning_rate": 0.01}


def answer_logits(model: Any, pair: Pair) -> Any:
    """Return the logits of an answer's places from a forward of one unpadded row."""
    row = torch.tensor([[*pair.prompt, *pair.answer]])
    return model(input_ids=row, use_cache=False).logits[0, len(pair.prompt) - 1 : -1]


def plain_log_probs(model: Any, pair: Pair) -> torch.Tensor:
    said = log_softmax(answer_logits(model, pair), dim=-1)
    return said[torch.arange(len(pair.answer)), torch.tensor(pair.answer)]


def sums(model: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    return torch.stack([plain_log_probs(model, pair).sum() for pair in pairs])


def plain_loss(name: str, model: Any, reference: Any) -> torch.Tensor:
    """Return a method's loss on both questions to forget, from single rows and a second model."""
    said = torch.cat([plain_log_probs(model, pair) for pair in FORGET_PAIRS])
    refused = [Pair(p.prompt, r) for p, r in zip(FORGET_PAIRS, REFUSALS, strict=True)]
    with torch.no_grad():
        was, was_refused = sums(reference, FORGET_PAIRS), sums(reference, refused)
        before = torch.cat([answer_logits(reference, pair) for pair in TWO_KEPT])
    now = torch.cat([answer_logits(model, pair) for pair in TWO_KEPT])
    if name == "ga":
        return said.mean()
    if name == "gd":
        return said.mean() - torch.cat([plain_log_probs(model, p) for p in TWO_KEPT]).mean()
    if name == "ukl":
        return said.mean() + kl_div(
            log_softmax(now, -1), log_softmax(before, -1), log_target=True, reduction="batchmean"
        )
    if name == "dpo":
        return dpo(sums(model, refused), sums(model, FORGET_PAIRS), was_refused, was, beta=0.1)
    if name == "npo":
        return npo(sums(model, FORGET_PAIRS), was, beta=0.1)
    lengths = torch.tensor([float(len(pair.answer)) for pair in FORGET_PAIRS])
    return simnpo(sums(model, FORGET_PAIRS), lengths, beta=2.5, gamma=0.0)


@given(seed=st.integers(0, 1000), beta=st.floats(0.01, 2.0), gamma=st.floats(0.0, 2.0))
@settings(max_examples=40, deadline=None)
def test_preference_losses_are_their_formulas(seed: int, beta: float, gamma: float) -> None:
    draw = np.random.default_rng(seed)
    win, lose, ref_win, ref_lose = (-draw.uniform(0.1, 20, 1 + seed % 6) for _ in range(4))
    lengths = draw.integers(1, 9, len(win)).astype(float)
    of = [torch.tensor(x) for x in (win, lose, ref_win, ref_lose, lengths)]
    expected = np.log1p(np.exp(-beta * ((win - ref_win) - (lose - ref_lose)))).mean()
    assert float(dpo(*of[:4], beta=beta)) == pytest.approx(expected)
    expected = 2 / beta * np.log1p(np.exp(beta * (lose - ref_lose))).mean()
    assert float(npo(of[1], of[3], beta=beta)) == pytest.approx(expected)
    expected = 2 / beta * np.log1p(np.exp(beta / lengths * lose + gamma)).mean()
    assert float(simnpo(of[1], of[4], beta=beta, gamma=gamma)) == pytest.approx(expected)


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_a_fit_of_all_weights_is_adamw_on_the_loss_written_out(loaded: Load, name: str) -> None:
    """All pairs in each step; the rate falls, biases and norms are not decayed, the norm is cut."""
    model = loaded("llama")
    rate, epochs, decay = 0.003, 3, 0.01
    by_hand = copy.deepcopy(model.model).requires_grad_(requires_grad=True)
    optimizer = torch.optim.AdamW(
        {"params": [p], "weight_decay": decay if p.ndim >= 2 else 0.0} for p in by_hand.parameters()
    )
    expected = []
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - epoch / epochs)
        optimizer.zero_grad()
        loss = plain_loss(name, by_hand, model.model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        expected.append(float(loss.detach()))
    method = gradient(name, "full", epochs=epochs, batch_size=2)
    prepared = method.prepare(task_on(model, retain_pairs=TWO_KEPT))
    with unlearned(prepared, {"learning_rate": rate}, seed=0) as report:
        assert report.losses == pytest.approx(expected, rel=1e-3, abs=1e-4)
        for label, hand in by_hand.named_parameters():
            now = model.model.get_parameter(label)
            torch.testing.assert_close(now, hand.detach(), rtol=1e-3, atol=2e-4, msg=label)


@pytest.mark.parametrize(
    ("name", "trained", "weight"),
    [*((one, "lora", 0.0) for one in GRADIENT_METHODS), ("npo", "lora", 3.0), ("npo", "full", 3.0)],
)
def test_the_first_loss_is_the_base_models(
    model: LoadedModel, name: str, trained: str, weight: float
) -> None:
    """An adapter's B is zero at first; a retain weight adds the usual loss on answers to keep."""
    with torch.no_grad():
        kept = torch.cat([plain_log_probs(model.model, pair) for pair in TWO_KEPT]).mean()
        expected = float(plain_loss(name, model.model, model.model) - weight * kept)
    own = {"retain_weight": weight} if weight else {}
    method = gradient(name, trained, epochs=1, batch_size=2, dropout=0.0, **own)
    with unlearned(method.prepare(task_on(model, retain_pairs=TWO_KEPT)), RATE, seed=0) as fit:
        assert fit.losses[0] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("trained", TRAINED)
def test_gradient_checkpointing_changes_nothing(model: LoadedModel, trained: str) -> None:
    losses, inside = [], []
    for checkpointing in (False, True):
        method = gradient("gd", trained, dropout=0.0, checkpointing=checkpointing)
        with unlearned(method.prepare(task_on(model)), RATE, seed=0) as report:
            losses.append(report.losses)
            inside.append(weights(model))
        assert not model.model.is_gradient_checkpointing
    assert losses[0] == losses[1]
    assert same(*inside)


def test_rmu_starts_from_the_distance_to_a_random_direction(model: LoadedModel) -> None:
    """The control is c median norms long; three matrices are trained, of the first block one."""
    outputs: list[torch.Tensor] = []
    block = model.model.model.layers[2]
    with block.register_forward_hook(lambda _m, _a, x: outputs.append(x[0])), torch.no_grad():
        for pair in FORGET_PAIRS:
            answer_logits(model.model, pair)
    x = torch.cat(outputs)
    drawn = torch.rand(32, generator=torch.Generator().manual_seed(7))
    control = 3.0 * x.norm(dim=1).median() * drawn / drawn.norm()
    before = weights(model)
    prepared = gradient("rmu", "full", epochs=1, batch_size=2).prepare(task_on(model))
    for layer, blocks in ((0, (0,)), (2, (0, 1, 2))):
        parameters = {"layer": layer, "coefficient": 3.0, "learning_rate": 0.01}
        with unlearned(prepared, parameters, seed=7) as fit:
            now = weights(model)
        changed = {name for name in now if not torch.equal(now[name], before[name])}
        assert changed == {f"model.layers.{block}.mlp.down_proj.weight" for block in blocks}
    assert fit.losses[0] == pytest.approx(float((x - control).square().mean()), rel=1e-4)


@pytest.mark.parametrize("trained", TRAINED)
def test_a_fit_that_runs_out_of_memory_or_diverges_is_a_failed_trial(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    prepared = gradient("ga", trained, epochs=4).prepare(task_on(model))
    assert_fails(prepared, {"learning_rate": 1e38}, TrialError, "learning rate")
    no_memory = Mock(side_effect=torch.OutOfMemoryError("no memory left"))
    monkeypatch.setattr(GradientAscent, "loss", no_memory)
    other = "rank below 8" if trained == "lora" else "trained=lora"
    told = f"out of memory while training: use --fix checkpointing=true, or {other}$"
    assert_fails(prepared, RATE, TrialError, told)


def test_what_a_loss_needs_and_is_not_there_is_said_before_anything(model: LoadedModel) -> None:
    for name, lacks in (("gd", "retain_pairs"), ("rmu", "retain_pairs"), ("dpo", "refusals")):
        needed = "--refusals" if lacks == "refusals" else "answers to keep"
        with pytest.raises(InputError, match=f"--method {name} needs {needed}"):
            gradient(name, "lora").prepare(task_on(model, **{lacks: ()}))


def test_a_trial_may_set_what_is_searchable_and_nothing_else(model: LoadedModel) -> None:
    prepared = gradient("npo", "lora").prepare(task_on(model))
    plain = weights_inside(prepared, model, RATE)
    assert not same(weights_inside(prepared, model, RATE | {"rank": 2.0, "epochs": 1.0}), plain)
    assert_fails(prepared, RATE | {"rank": 1.5}, InputError, "rank 1.5: a whole number")
    assert_fails(prepared, RATE | {"beta": 0.0}, InputError, "beta 0.0: must be more than 0")
    assert_fails(prepared, RATE | {"checkpointing": 1}, InputError, "unknown: checkpointing")
