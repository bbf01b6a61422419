"""Splits: nothing is lost, nothing stands on both sides, every edge has its share of a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunar_tune.data.records import Record
from lunar_tune.data.splits import Split, edges_of, halves_by_edge, sample_by_edge, split_by_edges
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


def test_another_retain_set_replaces_all_other_edges() -> None:
    other = numbered(["x"] * 9)[5:]
    split = split_by_edges(THREE, ["A_B", "B_C", "C_D"], retain=other)
    assert split.forget == THREE
    assert split.retain == other


def test_the_digest_tells_sides_order_and_edges_apart() -> None:
    splits = [
        split_by_edges(THREE, ["A_B", "B_C"]),
        split_by_edges(THREE, ["B_C", "A_B"]),
        split_by_edges(THREE, ["A_B"]),
        split_by_edges(THREE[::-1], ["A_B", "B_C"]),
    ]
    assert len({split.digest for split in splits}) == len(splits)
    assert split_by_edges(THREE, ["A_B"]).digest == splits[2].digest


BAD_EDGES = {
    "none": ([], ["no forget edge was given", "There are: A_B, B_C, C_D."]),
    "unknown": (["A_X"], ["unknown forget edge 'A_X'", "Did you mean 'A_B'?", "There are: A_B"]),
    "repeated": (["A_B", "A_B"], ["'A_B' is given 2 times"]),
    "all": (["A_B", "B_C", "C_D"], ["every edge is to be forgotten", "leave one to retain"]),
    "several": (["Q", "B_C", "B_C"], ["2 things are wrong", "'Q'", "'B_C' is given 2 times"]),
    "a text": ("A_B", ["the text 'A_B'", "give a list"]),
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
    retain = [Record("  question 2?\n", "Something else.", "other")]
    with pytest.raises(DataError, match=r"1 of the questions to forget .*\n  - question 2 of A_B"):
        split_by_edges(THREE, ["A_B"], retain=retain)


def test_many_questions_in_both_sets_are_counted() -> None:
    records = numbered("a" * 8 + "b")
    with pytest.raises(DataError, match=r"(?s)8 of the questions.*question 5 of a\n  and 3 more"):
        split_by_edges(records, ["a"], retain=records)


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
            split_by_edges(THREE, ["A_B"], retain=[])


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
