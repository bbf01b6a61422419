"""Shipped names: each leads to its file, everything else to a file or to a helpful error."""

from __future__ import annotations

from pathlib import Path

import pytest

from lunar_tune.data import bundled
from lunar_tune.data.bundled import BUNDLED, bundled_names, resolve_data
from lunar_tune.data.readers import read_prompts, read_records
from lunar_tune.errors import DataError


def test_the_kinds_share_out_all_names() -> None:
    assert bundled_names("records") == ("mini", "contracts", "factual")
    assert bundled_names("prompts") == ("unverifiable", "harmful", "refusals")
    assert {*bundled_names("records"), *bundled_names("prompts")} == set(BUNDLED)


def test_every_shipped_name_can_be_read_as_its_kind() -> None:
    for name in bundled_names("records"):
        assert read_records(resolve_data(name, kind="records"))
    for name in bundled_names("prompts"):
        assert read_prompts(resolve_data(name, kind="prompts"))


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.json").write_text("[]")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_data(tmp_path / "own.json", kind="records") == tmp_path / "own.json"
    assert resolve_data("~/own.json", kind="prompts") == tmp_path / "own.json"


def test_a_shipped_name_wins_over_a_file_but_not_over_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mini").write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert resolve_data("mini", kind="records").name == "mini.json"
    assert resolve_data("./mini", kind="records") == Path("mini")
    assert resolve_data(Path("mini"), kind="records") == Path("mini")


@pytest.mark.parametrize(
    ("asked", "kind", "fragments"),
    [
        ("minni", "records", ["'minni' is neither a file nor", "mini, contracts, factual"]),
        ("harmful", "records", ["'harmful' holds prompts, records are needed", "mini"]),
        ("mini", "prompts", ["'mini' holds records", "unverifiable, harmful, refusals"]),
        (".", "records", ["is a folder"]),
        ("x" * 5000, "records", ["cannot be looked at"]),
        ("~no-such-user-here/x.json", "records", ["cannot be looked at"]),
    ],
)
def test_what_cannot_be_found_is_refused_with_what_exists(
    asked: str, kind: bundled.DataKind, fragments: list[str]
) -> None:
    with pytest.raises(DataError) as raised:
        resolve_data(asked, kind=kind)
    assert [text for text in fragments if text not in str(raised.value)] == []


def test_a_broken_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "datasets_dir", lambda: tmp_path)
    with pytest.raises(DataError, match=r"'mini' is missing at .*install lunar-tune again"):
        resolve_data("mini", kind="records")
