"""Every method and variant with parameters that do something, and a small task for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lunar_tune.engine.activations import ActivationSource, PromptActivations
from lunar_tune.methods.contract import METHODS, Fit, Method, PreparedMethod, UnlearningTask
from lunar_tune.methods.gradient import GradientSettings
from lunar_tune.methods.lunar import LunarMethod, LunarSettings
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training import TRAINED
from lunar_tune.training.answer_loss import Pair
from lunar_tune.training.checkpoints import plain_weights

ENDED = 2
FORGET = ((1, 17, 40, 11), (1, 9, 8))
RETAIN = ((1, 60, 61, 62, 63, 64), (5, 6), (1, 70, 71, 72))
REFERENCE = ((1, 99, 98), (1, 90, 91, 92, 93))
FORGET_PAIRS = (Pair(FORGET[0], (50, 51, ENDED)), Pair(FORGET[1], (52, ENDED)))
RETAIN_PAIRS = (
    Pair(RETAIN[0], (53, 54, 55, ENDED)),
    Pair(RETAIN[1], (56, ENDED)),
    Pair(RETAIN[2], (57, 58, ENDED)),
)
REFUSALS = ((80, 81, 82, ENDED), (83, ENDED))

GRADIENT_METHODS = sorted({*METHODS} - {"lunar", "rmu"})
FITTED = {"layer": 1, "coefficient": 2.0, "learning_rate": 0.01}
EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("lunar", "adamw"): FITTED,
    ("lunar", "closed_form"): {"layer": 1, "coefficient": 2.0, "ridge": 1e-3},
    ("lunar", "lora"): FITTED,
    **{("rmu", trained): FITTED | {"coefficient": 5.0} for trained in TRAINED},
    **{
        (name, trained): {"learning_rate": 0.01} for name in GRADIENT_METHODS for trained in TRAINED
    },
}


def lunar(**settings: Any) -> LunarMethod:
    return LunarMethod(LunarSettings(**({"epochs": 2} | settings)))


def gradient(name: str, trained: str, **settings: Any) -> Method:
    fixed = GradientSettings(**({"trained": trained, "epochs": 2, "batch_size": 1} | settings))
    return METHODS[name](fixed)


def example(key: tuple[str, str], **settings: Any) -> Method:
    """Return the method of an example."""
    name, variant = key
    return lunar(solver=variant, **settings) if name == "lunar" else gradient(*key, **settings)


def task_on(model: LoadedModel, **changes: Any) -> UnlearningTask:
    """Return a task of two questions to forget and three to keep."""
    parts: dict[str, Any] = {
        "activations": PromptActivations(ActivationSource(model), [*FORGET, *RETAIN]),
        "forget_pairs": FORGET_PAIRS,
        "retain_pairs": RETAIN_PAIRS,
        "reference_prompts": REFERENCE,
        "refusals": REFUSALS,
    }
    return UnlearningTask(**(parts | changes))


def weights(model: LoadedModel) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by their names without an adapter, with what it adds."""
    named = {name: tensor.detach().clone() for name, tensor in plain_weights(model.model).items()}
    buffers = {name: b.clone() for name, b in model.model.named_buffers() if ".lora_" not in name}
    return named | buffers


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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


def assert_fails(
    prepared: PreparedMethod, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Check that a fit ends before what it is for."""
    with pytest.raises(error, match=message), unlearned(prepared, parameters, seed=0):
        pytest.fail("the body ran")
