"""The contract battery, run over every method and variant of the registry, and LUNAR's options."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from lunar_tune.engine import prompt_activations as prompts_module
from lunar_tune.engine.prompt_activations import ActivationSource, PromptActivations
from lunar_tune.errors import InputError, TrialError
from lunar_tune.methods.contract import METHODS, Fit, Method, PreparedMethod, UnlearningTask
from lunar_tune.methods.gradient_fit import GradientSettings
from lunar_tune.methods.lunar import LunarMethod, LunarSettings
from lunar_tune.methods.lunar.method import PreparedLunar
from lunar_tune.models.device import DeviceMemory
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training import TRAINED
from lunar_tune.training.answer_loss import Pair
from lunar_tune.training.checkpoints import plain_weights

Load = Callable[..., LoadedModel]

FORGET = ((1, 17, 40, 11), (1, 9, 8))
RETAIN = ((1, 60, 61, 62, 63, 64), (5, 6), (1, 70, 71, 72))
REFERENCE = ((1, 99, 98), (1, 90, 91, 92, 93))
N_FORGET_TOKENS, N_RETAIN_TOKENS = 7, 12


ENDED = 2
FORGET_PAIRS = (Pair(FORGET[0], (50, 51, ENDED)), Pair(FORGET[1], (52, ENDED)))
RETAIN_PAIRS = (
    Pair(RETAIN[0], (53, 54, 55, ENDED)),
    Pair(RETAIN[1], (56, ENDED)),
    Pair(RETAIN[2], (57, 58, ENDED)),
)
REFUSALS = ((80, 81, 82, ENDED), (83, ENDED))


def lunar(**settings: Any) -> LunarMethod:
    return LunarMethod(LunarSettings(**({"epochs": 2} | settings)))


def gradient(name: str, trained: str, **settings: Any) -> Method:
    fixed = GradientSettings(**({"trained": trained, "epochs": 2, "batch_size": 1} | settings))
    return METHODS[name](fixed)


GRADIENT_METHODS = sorted({*METHODS} - {"lunar", "rmu"})


# What the battery needs to know of a method: how it is made, and parameters that do something.
EXAMPLES: dict[tuple[str, str], tuple[Callable[[], Method], dict[str, Any]]] = {
    ("lunar", "adamw"): (
        lambda: lunar(solver="adamw"),
        {"layer": 1, "coefficient": 2.0, "learning_rate": 0.01},
    ),
    ("lunar", "closed_form"): (
        lambda: lunar(solver="closed_form"),
        {"layer": 1, "coefficient": 2.0, "ridge": 1e-3},
    ),
    ("lunar", "lora"): (
        lambda: lunar(solver="lora"),
        {"layer": 1, "coefficient": 2.0, "learning_rate": 0.01},
    ),
    **{
        ("rmu", trained): (
            lambda trained=trained: gradient("rmu", trained),
            {"layer": 1, "coefficient": 5.0, "learning_rate": 0.01},
        )
        for trained in TRAINED
    },
    **{
        (name, trained): (
            lambda name=name, trained=trained: gradient(name, trained),
            {"learning_rate": 0.01},
        )
        for name in GRADIENT_METHODS
        for trained in TRAINED
    },
}
each_method = pytest.mark.parametrize("key", list(EXAMPLES), ids="-".join)


@pytest.fixture
def model(loaded: Load, unchanged: Callable[[Any], None]) -> LoadedModel:
    """Return a model whose weights must be the same after the test, bit for bit."""
    one = loaded("qwen2")
    unchanged(one.model)
    return one


def activations(model: LoadedModel) -> PromptActivations:
    return PromptActivations(ActivationSource(model), [*FORGET, *RETAIN])


def task_on(model: LoadedModel) -> UnlearningTask:
    return UnlearningTask(
        activations=activations(model),
        forget_pairs=FORGET_PAIRS,
        retain_pairs=RETAIN_PAIRS,
        reference_prompts=REFERENCE,
        refusals=REFUSALS,
    )


def weights(model: LoadedModel) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by their names without an adapter, with what it adds."""
    named = {name: tensor.detach().clone() for name, tensor in plain_weights(model.model).items()}
    buffers = {name: b.clone() for name, b in model.model.named_buffers() if ".lora_" not in name}
    return named | buffers


def hooks_of(model: LoadedModel) -> list[Any]:
    """Return what is called around forwards; transformers leaves some of its own for good."""
    return [
        hook
        for module in model.model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    ]


@contextmanager
def unlearned(prepared: PreparedMethod, parameters: dict[str, Any], *, seed: int) -> Iterator[Fit]:
    """Inside, the model is unlearned."""
    with prepared.unlearning(parameters, seed=seed) as fit:
        for _ in fit:
            pass
        fit.finish()
        yield fit


