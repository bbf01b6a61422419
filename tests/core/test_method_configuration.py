"""Methods as options configure them: types, what contradicts, what means nothing, what is fixed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.methods.contract import METHODS, configure_method
from lunar_tune.methods.gradient import GradientMethod, GradientSettings
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


@pytest.mark.parametrize("solver", [{}, {"solver": "lora"}])
@pytest.mark.parametrize("fixed", [{}, {"fixed": {"solver": "lora"}}])
def test_a_solver_may_be_said_either_way_or_both(
    solver: dict[str, Any], fixed: dict[str, Any]
) -> None:
    expected = "lora" if solver or fixed else "adamw"
    assert lunar_of(**solver, **fixed) == (LunarSettings(solver=expected), {})


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
        ("lunar", "closed_form", {"rank": 4}, "rank has no meaning with --solver closed_form."),
        # The default, but said.
        ("lunar", "closed_form", {"epochs": 20}, "epochs has no meaning with --solver closed_form"),
        ("lunar", "lora", {"master_dtype": "bfloat16"}, "master_dtype: lora trains in float32."),
        ("lunar", None, {"rank": 4}, "rank has no meaning with --solver adamw."),
        ("lunar", None, {"epochs": "many"}, "epochs many: a whole number is needed."),
        ("lunar", None, {"epochs": [1, 2]}, "epochs [1, 2]: a whole number is needed."),
        ("lunar", None, {"epochs": 0}, "epochs 0: at least 1."),
        ("lunar", None, {"batch_size": 0}, "batch_size 0: at least 1."),
        ("lunar", None, {"master_dtype": "float16"}, "master_dtype float16: there are float32, b"),
        ("lunar", None, {"weight_decay": -0.1}, "weight_decay -0.1: at least 0."),
        ("lunar", None, {"weight_decay": math.nan}, "weight_decay nan: a finite number."),
        ("lunar", None, {"positions": True}, "positions True: a text is needed."),
        ("lunar", None, {"positions": "first"}, "positions first: there are all, last."),
        ("lunar", None, {"retain_points": 0.0}, "retain_points 0.0: more than 0."),
        ("ga", None, {"checkpointing": 1}, "checkpointing 1: true or false is needed."),
        ("ga", None, {"dropout": "none"}, "dropout none: a number is needed."),
        ("lunr", None, {}, "unknown method 'lunr'. Did you mean 'lunar'?"),
    ],
)
def test_what_means_nothing_is_refused(
    name: str, solver: str | None, fixed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        configure_method(name, solver=solver, fixed=fixed)
    assert str(raised.value).startswith(message)


def test_an_unknown_setting_is_refused_with_all_that_there_are() -> None:
    with pytest.raises(InputError) as raised:
        configure_method("lunar", solver="closed_form", fixed={"learning_rate": 0.1})
    message = str(raised.value)
    assert message.startswith("--fix learning_rate: --method lunar (closed_form) has no such")
    assert "There are: layer, coefficient, ridge, solver, positions" in message


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as raised:
        configure_method("ga", solver="lora", fixed={"epochs": "many", "layer": 1})
    for part, message in zip(
        ("--solver lora", "epochs many", "--fix layer"), raised.value.messages, strict=True
    ):
        assert part in message
    with pytest.raises(InputError) as raised:
        GradientSettings(trained="some", epochs=0, dropout=1.0, steering_alpha=-1.0)
    for part in ("trained some", "epochs 0", "dropout 1.0", "steering_alpha -1.0"):
        assert part in str(raised.value)


def test_options_name_the_method_and_fix_by_text() -> None:
    options = RunOptions(solver="lora", fix=("rank=4", "layer=1,2", "retain-points=none"))
    method, parameters = configured(options)
    assert isinstance(method, LunarMethod)
    assert method.settings == LunarSettings(solver="lora", rank=4)
    assert parameters == {"layer": [1, 2]}
