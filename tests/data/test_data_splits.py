"""Splits, groups of edges, samples: nothing is lost, nothing twice, every edge has its share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunar_tune.data.records import Record
from lunar_tune.data.splits import (
    Split,
    edges_of,
    groups_file,
    halves_by_edge,
    read_groups,
    resolve_edges,
    sample_by_edge,
    split_by_edges,
)
from lunar_tune.errors import DataError


def numbered(edges: Sequence[str]) -> tuple[Record, ...]:
    """Return a record for each edge named, with a question of its own."""
    return tuple(Record(f"Question {n}?", f"Answer {n}.", edge) for n, edge in enumerate(edges))


RECORDS = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60).map(numbered)
THREE = numbered(["A_B", "B_C", "A_B", "C_D"])


def test_edges_come_in_order_of_appearance_with_counts() -> None:
    assert list(edges_of(numbered("babcb")).items()) == [("b", 3), ("a", 1), ("c", 1)]


def test_a_split_keeps_the_order_of_the_data_and_of_the_edges_asked() -> None:
    split = split_by_edges(THREE, ["C_D", "A_B"])
    assert split.forget == (THREE[0], THREE[2], THREE[3])
    assert split.retain == (THREE[1],)
    assert split.forget_edges == ("C_D", "A_B")


@given(RECORDS, st.data())
def test_a_split_loses_nothing(records: tuple[Record, ...], data: st.DataObject) -> None:
    edges = list(edges_of(records))
    size = st.integers(1, len(edges))
    asked = data.draw(st.permutations(edges))[: data.draw(size)]
    if len(asked) == len(edges):
        with pytest.raises(DataError, match="leave one to retain"):
            split_by_edges(records, asked)
        return
    split = split_by_edges(records, asked)
    assert Counter(split.forget + split.retain) == Counter(records)
    assert {record.edge for record in split.forget} == set(asked)
    assert not {record.edge for record in split.retain} & set(asked)


def test_another_retain_set_stands_in_where_no_edge_is_left() -> None:
    other = numbered(["x"] * 9)[5:]
    split = split_by_edges(THREE, ["A_B", "B_C", "C_D"], retain=other)
    assert split.forget == THREE
    assert split.retain == other
    assert split_by_edges(THREE, ["A_B", "C_D"], retain=other).retain == (THREE[1],)


BAD_EDGES = {
    "none": ([], ["no forget edge was given", "There are: A_B, B_C, C_D."]),
    "unknown": (["A_X"], ["unknown forget edge 'A_X'", "Did you mean 'A_B'?", "There are: A_B"]),
    "repeated": (["A_B", "A_B"], ["'A_B' is given 2 times"]),
    "all": (["A_B", "B_C", "C_D"], ["every edge is to be forgotten", "leave one to retain"]),
    "several": (["Q", "B_C", "B_C"], ["2 things are wrong", "'Q'", "'B_C' is given 2 times"]),
}


@pytest.mark.parametrize(("edges", "fragments"), BAD_EDGES.values(), ids=BAD_EDGES)
def test_bad_forget_edges_are_refused(edges: Sequence[str], fragments: list[str]) -> None:
    with pytest.raises(DataError) as raised:
        split_by_edges(THREE, edges)
    assert [text for text in fragments if text not in str(raised.value)] == []


def test_a_list_of_very_many_edges_is_cut_with_a_count() -> None:
    with pytest.raises(DataError, match=r"e39 and 10 more\."):
        split_by_edges(numbered([f"e{n}" for n in range(50)]), ["nothing like it"])


def test_an_empty_data_set_says_so() -> None:
    with pytest.raises(DataError, match="the data set is empty"):
        split_by_edges((), ["A_B"])


def test_a_question_in_both_sets_is_refused_by_name() -> None:
    retain = (Record("  question 2?\n", "Something else.", "other"),)
    with pytest.raises(DataError, match=r"1 of the questions to forget .*: question 2 of A_B"):
        Split(forget=(THREE[0], THREE[2]), retain=retain, forget_edges=("A_B",))


def test_many_questions_in_both_sets_are_counted() -> None:
    records = numbered("a" * 8 + "b")
    with pytest.raises(DataError, match=r"8 of the questions.*question 5 of a and 3 more"):
        Split(forget=records[:8], retain=records, forget_edges=("a",))


def test_a_question_twice_on_one_side_is_allowed() -> None:
    twice = (Record("Q?", "A.", "a"), Record("Q?", "B.", "a"), Record("R?", "C.", "b"))
    assert len(split_by_edges(twice, ["a"]).forget) == 2


@pytest.mark.parametrize("empty", ["forget", "retain"])
def test_a_split_with_an_empty_side_cannot_be_made(empty: str) -> None:
    sides = {"forget": THREE[:1], "retain": THREE[1:]} | {empty: ()}
    with pytest.raises(DataError, match=f"the {empty} set is empty"):
        Split(**sides, forget_edges=("A_B",))
    if empty == "retain":
        with pytest.raises(DataError, match="the retain set is empty"):
            split_by_edges(THREE, ["A_B", "B_C", "C_D"], retain=[])


@given(RECORDS, st.integers(1, 70), st.integers(0, 3))
def test_a_sample_gives_every_edge_its_share(
    records: tuple[Record, ...], count: int, seed: int
) -> None:
    sample = sample_by_edge(records, count, seed=seed)
    assert len(sample) == min(count, len(records))
    assert sample == tuple(record for record in records if record in sample)
    sizes, places = edges_of(records), edges_of(sample)
    if count >= len(sizes):
        assert set(places) == set(sizes)
    for edge, size in sizes.items():
        share = Fraction(min(count, len(records)) * size, len(records))
        # One place to each small edge may cost a large one more than the rounding does.
        assert places.get(edge, 0) < max(share + 1, Fraction(2))


@given(RECORDS, st.integers(1, 70), st.integers(0, 3))
def test_the_same_seed_gives_the_same_sample(
    records: tuple[Record, ...], count: int, seed: int
) -> None:
    assert sample_by_edge(records, count, seed=seed) == sample_by_edge(records, count, seed=seed)


def test_shares_follow_the_largest_remainder() -> None:
    # 7 of 10 places: a 4.2, b 1.4, c 1.4 -> 4, 1, 1 and one more to b or c by lot.
    records = numbered("aaaaaabbcc")
    found = {tuple(edges_of(sample_by_edge(records, 7, seed=seed)).values()) for seed in range(20)}
    assert found == {(4, 2, 1), (4, 1, 2)}


def test_a_small_edge_takes_its_one_place_from_a_large_one() -> None:
    # 10 of 103 places: a 9.7, b c d 0.1 each -> 7, 1, 1, 1.
    sample = sample_by_edge(numbered("a" * 100 + "bcd"), 10, seed=0)
    assert edges_of(sample) == {"a": 7, "b": 1, "c": 1, "d": 1}


def test_fewer_places_than_edges_do_not_always_go_to_the_first_edges() -> None:
    records = numbered("abcdefgh" * 3)
    seen = {record.edge for seed in range(30) for record in sample_by_edge(records, 2, seed=seed)}
    assert seen == set("abcdefgh")


def test_other_seeds_give_other_samples() -> None:
    records = numbered("a" * 50)
    assert len({sample_by_edge(records, 10, seed=seed) for seed in range(10)}) == 10


@pytest.mark.parametrize("count", [0, -3])
def test_a_sample_of_less_than_one_is_refused(count: int) -> None:
    with pytest.raises(DataError, match="ask for at least 1"):
        sample_by_edge(THREE, count, seed=0)


@given(RECORDS, st.integers(0, 3))
def test_halves_are_a_partition_of_every_edge_that_the_seed_fixes(
    records: tuple[Record, ...], seed: int
) -> None:
    sizes = edges_of(records)
    if min(sizes.values()) == 1:
        with pytest.raises(DataError, match="half of it cannot be held out"):
            halves_by_edge(records, seed=seed)
        return
    first, second = halves_by_edge(records, seed=seed)
    assert Counter(first + second) == Counter(records)
    assert not set(first) & set(second)
    for edge, size in sizes.items():
        assert edges_of(first)[edge] == (size + 1) // 2
        assert edges_of(second)[edge] == size // 2
    places = {record: place for place, record in enumerate(records)}
    for half in (first, second):
        assert list(half) == sorted(half, key=lambda record: places[record])
    assert halves_by_edge(records, seed=seed) == (first, second)


# Groups of edges

EDGES = dict.fromkeys("abcd", 2)
GROUPS = {"first": ("a", "b"), "last": ("c", "d"), "middle": ("b", "c")}
RECORDS = [Record(f"{edge} {n}?", f"{n}.", edge) for edge in EDGES for n in range(2)]


def test_groups_are_declared_in_a_file_beside_the_data(tmp_path: Path) -> None:
    data = tmp_path / "pairs.v2.jsonl"
    assert read_groups(data) == {}
    assert groups_file(data) == tmp_path / "pairs.v2.groups.json"
    groups_file(data).write_text(json.dumps(GROUPS))
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
    with pytest.raises(DataError, match=r"p\.groups\.json: column 2"):
        read_groups(tmp_path / "p.json")


def test_edges_stay_and_groups_become_their_edges_in_the_order_asked() -> None:
    assert resolve_edges(["d", "first"], EDGES, GROUPS) == ("d", "a", "b")


def test_a_real_edge_wins_over_a_group_of_its_name() -> None:
    assert resolve_edges(["first"], {**EDGES, "first": 1}, GROUPS) == ("first",)
    assert resolve_edges(["a"], EDGES, {"a": ("b", "c")}) == ("a",)


def test_a_group_may_hold_the_edge_it_is_named_after_only_if_there_is_none() -> None:
    with pytest.raises(DataError, match=r"group 'odd' names edges that the data do not have: x, y"):
        resolve_edges(["odd"], EDGES, {"odd": ("x", "a", "y")})


def test_one_edge_by_two_names_is_refused() -> None:
    with pytest.raises(DataError, match="'middle' and 'first' have b in common"):
        resolve_edges(["first", "middle"], EDGES, GROUPS)
    with pytest.raises(DataError, match="'a' and 'first' have a in common"):
        resolve_edges(["first", "a"], EDGES, GROUPS)


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