def weights_inside(
    prepared: PreparedMethod, model: LoadedModel, parameters: dict[str, Any], seed: int = 0
) -> dict[str, torch.Tensor]:
    with unlearned(prepared, parameters, seed=seed):
        return weights(model)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_method_is_known_whichever_module_is_imported_first() -> None:
    code = (
        "import lunar_tune.methods.lunar.method\n"
        "from lunar_tune.methods.contract import METHODS\n"
        "print(*METHODS)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(METHODS)


def test_every_variant_of_every_method_has_an_example_here() -> None:
    assert {(name, v) for name, kind in METHODS.items() for v in kind.variants} == set(EXAMPLES)


@each_method
def test_a_method_says_its_name_variant_and_parameters_and_can_be_pickled(
    key: tuple[str, str],
) -> None:
    make, parameters = EXAMPLES[key]
    method = pickle.loads(pickle.dumps(make()))
    assert (method.name, method.variant) == key
    assert set(method.parameters) == set(parameters)


@each_method
def test_the_model_is_unlearned_inside_and_what_it_was_after(
    model: LoadedModel, key: tuple[str, str]
) -> None:
    make, parameters = EXAMPLES[key]
    before = weights(model)
    prepared = make().prepare(task_on(model))
    assert same(weights(model), before)
    with unlearned(prepared, parameters, seed=0) as report:
        assert not same(weights(model), before)
        assert report.losses
        assert all(math.isfinite(value) for value in report.losses)
    assert same(weights(model), before)


@each_method
def test_the_model_is_what_it_was_when_the_body_raises(
    model: LoadedModel, key: tuple[str, str]
) -> None:
    make, parameters = EXAMPLES[key]
    before = weights(model)
    prepared = make().prepare(task_on(model))
    for kind in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(kind), unlearned(prepared, parameters, seed=0):
            raise kind
        assert same(weights(model), before)


@each_method
def test_a_trial_gives_the_same_whatever_was_tried_before(
    model: LoadedModel, key: tuple[str, str]
) -> None:
    make, parameters = EXAMPLES[key]
    other = parameters | {name: parameters[name] * 2 for name in parameters if name != "layer"}
    prepared = make().prepare(task_on(model))
    first = weights_inside(prepared, model, parameters)
    assert not same(weights_inside(prepared, model, other, seed=5), first)
    assert same(weights_inside(prepared, model, parameters), first)
    assert same(weights_inside(make().prepare(task_on(model)), model, parameters), first)


@each_method
def test_what_a_fit_changed_makes_the_unlearned_model_of_an_untouched_copy(
    model: LoadedModel, key: tuple[str, str]
) -> None:
    """The same logits, bit for bit where weights are edited; merging an adapter rounds."""
    make, parameters = EXAMPLES[key]
    untouched = copy.deepcopy(model.model)
    ids = torch.tensor([RETAIN[0]])
    with make().prepare(task_on(model)).unlearning(parameters, seed=0) as fit:
        for _ in fit:
            pass
        fit.finish()
        new = {name: tensor.clone() for name, tensor in fit.edit.weights().items()}
        with torch.inference_mode():
            expected = model.model(input_ids=ids).logits
    before = untouched(input_ids=ids).logits
    for name, weight in new.items():
        untouched.get_parameter(name).copy_(weight)
    said = untouched(input_ids=ids).logits
    assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)
    if fit.edit.merged:
        torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(said, expected)


@each_method
def test_a_method_that_promises_an_exact_adapter_has_its_factors(
    model: LoadedModel, key: tuple[str, str]
) -> None:
    """W₀ + scale · B · A, in float64, is the new weight but for rounding; ranks are as asked."""
    make, parameters = EXAMPLES[key]
    method, before = make(), weights(model)
    with method.prepare(task_on(model)).unlearning(parameters, seed=0) as fit:
        for _ in fit:
            pass
        fit.finish()
        assert (fit.edit.factors is not None) == (method.adapter == "exact")
        if fit.edit.factors is None:
            return
        factors, new = fit.edit.factors(), fit.edit.weights()
        assert {f"{name}.weight" for name in factors} == set(new)
        for name, one in factors.items():
            assert one.rank == (1 if key[1] == "closed_form" else 8)
            product = one.scale * one.second.double() @ one.first.double()
            summed = before[f"{name}.weight"].double() + product
            torch.testing.assert_close(new[f"{name}.weight"].double(), summed, rtol=1e-5, atol=1e-6)


