"""Strict YAML: numbers as people write them, and every bad file one message with its place."""

from __future__ import annotations

import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lunar_tune.errors import InputError, SearchSpaceError
from lunar_tune.yaml_files import describe_mistakes, looks_like_number, read_yaml_mapping, shown


def read(text: str | bytes) -> dict[str, object]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_yaml_mapping(path)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1e-4", 0.0001),
        ("1.0e2", 100.0),
        ("3E5", 300000.0),
        ("-2e+3", -2000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+2.0", 2.0),
        ("17", 17),
        ("-3", -3),
        ("010", 10),  # ten in YAML 1.2, eight in 1.1
        ("0o17", 15),
        ("0x1F", 31),
        (".inf", math.inf),
    ],
)
def test_numbers_are_read_as_yaml_1_2_has_them(written: str, number: float) -> None:
    value = read(f"key: {written}")["key"]

    assert value == number
    assert type(value) is type(number)


@pytest.mark.parametrize(
    "written", ["yes", "no", "on", "off", "1_000", "12:30", "2026-01-01", "1e"]
)
def test_what_only_yaml_1_1_interprets_stays_text(written: str) -> None:
    assert read(f"key: {written}") == {"key": written}


def test_pyyaml_alone_would_read_the_same_number_as_text() -> None:
    assert yaml.safe_load("key: 1e-4") == {"key": "1e-4"}  # the reason for the loader's existence


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["r", "e", "E", "g"]))
def test_every_finite_float_survives_however_it_is_written(number: float, style: str) -> None:
    written = repr(number) if style == "r" else format(number, f".17{style}")
    value = read(f"key: {written}")["key"]

    assert isinstance(value, (int, float))
    assert value == number


@settings(deadline=None)
@given(st.integers())
def test_every_whole_number_survives_as_a_whole_number(number: int) -> None:
    assert read(f"key: {number}") == {"key": number}


# YAML 1.2 core schema, section 10.3.2. PyYAML follows YAML 1.1 and writes the text 0E0 without
# quotes, which is a number in YAML 1.2. Line breaks other than \n it changes by itself.
NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|0o[0-7]+|0x[0-9a-fA-F]+")
TEXTS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))).filter(
    lambda text: not NUMBER.fullmatch(text)
)


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXTS | st.floats(allow_nan=False),
        lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
        max_leaves=8,
    )
)
@example("0E0x")
def test_what_pyyaml_writes_is_read_back(value: object) -> None:
    text = yaml.safe_dump({"key": value}, allow_unicode=True)

    assert read(text) == {"key": value}


