"""Strict YAML: numbers as people write them, and every bad file one message with its place."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lunar_tune.errors import InputError, SearchSpaceError
from lunar_tune.yaml_files import MAX_VALUES, describe_mistakes, read_yaml, shown, write_yaml

few = settings(max_examples=25, deadline=None)


def read(text: str | bytes) -> dict[str, object]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_yaml(path)


def test_scalars_are_read_as_yaml_1_2_has_them() -> None:
    """What only YAML 1.1 interprets stays text."""
    for written, expected in (
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
        *((text, text) for text in ("yes", "no", "on", "off", "y", "12:30", "1e")),
    ):
        value = read(f"key: {written}")["key"]
        assert (value, type(value)) == (expected, type(expected))


@few
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from("reEg"), st.integers())
def test_every_number_survives_however_it_is_written(number: float, style: str, whole: int) -> None:
    written = repr(number) if style == "r" else format(number, f".17{style}")
    found = read(f"key: {written}\nwhole: {whole}")
    assert found == {"key": number, "whole": whole}
    assert type(found["whole"]) is int


TEXTS = st.text(st.characters(exclude_categories=("Cs",))) | st.sampled_from(
    [
        *["~", "=", "\x85"],
        *["1e5", "0E0", "yes", "No", "null", "2026-01-01", "1_000", "12:30", "<<", "0b1"],
    ]
)


@few
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXTS | st.floats(allow_nan=False),
        lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
        max_leaves=8,
    )
)
@example([1e-05, 1e22, -1e-7, math.inf])
def test_what_is_written_is_read_back_here_and_by_readers_of_yaml_1_1(value: object) -> None:
    text = write_yaml({"key": value})
    assert read_yaml(text) == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


def test_order_is_kept_tuples_are_lists_and_marks_and_anchors_are_accepted() -> None:
    document = {"z": (1, 2), "a": None, "é": "grün"}
    assert write_yaml(document) == "z:\n- 1\n- 2\na: null\né: grün\n"
    assert list(read_yaml(write_yaml(document))) == ["z", "a", "é"]
    assert read("a: grün".encode("utf-16")) == {"a": "grün"}
    assert read("\ufeffa: &x {low: 1}\nb: *x") == {"a": {"low": 1}, "b": {"low": 1}}


def test_a_bad_file_is_refused_with_file_and_place() -> None:
    for text, fragments in (
        ("a: 1\nb: 2\na: 3", ["line 3, column 1", 'duplicate key "a"']),
        ("a: {b: 1, b: 2}", ["line 1, column 11", 'duplicate key "b"']),
        ("a: [1", ["line 1", "expected ',' or ']'"]),
        ("a:\n\t- b", ["line 2, column 1", "'\\t' that cannot start any token"]),
        ("&x\na: *x", ["contains itself"]),
        ("a: 1\n---\nb: 2", ["line 2", "expected a single document"]),
        ("1: 2", ["the key 1 is no text; put it in quotes"]),
        ("a: {[a]: 2}", ["is no text"]),
        ("a: !!python/object:os.system x", ["line 1, column 4", "python/object:os.system"]),
        ("a: !!set {b}", ["it holds {'b'}; write a number, a text in quotes"]),
        ("a: 2026-01-01", ["it holds datetime.date(2026, 1, 1)"]),
        ("a: !!bool maybe", ["cannot be read"]),
        ("a: " + "9" * 5000, ["digits"]),
        ("a: b\nc: \x07", ["unacceptable character #x0007"]),
        ("a: " + "[" * 5000, ["line 1, column", "depth"]),
        ("a: &x 1\nb: &x 2", ["duplicate anchor 'x'"]),
        ("- 1", ["it is [1]; write `key: value` lines"]),
        ("", ["it is empty"]),
        (b"a: 1\nb: \xff", ["is not UTF-8: byte 0xff at offset 8"]),
        ("a: b\n" + "#" * 1_000_000, ["larger than the 1,000,000 bytes"]),
    ):
        with pytest.raises(InputError) as caught:
            read(text)

        message = str(caught.value)
        assert "x.yaml: " in message
        assert len(message) < 500
        assert all(fragment in message for fragment in fragments), message


def test_aliases_that_stand_for_a_billion_values_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]" for n in range(1, 10)]

    assert read("\n".join(lines[:4]))["a3"]
    with pytest.raises(InputError, match=f"more than {MAX_VALUES:,} values"):
        read("\n".join(lines))


def test_a_missing_file_and_a_folder_raise_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(SearchSpaceError, match=r"nope\.yaml: cannot be read: No such file"):
        read_yaml(tmp_path / "nope.yaml", error_class=SearchSpaceError)
    with pytest.raises(SearchSpaceError, match="Is a directory"):
        read_yaml(tmp_path, error_class=SearchSpaceError)
    with pytest.raises(InputError, match="cannot be read"):
        read_yaml(Path("a\0b"))


class Room(BaseModel):
    """Stands for any typed file."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    width: float = 1.0
    seats: int = Field(gt=0)
    lit: bool = False
    doors: list[int] = Field(default=[1], min_length=1)


def test_what_pydantic_finds_is_said_in_plain_words() -> None:
    for content, message in (
        ({}, "seats: is missing"),
        ({"width": "1e-4"}, "width: is the text '1e-4'; it should be a valid number"),
        ({"width": math.nan}, "width: is nan; it should be a finite number"),
        ({"width": None}, "width: is empty; it should be a valid number"),
        ({"seats": 2.5}, "seats: is 2.5; it should be a valid integer"),
        ({"seats": 0}, "seats: is 0; it should be greater than 0"),
        ({"lit": "yes"}, "lit: is the text 'yes'; it should be a valid b"),
        ({"doors": 5}, "doors: is 5; it should be a valid list"),
        ({"doors": []}, "doors: is []; List should have at least 1 item"),
        ({"doors": [1, "2"]}, "doors[1]: is the text '2'; it should be"),
        ({"saets": 5}, "saets: is unknown. Did you mean 'seats'? There are: "),
    ):
        with pytest.raises(ValidationError) as caught:
            Room.model_validate({"seats": 1} | content if content else content)

        assert describe_mistakes(caught.value, Room.model_fields).startswith(message)
        placed = describe_mistakes(caught.value, Room.model_fields, place="house.room")
        assert placed.startswith(f"house.room.{message}")


def test_values_are_shown_short() -> None:
    assert shown(None) == "empty"
    assert shown(True) == "true"
    assert len(shown("x" * 1000)) < 80
    assert len(shown([["x" * 100] * 10] * 100)) < 80


YAMLISH = st.text(st.sampled_from("ab:-[]{},&*!|>#'\"%@?\n \t1.e~\\é\x00"), max_size=60)


@few
@given(YAMLISH | st.text(max_size=40) | st.binary(max_size=40))
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