@each_method
def test_a_fit_can_be_looked_at_between_epochs_ended_early_and_abandoned(
    model: LoadedModel, key: tuple[str, str]
) -> None:
    """After the last look the weights are those of an undisturbed fit: looking changes nothing."""
    make, parameters = EXAMPLES[key]
    before = weights(model)
    prepared = make().prepare(task_on(model))
    expected = weights_inside(prepared, model, parameters)
    ids = torch.tensor([FORGET[0]])
    with prepared.unlearning(parameters, seed=0) as fit:
        for epochs in fit:
            assert not model.model.training
            with fit.evaluating(), torch.inference_mode():
                assert bool(model.model(input_ids=ids).logits.isfinite().all())
            assert 1 <= epochs <= fit.n_epochs
        fit.finish()
        assert same(weights(model), expected)
    assert same(weights(model), before)
    with prepared.unlearning(parameters, seed=0) as fit:
        done = next(iter(fit), 0)
        fit.finish()
        assert len(fit.losses) >= done
    assert same(weights(model), before)
    with prepared.unlearning(parameters, seed=0) as fit:
        next(iter(fit), 0)
    assert same(weights(model), before)


@each_method
def test_the_base_model_comes_back_for_a_while_and_the_unlearned_one_after_it(
    model: LoadedModel, key: tuple[str, str]
) -> None:
    """Between epochs, after the last, several times, and when something goes wrong in between."""
    make, parameters = EXAMPLES[key]
    ids = torch.tensor([FORGET[0]])

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return model.model(input_ids=ids).logits.clone()

    before, untouched = weights(model), logits()
    prepared = make().prepare(task_on(model))
    expected = weights_inside(prepared, model, parameters)
    with prepared.unlearning(parameters, seed=0) as fit:
        for _ in fit:
            with fit.base_model():
                assert torch.equal(logits(), untouched)
        fit.finish()
        assert same(weights(model), expected)
        unlearned = logits()
        assert not torch.equal(unlearned, untouched)
        for _ in range(2):
            with fit.base_model():
                assert torch.equal(logits(), untouched)
            assert torch.equal(logits(), unlearned)
            assert same(weights(model), expected)
        for kind in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(kind), fit.base_model():
                raise kind
            assert torch.equal(logits(), unlearned)
            assert same(weights(model), expected)
    assert same(weights(model), before)
    assert torch.equal(logits(), untouched)
    with (
        pytest.raises(RuntimeError),
        prepared.unlearning(parameters, seed=0) as fit,
        fit.base_model(),
    ):
        raise RuntimeError
    assert same(weights(model), before)
    assert torch.equal(logits(), untouched)


@each_method
def test_the_model_is_left_as_it_was_in_every_other_respect_too(
    model: LoadedModel, key: tuple[str, str]
) -> None:
    """No adapter's module, gradient, hook or mode stays; torch draws on from where it was."""
    make, parameters = EXAMPLES[key]
    modules = [(name, type(module)) for name, module in model.model.named_modules()]
    hooks = hooks_of(model)
    state = torch.get_rng_state()
    weights_inside(make().prepare(task_on(model)), model, parameters)
    assert [(name, type(module)) for name, module in model.model.named_modules()] == modules
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.model.training
    for parameter in model.model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert hooks_of(model) == hooks


@each_method
def test_missing_and_unknown_parameters_are_refused_before_anything_is_done(
    model: LoadedModel, key: tuple[str, str]
) -> None:
    make, parameters = EXAMPLES[key]
    prepared = make().prepare(task_on(model))
    for name in parameters:
        rest = {other: value for other, value in parameters.items() if other != name}
        with (
            pytest.raises(InputError, match=f"missing: {name}; unknown: none"),
            unlearned(prepared, rest, seed=0),
        ):
            pytest.fail("the body ran")
        with (
            pytest.raises(InputError, match=f"missing: {name}; unknown: batch"),
            unlearned(prepared, rest | {"batch": 1}, seed=0),
        ):
            pytest.fail("the body ran")


@each_method
@pytest.mark.parametrize("value", [math.nan, math.inf, "much", None, [math.nan]])
def test_values_that_are_no_finite_numbers_are_refused(
    model: LoadedModel, key: tuple[str, str], value: object
) -> None:
    make, parameters = EXAMPLES[key]
    prepared = make().prepare(task_on(model))
    for name in parameters:
        with (
            pytest.raises(InputError, match=name),
            unlearned(prepared, parameters | {name: value}, seed=0),
        ):
            pytest.fail("the body ran")


