"""Groups of edges: read beside the data, expanded in order, never against a real edge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lunar_tune.data.groups import expand_edges, groups_file, groups_text, read_groups
from lunar_tune.data.records import Record
from lunar_tune.data.splits import split_by_edges
from lunar_tune.errors import DataError

EDGES = dict.fromkeys("abcd", 2)
GROUPS = {"first": ("a", "b"), "last": ("c", "d"), "middle": ("b", "c")}
RECORDS = [Record(f"{edge} {n}?", f"{n}.", edge) for edge in EDGES for n in range(2)]


def test_groups_are_declared_in_a_file_beside_the_data(tmp_path: Path) -> None:
    data = tmp_path / "pairs.v2.jsonl"
    assert read_groups(data) == {}
    assert groups_file(data) == tmp_path / "pairs.v2.groups.json"
    groups_file(data).write_text(groups_text(GROUPS))
    assert read_groups(data) == GROUPS


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ([1], "must be an object of lists"),
        ({"g": "a"}, "group 'g' must be a list of at least one edge"),
        ({"g": []}, "group 'g' must be a list of at least one edge"),
        ({"g": ["a", 1]}, "group 'g' must be a list"),
        ({"g": ["a", "a"]}, "group 'g' names an edge twice"),
    ],
)
def test_a_bad_file_of_groups_is_refused(tmp_path: Path, content: object, fragment: str) -> None:
    groups_file(tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=fragment):
        read_groups(tmp_path / "p.json")


def test_a_broken_file_of_groups_is_refused_with_its_place(tmp_path: Path) -> None:
    groups_file(tmp_path / "p.json").write_text("{")
    with pytest.raises(DataError, match=r"p\.groups\.json: line 1, column 2"):
        read_groups(tmp_path / "p.json")


def test_edges_stay_and_groups_become_their_edges_in_the_order_asked() -> None:
    assert expand_edges(["d", "first"], EDGES, GROUPS) == ("d", "a", "b")
    assert expand_edges(["nothing", "a", "a"], EDGES, GROUPS) == ("nothing", "a", "a")


def test_a_real_edge_wins_over_a_group_of_its_name() -> None:
    assert expand_edges(["first"], {**EDGES, "first": 1}, GROUPS) == ("first",)
    assert expand_edges(["a"], EDGES, {"a": ("b", "c")}) == ("a",)


def test_a_group_may_hold_the_edge_it_is_named_after_only_if_there_is_none() -> None:
    with pytest.raises(DataError, match=r"group 'odd' names edges that the data do not have: x, y"):
        expand_edges(["odd"], EDGES, {"odd": ("x", "a", "y")})


def test_one_edge_by_two_names_is_refused() -> None:
    with pytest.raises(DataError, match="'middle' and 'first' have b in common"):
        expand_edges(["first", "middle"], EDGES, GROUPS)
    with pytest.raises(DataError, match="'a' and 'first' have a in common"):
        expand_edges(["first", "a"], EDGES, GROUPS)


def test_a_split_by_a_group_is_the_split_by_its_edges_under_the_groups_name() -> None:
    by_group = split_by_edges(RECORDS, ["last"], groups=GROUPS)
    by_edges = split_by_edges(RECORDS, ["c", "d"])
    assert (by_group.forget, by_group.retain) == (by_edges.forget, by_edges.retain)
    assert by_group.forget_edges == ("last",)


def test_an_unknown_edge_is_refused_with_the_groups_that_exist() -> None:
    with pytest.raises(DataError) as raised:
        split_by_edges(RECORDS, ["lost"], groups=GROUPS)
    message = str(raised.value)
    assert "Did you mean 'last'?" in message
    assert message.endswith("There are: a, b, c, d. Groups of edges: first, last, middle.")


def test_groups_that_are_everything_leave_nothing_to_retain() -> None:
    with pytest.raises(DataError, match="every edge is to be forgotten"):
        split_by_edges(RECORDS, ["first", "last"], groups=GROUPS)
