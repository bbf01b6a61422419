"""Options from files and command lines: types, ranges, and what two classes share."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from lunar_tune.config.fields import (
    check_values,
    from_document,
    help_of,
    option,
    options_of,
    same_option,
    shared_options,
)
from lunar_tune.config.options import (
    PUBLISHED_MAX_NEW_TOKENS,
    ModelOptions,
    RunOptions,
    SearchConfig,
    read_assignments,
    read_range,
)
from lunar_tune.errors import InputError, Problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """An option of every type."""

    word: str = option("one", group="Group", choices=("one", "two"))
    count: int = option(3, group="Group", least=1, most=5)
    """A count."""
    share: float | None = option(None, group="Group", above=0)
    budget: int | None = option(7, group="Group")
    flag: bool = option(False, group="Group")
    place: Path = option(Path("here"), group="Group")
    names: tuple[str, ...] = option((), group="Group", commas=True)
    texts: tuple[str, ...] = option((), group="Group", choices=("a,b", "c"))
    said: tuple[str, ...] = option((), group="Group", positional=True, choices=("x",))
    internal: int = 1  # no option


def read(**values: Any) -> dict[str, Any]:
    return from_document(Choice, values, source="file.yaml")


def complaints(options: Any) -> list[str]:
    problems = Problems()
    check_values(options, problems)
    return problems.messages


def test_a_value_becomes_its_options_type_or_is_refused() -> None:
    for name, value, expected in (
        ("word", 2, "2"),
        ("count", 4.0, 4),
        ("count", "4", 4),
        ("share", "1e-3", 0.001),
        ("budget", None, None),
        ("flag", True, True),
        ("place", "there", Path("there")),
        ("names", "a,b, ,c", ("a", "b", "c")),
        ("names", ["a,b", 2.5], ("a", "b", "2.5")),
        ("texts", "a,b", ("a,b",)),
    ):
        found = read(**{name: value})[name]
        assert (type(found), found) == (type(expected), expected)
    for name, values, needed in (
        ("word", [None, True], "a text"),
        ("count", [True, 4.5, "many", None, [4], math.inf], "a whole number"),
        ("share", [False, "half", 10**400], "a number"),
        ("flag", [1, "true"], "true or false"),
        ("place", [1j], "a text"),
        ("names", [None, [["a"]], {"a": "b"}], "a text or a list of texts"),
    ):
        for value in values:
            with pytest.raises(InputError) as raised:
                read(**{name: value})
            assert str(raised.value).startswith(f"file.yaml: {name} is {value!r}; {needed}")


def test_all_that_is_wrong_with_a_file_is_said_at_once() -> None:
    found = from_document(RunOptions, {"max-new-tokens": 9, "seed": 1}, source="file.yaml")
    assert found == {"max_new_tokens": 9, "seed": 1}, "a key may be written as the flag is"
    with pytest.raises(InputError) as raised:
        read(cuont=3, internal=2, flag="yes", word="one")
    assert raised.value.messages == (
        "file.yaml: cuont is not an option. Did you mean 'count'?",
        "file.yaml: internal is not an option.",
        "file.yaml: flag is 'yes'; true or false is needed.",
    )


def test_a_value_out_of_range_is_noted() -> None:
    for values, message in (
        ({"word": "three"}, "--word three: must be one of one, two."),
        ({"count": 0}, "--count 0: must be at least 1."),
        ({"count": 6}, "--count 6: must be at most 5."),
        ({"share": 0.0}, "--share 0.0: must be more than 0."),
        ({"share": math.nan}, "--share nan: must be a finite number."),
        ({"texts": ("c", "d")}, "--texts d: must be one of a,b, c."),
        ({"said": ("y",)}, "said y: must be one of x."),
    ):
        assert complaints(Choice(**values)) == [message]
    for values in ({"count": 1}, {"count": 5}, {"share": 1e-300}, {"share": None}):
        assert complaints(Choice(**values)) == []
    assert len(complaints(Choice(word="three", count=0, share=-1.0))) == 3
    for owner in (RunOptions, SearchConfig):
        assert complaints(owner()) == [], "defaults are in range"


def test_what_two_classes_share_is_taken_over() -> None:
    options = RunOptions(model="owner/name", seed=3, max_new_tokens=9)
    config = shared_options(options, SearchConfig)
    assert (config.model, config.seed, config.max_new_tokens) == ("owner/name", 3, 9)
    assert shared_options(options, SearchConfig, ["max_new_tokens"]).max_new_tokens is None
    assert shared_options(config, ModelOptions) == ModelOptions(model="owner/name")


class Below:
    """A class around the options, so that their source is indented."""

    @dataclasses.dataclass(frozen=True)
    class Described(ModelOptions):
        """Every way to say what an option is."""

        word: str = option("one", group="Group")
        """A word: it goes on
        in a second line."""
        device: str = same_option(ModelOptions, "device", default="cpu")
        count: int = same_option(Choice, "count", most=9)
        silent: int = option(1, group="Group")


def test_help_is_the_text_below_a_declaration_and_an_option_keeps_what_is_not_said_anew() -> None:
    kind = Below.Described
    found = {name: help_of(kind, name) for name in options_of(kind)}
    assert found["word"] == "A word: it goes on in a second line."
    assert found["device"] == help_of(RunOptions, "device") == "auto, cpu or cuda."
    assert (found["count"], found["silent"]) == ("A count.", "")
    assert SearchConfig().max_new_tokens is None
    assert RunOptions().max_new_tokens == PUBLISHED_MAX_NEW_TOKENS == 512
    assert (kind().count, kind().device) == (Choice().count, "cpu")
    assert complaints(kind(count=9)) == []
    assert complaints(kind(count=0)) == ["--count 0: must be at least 1."]


def test_an_assignment_is_the_value_that_it_spells_and_a_range_has_two_bounds() -> None:
    for text, name, value in (
        (" learning-rate = 1e-3 ", "learning_rate", 0.001),
        ("layer=3, 4", "layer", [3, 4]),
        ("trained=full", "trained", "full"),
        ("checkpointing=True", "checkpointing", True),
        ("beta=none", "beta", None),
        ("note=a=b", "note", "a=b"),
    ):
        found = read_assignments((text,))
        assert found == {name: value}
        assert type(found[name]) is type(value)
    for text in ("layer", "layer=", "=3", ""):
        with pytest.raises(InputError, match="write NAME=VALUE, for example layer=22"):
            read_assignments((text,))
    with pytest.raises(InputError, match="--fix weight-decay=1: weight_decay is fixed twice"):
        read_assignments(("weight_decay=0", "weight-decay=1"))
    assert read_range(" learning-rate = 1e-4:0.1") == ("learning_rate", 1e-4, 0.1)
    for text in ("layer", "layer=3", "layer=3:", "=1:2", "layer=4:3", "layer=a:b", "a=nan:1"):
        with pytest.raises(InputError, match=r"write NAME=LOW:HIGH, for example coeff"):
            read_range(text)