# LUNAR


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
    own = {"adamw": {"learning_rate": 0.01}, "closed_form": {"ridge": 1e-3}}[solver]
    prepared = lunar(solver=solver).prepare(task_on(model))
    both = weights_inside(prepared, model, {"layer": [2, 0], "coefficient": [1.0, -3.0]} | own)
    losses = []
    for layer, coefficient in ((2, 1.0), (0, -3.0)):
        parameters = {"layer": layer, "coefficient": coefficient} | own
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        with unlearned(prepared, parameters, seed=0) as report:
            assert torch.equal(both[name], weights(model)[name])
            losses.append(report.losses)
    with unlearned(prepared, {"layer": [2, 0], "coefficient": [1.0, -3.0]} | own, seed=0) as two:
        assert two.losses == pytest.approx([sum(epoch) for epoch in zip(*losses, strict=True)])
    shared = weights_inside(prepared, model, {"layer": [2, 0], "coefficient": 1.0} | own)
    listed = weights_inside(prepared, model, {"layer": [2, 0], "coefficient": [1.0, 1.0]} | own)
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
    with (
        pytest.raises(InputError, match=message),
        unlearned(prepared, parameters, seed=0),
    ):
        pytest.fail("the body ran")


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
    own = {"adamw": {"learning_rate": 0.01}, "closed_form": {"ridge": 1e-3}}[solver]
    parameters = {"layer": 0, "coefficient": 1.0} | own
    prepared = lunar(solver=solver, retain_points=0.5).prepare(task_on(model))
    first = weights_inside(prepared, model, parameters, seed=1)
    assert not same(weights_inside(prepared, model, parameters, seed=2), first)
    assert same(weights_inside(prepared, model, parameters, seed=1), first)


def test_the_closed_form_fit_moves_the_forget_tokens_and_keeps_the_others(
    model: LoadedModel,
) -> None:
    """Fewer tokens (19) than features (48) and a small ridge: both targets are nearly reached.

    All but where prompts begin: the first token is the same in both sets, and so is its h.
    """
    prepared = lunar(solver="closed_form").prepare(task_on(model))
    assert isinstance(prepared, PreparedLunar)
    known = activations(model)
    h = known.reads(1).inputs[known.tree.nodes_of(range(5))].double()
    projection = model.model.model.layers[1].mlp.down_proj
    before = h @ projection.weight.double().T
    with unlearned(prepared, {"layer": 1, "coefficient": 2.0, "ridge": 1e-9}, seed=0):
        moved = h @ projection.weight.double().T - before
    expected = torch.zeros_like(moved)
    expected[:N_FORGET_TOKENS] = 2.0 * prepared.vectors[1]
    distinct = [token for token in range(19) if token not in (0, 4, 7, 15)]
    torch.testing.assert_close(moved[distinct], expected[distinct], rtol=0.02, atol=0.02)


def test_reads_are_dropped_when_they_no_longer_fit_and_come_back_the_same(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block's reads are 48 + 32 numbers of 4 bytes for each of 16 distinct prefixes.

    There is room for two blocks: what is held is no longer free. Reads get a millionth of what is
    free, so that the batches of a sweep have room always and round alike.
    """
    known = activations(model)
    assert known.tree.n_nodes == 16
    size = 16 * (48 + 32) * 4
    monkeypatch.setattr(prompts_module, "READS_SHARE", 1e-6)
    monkeypatch.setattr(
        DeviceMemory, "free_bytes", lambda _: (2 - len(known._reads)) * size * 10**6 + 10**9
    )
    first = known.reads(0).inputs.clone()
    for layer in (1, 2):
        known.reads(layer)
    assert set(known._reads) == {1, 2}
    assert torch.equal(known.reads(0).inputs, first)
    assert set(known._reads) == {2, 0}


def test_a_fit_that_diverges_is_a_failed_trial_and_leaves_the_model(model: LoadedModel) -> None:
    prepared = lunar().prepare(task_on(model))
    parameters = {"layer": 1, "coefficient": 1.0, "learning_rate": 1e30}
    with pytest.raises(TrialError), unlearned(prepared, parameters, seed=0):
        pytest.fail("the body ran")


def test_a_bfloat16_model_is_edited_in_its_own_format_and_restored(loaded: Load) -> None:
    original = loaded("llama")
    model = dataclasses.replace(original, model=copy.deepcopy(original.model).bfloat16())
    before = weights(model)
    for make, parameters in EXAMPLES.values():
        prepared = make().prepare(task_on(model))
        inside = weights_inside(prepared, model, parameters)
        with prepared.unlearning(parameters, seed=0) as fit:
            for _ in fit:
                with fit.base_model():
                    assert {p.dtype for p in model.model.parameters()} <= {
                        torch.bfloat16,
                        torch.float32,  # of an adapter, which is off
                    }
            fit.finish()
            assert same(weights(model), inside)
        assert {name: w.dtype for name, w in inside.items()} == {
            name: w.dtype for name, w in before.items()
        }
        assert not same(inside, before)
        assert same(weights(model), before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"solver": "sgd"}, "solver sgd: there are adamw, closed_form, lora"),
        ({"positions": "first"}, "positions first: there are all, last"),
        ({"retain_points": 0.0}, "retain_points 0.0"),
        ({"retain_points": math.nan}, "retain_points nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LunarSettings(**wrong)


def test_an_unknown_method_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InputError, match=r"unknown method 'lunr'. Did you mean 'lunar'\?"):
        METHODS["lunr"]
