"""Methods as options configure them: types, what contradicts, what means nothing, what is fixed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.methods.contract import METHODS, configure_method
from lunar_tune.methods.gradient import GradientMethod
from lunar_tune.methods.gradient_fit import GradientSettings
from lunar_tune.methods.lunar import LunarMethod, LunarSettings
from lunar_tune.trial.assemble import configured


def lunar_of(**given: Any) -> tuple[LunarSettings, dict[str, Any]]:
    method, fixed = configure_method("lunar", **given)
    assert isinstance(method, LunarMethod)
    return method.settings, fixed


def test_settings_configure_the_method_and_parameters_stay_fixed() -> None:
    assert lunar_of() == (LunarSettings(), {}), "nothing given is the published method"
    fixed = {"epochs": 2, "layer": [1, 2], "weight_decay": 0, "learning_rate": 0.1}
    settings, parameters = lunar_of(fixed=fixed)
    assert settings == LunarSettings(epochs=2, weight_decay=0.0)
    assert type(settings.weight_decay) is float
    assert parameters == {"layer": [1, 2], "learning_rate": 0.1}
    assert len(fixed) == 4, "what was given is left as it was"


def test_a_gradient_method_takes_its_own_settings() -> None:
    fixed = {"trained": "full", "beta": None, "epochs": 3.0, "checkpointing": True}
    method, parameters = configure_method("npo", fixed=fixed)
    assert isinstance(method, GradientMethod)
    assert (method.name, method.variant, parameters) == ("npo", "full", {})
    assert method.settings == GradientSettings(trained="full", epochs=3, checkpointing=True)


@pytest.mark.parametrize("name", METHODS)
def test_each_variant_that_is_listed_can_be_had_and_the_first_is_the_default(name: str) -> None:
    entry = METHODS[name]
    made = [configure_method(name, fixed={entry.variant_setting: one})[0] for one in entry.variants]
    assert tuple(method.variant for method in made) == entry.variants
    assert configure_method(name)[0].variant == entry.variants[0]


@pytest.mark.parametrize(
    ("name", "solver", "fixed", "message"),
    [
        ("lunar", "lora", {"solver": "adamw"}, "--solver lora contradicts --fix solver=adamw."),
        ("ga", "lora", {}, "--solver lora has no meaning with --method ga."),
        ("lunar", "sgd", {}, "solver sgd: there are adamw, closed_form, lora."),
        # The default, but said.
        ("lunar", "closed_form", {"epochs": 20}, "epochs has no meaning with --solver closed_form"),
        ("lunar", "lora", {"master_dtype": "bfloat16"}, "master_dtype: lora trains in float32."),
        ("lunar", None, {"epochs": [1, 2]}, "epochs [1, 2]: a whole number is needed."),
        ("lunar", None, {"batch_size": 0}, "batch_size 0: at least 1."),
        ("lunar", None, {"weight_decay": math.nan}, "weight_decay nan: a finite number."),
        ("lunar", None, {"positions": "first"}, "positions first: there are all, last."),
        ("ga", None, {"checkpointing": 1}, "checkpointing 1: true or false is needed."),
        ("lunr", None, {}, "unknown method 'lunr'. Did you mean 'lunar'?"),
        ("lunar", "closed_form", {"learning_rate": 1}, "--fix learning_rate: --method lunar (clo"),
    ],
)
def test_what_means_nothing_is_refused(
    name: str, solver: str | None, fixed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        configure_method(name, solver=solver, fixed=fixed)
    assert str(raised.value).startswith(message)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as raised:
        configure_method("ga", solver="lora", fixed={"epochs": "many", "layer": 1})
    assert len(raised.value.messages) == 3
    with pytest.raises(InputError) as raised:
        GradientSettings(trained="some", epochs=0, dropout=1.0, steering_alpha=-1.0)
    assert len(raised.value.messages) == 4


def test_options_name_the_method_and_fix_by_text() -> None:
    options = RunOptions(solver="lora", fix=("rank=4", "layer=1,2", "retain-points=none"))
    method, parameters = configured(options)
    assert isinstance(method, LunarMethod)
    assert method.settings == LunarSettings(solver="lora", rank=4)
    assert parameters == {"layer": [1, 2]}
