"""Methods as options configure them: types, what contradicts, what means nothing, what is fixed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.methods.contract import METHODS, configure_method
from lunar_tune.methods.gradient import GradientMethod
from lunar_tune.methods.gradient_fit import GradientSettings
from lunar_tune.methods.lunar import LunarSettings
from lunar_tune.methods.lunar.method import LunarMethod
from lunar_tune.trial.assemble import configured


def lunar_of(**given: Any) -> tuple[LunarSettings, dict[str, Any]]:
    method, fixed = configure_method("lunar", **given)
    assert isinstance(method, LunarMethod)
    return method.settings, fixed


def test_settings_configure_the_method_and_parameters_stay_fixed() -> None:
    fixed = {"epochs": 2, "layer": [1, 2], "weight_decay": 0, "learning_rate": 0.1}
    settings, parameters = lunar_of(fixed=fixed)
    assert settings == LunarSettings(epochs=2, weight_decay=0.0)
    assert type(settings.weight_decay) is float
    assert parameters == {"layer": [1, 2], "learning_rate": 0.1}
    assert len(fixed) == 4, "what was given is left as it was"


def test_nothing_given_is_the_published_method() -> None:
    assert lunar_of() == (LunarSettings(), {})


@pytest.mark.parametrize(
    "given",
    [
        {"solver": "lora"},
        {"fixed": {"solver": "lora"}},
        {"solver": "lora", "fixed": {"solver": "lora"}},
    ],
)
def test_a_solver_may_be_said_either_way_or_both(given: dict[str, Any]) -> None:
    assert lunar_of(**given) == (LunarSettings(solver="lora"), {})


def test_a_gradient_method_takes_its_own_settings() -> None:
    fixed = {"trained": "full", "beta": None, "epochs": 3.0, "checkpointing": True}
    method, parameters = configure_method("npo", fixed=fixed)
    assert isinstance(method, GradientMethod)
    assert (method.name, method.variant, parameters) == ("npo", "full", {})
    assert method.settings == GradientSettings(trained="full", epochs=3, checkpointing=True)


def test_all_methods_are_there_whichever_module_is_imported_first() -> None:
    code = (
        "from lunar_tune.methods.lunar.method import LunarMethod\n"
        "from lunar_tune.methods.contract import METHODS\n"
        "print(*METHODS)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == [*METHODS]


@pytest.mark.parametrize("name", METHODS)
def test_each_variant_that_is_listed_can_be_had_and_the_first_is_the_default(name: str) -> None:
    entry = METHODS[name]
    made = [configure_method(name, fixed={entry.variant_setting: one})[0] for one in entry.variants]
    assert tuple(method.variant for method in made) == entry.variants
    assert configure_method(name)[0].variant == entry.variants[0]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "lunar",
            {"solver": "lora", "fixed": {"solver": "adamw"}},
            "--solver lora contradicts --fix solver=adamw.",
        ),
        ("ga", {"solver": "lora"}, "--solver lora has no meaning with --method ga."),
        ("lunar", {"solver": "sgd"}, "solver sgd: there are adamw, closed_form, lora."),
        (
            "lunar",
            {"solver": "closed_form", "fixed": {"rank": 4}},
            "rank has no meaning with --solver closed_form.",
        ),
        (
            "lunar",
            {"solver": "closed_form", "fixed": {"epochs": 20}},  # the default, but said
            "epochs has no meaning with --solver closed_form.",
        ),
        (
            "lunar",
            {"solver": "lora", "fixed": {"master_dtype": "bfloat16"}},
            "master_dtype: lora trains in float32.",
        ),
        ("lunar", {"fixed": {"rank": 4}}, "rank has no meaning with --solver adamw."),
        ("lunar", {"fixed": {"epochs": "many"}}, "epochs many: a whole number is needed."),
        ("lunar", {"fixed": {"epochs": [1, 2]}}, "epochs [1, 2]: a whole number is needed."),
        ("lunar", {"fixed": {"positions": True}}, "positions True: a text is needed."),
        ("lunar", {"fixed": {"epochs": 0}}, "epochs 0: at least 1."),
        ("ga", {"fixed": {"checkpointing": 1}}, "checkpointing 1: true or false is needed."),
        ("ga", {"fixed": {"dropout": "none"}}, "dropout none: a number is needed."),
    ],
)
def test_what_means_nothing_is_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        configure_method(name, **given)
    assert str(raised.value) == message


def test_an_unknown_setting_is_refused_with_all_that_there_are() -> None:
    with pytest.raises(InputError) as raised:
        configure_method("lunar", solver="closed_form", fixed={"learning_rate": 0.1})
    message = str(raised.value)
    assert message.startswith("--fix learning_rate: --method lunar (closed_form) has no such")
    assert "There are: layer, coefficient, ridge, solver, positions" in message


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as raised:
        configure_method("ga", solver="lora", fixed={"epochs": "many", "layer": 1})
    first, second, third = raised.value.messages
    assert "--solver lora" in first
    assert "epochs many" in second
    assert "--fix layer" in third


def test_an_unknown_method_is_refused_with_a_close_name() -> None:
    with pytest.raises(InputError, match=r"unknown method 'lunr'. Did you mean 'lunar'\?"):
        configure_method("lunr")


def test_options_name_the_method_and_fix_by_text() -> None:
    options = RunOptions(solver="lora", fix=("rank=4", "layer=1,2", "retain-points=none"))
    method, parameters = configured(options)
    assert isinstance(method, LunarMethod)
    assert method.settings == LunarSettings(solver="lora", rank=4)
    assert parameters == {"layer": [1, 2]}