def test_a_byte_order_mark_and_anchors_are_accepted() -> None:
    assert read("\ufeffa: &x {low: 1}\nb: *x") == {"a": {"low": 1}, "b": {"low": 1}}


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("a: 1\nb: 2\na: 3", ["line 3, column 1", "'a' stands in line 1 already"]),
        ("a: {b: 1, b: 2}", ["line 1, column 11", "'b' stands in line 1 already"]),
        ("a: [1", ["line 1", "is not valid YAML", "expected ',' or ']'"]),
        ("a:\n\t- b", ["line 2, column 1", "indent with spaces"]),
        ("a: b: c", ["line 1, column 5", "mapping values are not allowed"]),
        ("a: *nowhere", ["undefined alias 'nowhere'"]),
        ("&x\na: *x", ["recursive"]),
        ("a: &x [*x]", ["recursive"]),
        ("a: 1\n---\nb: 2", ["expected a single document"]),
        ("1: 2", ["the key '1' is no text", "quotes"]),
        ("[a]: 2", ["the key a list or mapping is no text"]),
        ("a: !!python/object:os.system x", ["tag !!python/object:os.system is not allowed"]),
        ("a: !mine 3", ["tag !mine is not allowed"]),
        ("a: !!set {b}", ["tag !!set is not allowed"]),
        ("a: !!bool maybe", ["the text 'maybe' is neither true nor false"]),
        ("a: !!float x", ["the text 'x' cannot be read as a number"]),
        ("a: " + "9" * 5000, ["cannot be read as a whole number"]),
        ("a: b\nc: \x07", ["line 2, column 4", "control character"]),
        ("a: " + "[" * 5000, ["nested too deeply"]),
        ("- 1", ["holds a list", "`key: value`"]),
        ("5", ["holds 5"]),
        ("", ["the file is empty"]),
        ("# only a comment", ["the file is empty"]),
        (b"a: 1\nb: \xff", ["line 2", "not UTF-8 (byte 0xff)", "save it as UTF-8"]),
    ],
)
def test_a_bad_file_is_refused_with_file_and_place(text: str | bytes, fragments: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read(text)

    message = str(caught.value)
    assert "x.yaml: " in message
    assert len(message) < 500
    assert all(fragment in message for fragment in fragments), message


def test_a_missing_file_and_a_folder_raise_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(SearchSpaceError, match=r"nope\.yaml: there is no such file"):
        read_yaml_mapping(tmp_path / "nope.yaml", error_class=SearchSpaceError)
    with pytest.raises(SearchSpaceError, match="is a folder; give a file in it"):
        read_yaml_mapping(tmp_path, error_class=SearchSpaceError)
    with pytest.raises(InputError, match="cannot be read"):
        read_yaml_mapping(Path("a\0b"))


class Room(BaseModel):
    """Stands for any typed file."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    width: float
    seats: int = Field(gt=0)
    lit: bool = False
    name: str = ""
    doors: list[int] = Field(default=[1], min_length=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seats": 1}, "width: is missing"),
        ({"width": "1e-4", "seats": 1}, "width: is the text '1e-4'; remove the quotes"),
        ({"width": "wide", "seats": 1}, "width: is the text 'wide'; a number is needed"),
        ({"width": math.nan, "seats": 1}, "width: is nan; a finite number is needed"),
        ({"width": 1, "seats": 2.5}, "seats: is 2.5; a whole number is needed"),
        ({"width": 1, "seats": 0}, "seats: is 0; it must be more than 0"),
        ({"width": None, "seats": 1}, "width: is empty; a number is needed"),
        ({"width": 1, "seats": 1, "lit": "yes"}, "lit: is the text 'yes'; write true or false"),
        ({"width": 1, "seats": 1, "name": 5}, "name: is 5; a text is needed; put it in quotes"),
        ({"width": 1, "seats": 1, "doors": 5}, "doors: is 5; a list is needed"),
        ({"width": 1, "seats": 1, "doors": []}, "doors: is []; at least one is needed"),
        ({"width": 1, "seats": 1, "doors": [1, "2"]}, "doors[1]: is the text '2'; remove the"),
        ({"width": 1, "seats": 1, "naem": 5}, "naem: is unknown. Did you mean 'name'? There are: "),
    ],
)
def test_what_pydantic_finds_is_said_in_plain_words(
    content: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        Room.model_validate(content)

    (only,) = describe_mistakes(caught.value, Room.model_fields)
    assert only.startswith(message)
    (placed,) = describe_mistakes(caught.value, Room.model_fields, place="house.room")
    assert placed.startswith(f"house.room.{message}")


def test_values_are_shown_short() -> None:
    assert shown(None) == "empty"
    assert shown(True) == "true"
    assert len(shown("x" * 1000)) < 80
    assert len(shown([["x" * 100] * 10] * 100)) < 80


def test_a_text_that_would_be_a_number_is_recognised() -> None:
    assert all(map(looks_like_number, ["1", "-2.5", "1e-4", ".5", ".inf"]))
    assert not any(map(looks_like_number, ["", "x", "1_000", "1 2", "1\n"]))


YAMLISH = st.text(st.sampled_from("ab:-[]{},&*!|>#'\"%@?\n \t1.e~\\é\x00"), max_size=60)


@given(YAMLISH | st.text(max_size=40) | st.binary(max_size=40))
@settings(deadline=None)
@example("a: &x [*x]")
@example("[" * 5000)
@example("? [a]\n: b")
def test_any_text_is_a_mapping_with_text_keys_or_is_refused(text: str | bytes) -> None:
    if isinstance(text, str):
        text = text.encode(errors="surrogatepass")
    try:
        content = read(text)
    except InputError as error:
        assert "x.yaml: " in str(error)  # noqa: PT017 the other outcome is as good
    else:
        assert all(isinstance(key, str) for key in content)
