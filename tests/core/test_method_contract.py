"""The contract battery, run over every method and variant; how options configure methods."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from method_examples import (
    EXAMPLES,
    FORGET,
    assert_fails,
    example,
    same,
    task_on,
    unlearned,
    weights,
    weights_inside,
)

from lunar_tune.errors import InputError
from lunar_tune.methods.contract import METHODS, Fit, Method, PreparedMethod, configure_method
from lunar_tune.methods.gradient import GradientSettings
from lunar_tune.methods.lunar import LunarSettings
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]


class Case:
    """A method prepared for a model, and what one undisturbed fit of it made."""

    def __init__(self, key: tuple[str, str], model: LoadedModel) -> None:
        self.method: Method = example(key)
        self.parameters = EXAMPLES[key]
        self.model = model
        self.before, self.state = weights(model), state_of(model)
        self.base_logits = self.logits()
        self.prepared: PreparedMethod = self.method.prepare(task_on(model))
        self.assert_restored()
        with unlearned(self.prepared, self.parameters, seed=0) as fit:
            self.losses, self.merged = fit.losses, fit.edit.merged
            self.inside, self.unlearned_logits = weights(model), self.logits()
            self.new = {name: tensor.clone() for name, tensor in fit.edit.weights().items()}
            self.factors = fit.edit.factors() if fit.edit.factors is not None else None
        self.assert_restored()

    def logits(self, model: Any = None) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = (model or self.model.model)(torch.tensor([FORGET[0]])).logits
        return logits.clone()

    def fit(self) -> Any:
        return self.prepared.unlearning(self.parameters, seed=0)

    def assert_restored(self) -> None:
        assert same(weights(self.model), self.before)
        assert state_of(self.model) == self.state
        assert torch.equal(self.logits(), self.base_logits)

    def assert_unlearned(self) -> None:
        assert same(weights(self.model), self.inside)
        assert torch.equal(self.logits(), self.unlearned_logits)


def state_of(model: LoadedModel) -> list[Any]:
    """Return all but the weights that a fit might leave changed, torch's draws among it."""
    modules = list(model.model.named_modules())
    hooks = [[*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for _, m in modules]
    modes = [(name, type(module), module.training) for name, module in modules]
    parameters = [(p.grad, p.requires_grad) for p in model.model.parameters()]
    return [hooks, modes, parameters, torch.get_rng_state().tolist()]


@pytest.fixture(scope="module", params=list(EXAMPLES), ids="-".join)
def case(request: pytest.FixtureRequest, loaded: Load) -> Case:
    return Case(request.param, loaded("qwen2", num_hidden_layers=2))


def test_every_variant_says_its_name_and_parameters_and_can_be_pickled() -> None:
    assert {(name, v) for name, kind in METHODS.items() for v in kind.variants} == set(EXAMPLES)
    for key, parameters in EXAMPLES.items():
        method = pickle.loads(pickle.dumps(example(key)))
        assert (method.name, method.variant) == key
        assert set(method.parameters) == set(parameters)


def test_the_model_is_unlearned_inside_by_finite_losses_and_what_is_told(case: Case) -> None:
    assert not same(case.inside, case.before)
    assert not torch.allclose(case.unlearned_logits, case.base_logits, rtol=1e-3, atol=1e-3)
    assert case.losses
    assert all(math.isfinite(value) for value in case.losses)
    # On a copy: the same, bit for bit where weights are edited; merging an adapter rounds.
    copied: Any = copy.deepcopy(case.model.model)
    for name, weight in case.new.items():
        copied.get_parameter(name).copy_(weight)
    if case.merged:
        torch.testing.assert_close(case.logits(copied), case.unlearned_logits, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(case.logits(copied), case.unlearned_logits)


def test_a_method_that_promises_an_exact_adapter_has_its_factors(case: Case) -> None:
    """W₀ + scale · B · A, in float64, is the new weight but for rounding; ranks are as asked."""
    assert (case.factors is not None) == (case.method.adapter == "exact")
    if case.factors is None:
        return
    assert {f"{name}.weight" for name in case.factors} == set(case.new)
    for name, one in case.factors.items():
        assert one.rank == (1 if case.method.variant == "closed_form" else 8)
        product = one.scale * one.second.double() @ one.first.double()
        summed = case.before[f"{name}.weight"].double() + product
        found = case.new[f"{name}.weight"].double()
        torch.testing.assert_close(found, summed, rtol=1e-5, atol=1e-6)


def test_a_trial_gives_the_same_whatever_was_tried_before(case: Case) -> None:
    other = {n: value * 2 for n, value in case.parameters.items() if n != "layer"}
    changed = weights_inside(case.prepared, case.model, case.parameters | other, seed=5)
    assert not same(changed, case.inside)
    prepared_again = case.method.prepare(task_on(case.model))
    assert same(weights_inside(prepared_again, case.model, case.parameters), case.inside)
    with case.fit() as fit:
        for epochs in fit:
            assert 1 <= epochs <= fit.n_epochs
            assert not case.model.model.training
            with fit.evaluating():
                assert bool(case.logits().isfinite().all())
            with fit.base_model():
                assert torch.equal(case.logits(), case.base_logits)
        fit.finish()
        case.assert_unlearned()
    case.assert_restored()


def test_the_model_is_restored_however_a_fit_or_a_look_at_the_base_model_ends(case: Case) -> None:
    def end_early(fit: Fit) -> None:
        next(iter(fit), 0)
        fit.finish()

    def interrupt(fit: Fit) -> None:
        for _ in fit:
            pass
        fit.finish()
        for kind in (RuntimeError, KeyboardInterrupt):
            with suppress(kind), fit.base_model():
                assert torch.equal(case.logits(), case.base_logits)
                raise kind
            case.assert_unlearned()
        raise KeyboardInterrupt

    def interrupt_base_model(fit: Fit) -> None:
        with fit.base_model():
            raise KeyboardInterrupt

    for body in (lambda fit: next(iter(fit), 0), end_early, interrupt, interrupt_base_model):
        with suppress(KeyboardInterrupt), case.fit() as fit:
            body(fit)
        case.assert_restored()


def test_wrong_parameters_are_refused_before_anything_is_done(case: Case) -> None:
    for name in case.parameters:
        rest = {other: value for other, value in case.parameters.items() if other != name}
        missing = f"missing: {name}; unknown:"
        assert_fails(case.prepared, rest, InputError, f"{missing} none")
        assert_fails(case.prepared, rest | {"batch": 1}, InputError, f"{missing} batch")
        for value in (math.nan, "much", None, [math.nan]):
            assert_fails(case.prepared, rest | {name: value}, InputError, name)
    case.assert_restored()


@pytest.mark.parametrize("key", list(EXAMPLES), ids="-".join)
def test_a_bfloat16_model_keeps_its_format(loaded: Load, key: tuple[str, str]) -> None:
    original = loaded("qwen2", num_hidden_layers=2)
    model = dataclasses.replace(original, model=copy.deepcopy(original.model).bfloat16())
    before = weights(model)
    prepared = example(key, epochs=1).prepare(task_on(model))
    with prepared.unlearning(EXAMPLES[key], seed=0) as fit:
        for _ in fit:
            with fit.base_model():
                kinds = {p.dtype for p in model.model.parameters()}
                assert kinds <= {torch.bfloat16, torch.float32}  # of an adapter, which is off
        fit.finish()
        inside = weights(model)
        assert [inside[name].dtype for name in before] == [w.dtype for w in before.values()]
        assert not same(inside, before)
    assert same(weights(model), before)


def test_settings_configure_the_method_and_parameters_stay_fixed() -> None:
    method, parameters = configure_method("lunar")
    assert (method.settings, parameters) == (LunarSettings(), {}), "the published method"
    fixed = {"epochs": 2, "layer": [1, 2], "weight_decay": 0, "learning_rate": 0.1}
    method, parameters = configure_method("lunar", fixed=fixed)
    assert method.settings == LunarSettings(epochs=2, weight_decay=0.0)
    assert type(method.settings.weight_decay) is float
    assert parameters == {"layer": [1, 2], "learning_rate": 0.1}
    fixed = {"trained": "full", "beta": None, "epochs": 3.0, "checkpointing": True}
    method, parameters = configure_method("npo", fixed=fixed)
    assert (method.name, method.variant, parameters) == ("npo", "full", {})
    assert method.settings == GradientSettings(trained="full", epochs=3, checkpointing=True)


def test_what_means_nothing_is_refused() -> None:
    for name, solver, fixed, message in (
        ("lunar", "lora", {"solver": "adamw"}, "--solver lora contradicts --fix solver=adamw."),
        ("ga", "lora", {}, "--solver lora has no meaning with --method ga."),
        ("lunar", "sgd", {}, "solver sgd: must be one of adamw, closed_form, lora."),
        # The default, but said.
        ("lunar", "closed_form", {"epochs": 20}, "epochs has no meaning with --solver closed_form"),
        (
            "lunar",
            "lora",
            {"master_dtype": "bfloat16"},
            "master_dtype: must be float32 with solver lora.",
        ),
        ("lunar", None, {"epochs": [1, 2]}, "epochs [1, 2]: a whole number is needed."),
        ("lunar", None, {"batch_size": 0}, "batch_size 0: must be at least 1."),
        ("lunar", None, {"weight_decay": math.nan}, "weight_decay nan: must be a finite number."),
        ("lunar", None, {"positions": "first"}, "positions first: must be one of all, last."),
        ("ga", None, {"checkpointing": 1}, "checkpointing 1: true or false is needed."),
        ("lunr", None, {}, "unknown method 'lunr'. Did you mean 'lunar'?"),
        ("lunar", "closed_form", {"learning_rate": 1}, "--fix learning_rate: --method lunar (clo"),
    ):
        with pytest.raises(InputError) as raised:
            configure_method(name, solver=solver, fixed=fixed)
        assert str(raised.value).startswith(message)
    with pytest.raises(InputError) as raised:
        configure_method("ga", solver="lora", fixed={"epochs": "many", "layer": 1})
    assert len(raised.value.messages) == 3
