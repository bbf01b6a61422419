"""Places of files: names stay in their folder, a cache that others could fill is not used."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lunar_tune.errors import InputError
from lunar_tune.files import (
    CACHE_VARIABLE,
    cache_dir,
    check_writable,
    is_file,
    is_folder,
    mistrusted,
    replacing,
    safe_name,
    write_json,
)


@given(st.text(max_size=30))
@example("../../etc/passwd")
@example("..")
@example("a\x00b")
@example("/")
def test_a_safe_name_is_one_part_of_a_path_and_hides_nothing(text: str) -> None:
    name = safe_name(text)
    assert (Path("/out") / name).parent == Path("/out")
    assert Path(name).name == name
    assert not name.startswith((".", "-"))
    assert name.isascii()
    assert name.isprintable()
    assert safe_name(name) == name


def test_a_new_cache_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "a/cache"))
    assert cache_dir().stat().st_mode & 0o777 == 0o700


def test_a_cache_that_everybody_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(InputError, match="cache can be written by every user, who could replace"):
        cache_dir()
    (tmp_path / "cache").chmod(0o775)
    assert cache_dir() == tmp_path / "cache"


@pytest.mark.parametrize(
    ("owner", "mode", "user", "problem"),
    [
        (1000, 0o700, 1000, None),
        (1000, 0o755, 1000, None),
        (1000, 0o777, 1000, "can be written by every user"),
        (1001, 0o755, 1000, "belongs to another user"),
        (0, 0o775, 1000, None),
        (1001, 0o755, 0, None),
        (1001, 0o757, 0, "can be written by every user"),
    ],
)
def test_a_folder_is_trusted_if_it_is_ones_own_or_the_systems(
    owner: int, mode: int, user: int, problem: str | None
) -> None:
    assert mistrusted(owner, mode, user) == problem


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\x00b"])
def test_a_path_that_no_system_takes_is_neither_file_nor_folder(tmp_path: Path, name: str) -> None:
    assert not is_file(tmp_path / name)
    assert not is_folder(tmp_path / name)


def test_a_name_that_no_file_system_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--output: a name in it is longer than 255 bytes"):
        check_writable(tmp_path / ("é" * 128) / "runs", "--output")
    check_writable(tmp_path / ("é" * 127) / "runs", "--output")


def test_a_written_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "new" / "scores.json"
    write_json(target, {"b": [1], "a": "ü\udcff"})
    assert list(json.loads(target.read_bytes().decode(errors="surrogatepass"))) == ["b", "a"]
    before = target.read_bytes()
    with replacing(tmp_path / "private", cached=True) as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "gone" / "x", cached=True):
        raise AssertionError("a folder that was removed is not made again")
    with suppress(KeyError), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_bytes() == before
    assert list(target.parent.iterdir()) == [target]
    (tmp_path / "usual").touch()
    assert target.stat().st_mode == (tmp_path / "usual").stat().st_mode
