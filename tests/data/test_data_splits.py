"""Splits, groups of edges, samples: nothing is lost, nothing twice, every edge has its share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.data.records import Record
from lunar_tune.data.splits import (
    Split,
    edges_of,
    folds,
    groups_file,
    halves_by_edge,
    read_groups,
    resolve_edges,
    sample_by_edge,
    split_by_edges,
)
from lunar_tune.data.texts import normalised
from lunar_tune.errors import DataError


def numbered(edges: Sequence[str]) -> tuple[Record, ...]:
    """Return a record for each edge named, with a question of its own."""
    return tuple(Record(f"Question {n}?", f"Answer {n}.", edge) for n, edge in enumerate(edges))


few = settings(max_examples=30, deadline=None)
RECORDS = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60).map(numbered)
THREE = numbered(["A_B", "B_C", "A_B", "C_D"])
GROUPS = {"first": ("A_B", "B_C"), "middle": ("B_C", "C_D"), "odd": ("x", "A_B", "y")}


def test_edges_come_in_order_of_appearance_with_counts() -> None:
    assert list(edges_of(numbered("babcb")).items()) == [("b", 3), ("a", 1), ("c", 1)]


def test_a_split_keeps_the_order_of_the_data_and_of_the_edges_asked() -> None:
    split = split_by_edges(THREE, ["C_D", "A_B"])
    assert (split.forget, split.retain) == ((THREE[0], THREE[2], THREE[3]), (THREE[1],))
    assert split.forget_edges == ("C_D", "A_B")
    twice = (Record("Q?", "A.", "a"), Record("Q?", "B.", "a"), Record("R?", "C.", "b"))
    assert len(split_by_edges(twice, ["a"]).forget) == 2


@few
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
    assert (split.forget, split.retain) == (THREE, other)
    assert split_by_edges(THREE, ["A_B", "C_D"], retain=other).retain == (THREE[1],)


def test_bad_forget_edges_are_refused() -> None:
    for edges, fragments in (
        ([], ["no forget edge was given", "There are: A_B, B_C, C_D."]),
        (["A_X"], ["unknown forget edge 'A_X'", "Did you mean 'A_B'?", "There are: A_B"]),
        (["frist"], ["Did you mean 'first'?", "Groups of edges: first, middle, odd."]),
        (["A_B", "A_B"], ["'A_B' is given 2 times"]),
        (["A_B", "B_C", "C_D"], ["every edge is to be forgotten", "leave one to retain"]),
        (["Q", "B_C", "B_C"], ["2 things are wrong", "'Q'", "'B_C' is given 2 times"]),
        (["odd"], ["group 'odd' names edges that the data do not have: x, y"]),
        (["first", "middle"], ["'middle' and 'first' have B_C in common", "every edge is to be"]),
        (["first", "A_B"], ["'A_B' and 'first' have A_B in common"]),
    ):
        with pytest.raises(DataError) as raised:
            split_by_edges(THREE, edges, groups=GROUPS)
        assert [text for text in fragments if text not in str(raised.value)] == []


def test_a_list_of_very_many_edges_is_cut_with_a_count_and_none_is_said() -> None:
    with pytest.raises(DataError, match=r"e39 and 10 more\."):
        split_by_edges(numbered([f"e{n}" for n in range(50)]), ["nothing like it"])
    with pytest.raises(DataError, match="the data set is empty"):
        split_by_edges((), ["A_B"])


def test_questions_in_both_sets_are_refused_by_place_and_counted() -> None:
    retain = (Record("  question 2?\n", "Something else.", "other"),)
    with pytest.raises(DataError, match=r"1 of the questions to forget .*: question 2 of A_B"):
        Split(forget=(THREE[0], THREE[2]), retain=retain, forget_edges=("A_B",))
    records = numbered("a" * 8 + "b")
    with pytest.raises(DataError, match=r"8 of the questions.*question 5 of a and 3 more"):
        Split(forget=records[:8], retain=records, forget_edges=("a",))


def test_a_split_with_an_empty_side_cannot_be_made() -> None:
    for empty in ("forget", "retain"):
        sides = {"forget": THREE[:1], "retain": THREE[1:]} | {empty: ()}
        with pytest.raises(DataError, match=f"the {empty} set is empty"):
            Split(**sides, forget_edges=("A_B",))


@few
@given(RECORDS, st.integers(1, 70), st.integers(0, 3))
def test_a_sample_gives_every_edge_its_share_and_the_seed_fixes_it(
    records: tuple[Record, ...], count: int, seed: int
) -> None:
    sample = sample_by_edge(records, count, seed=seed)
    assert sample == sample_by_edge(records, count, seed=seed)
    assert len(sample) == min(count, len(records))
    assert sample == tuple(record for record in records if record in sample)
    sizes, places = edges_of(records), edges_of(sample)
    if count >= len(sizes):
        assert set(places) == set(sizes)
    for edge, size in sizes.items():
        share = Fraction(min(count, len(records)) * size, len(records))
        # One place to each small edge may cost a large one more than the rounding does.
        assert places.get(edge, 0) < max(share + 1, Fraction(2))


def test_shares_follow_the_largest_remainder_but_for_one_place_to_each_edge() -> None:
    # 7 of 10 places: a 4.2, b 1.4, c 1.4 -> 4, 1, 1 and one more to b or c by lot.
    records = numbered("aaaaaabbcc")
    found = {tuple(edges_of(sample_by_edge(records, 7, seed=seed)).values()) for seed in range(20)}
    assert found == {(4, 2, 1), (4, 1, 2)}
    # 10 of 103 places: a 9.7, b c d 0.1 each -> 7, 1, 1, 1.
    sample = sample_by_edge(numbered("a" * 100 + "bcd"), 10, seed=0)
    assert edges_of(sample) == {"a": 7, "b": 1, "c": 1, "d": 1}


def test_other_seeds_give_other_samples_and_few_places_go_to_every_edge_in_turn() -> None:
    records = numbered("abcdefgh" * 3)
    samples = {sample_by_edge(records, 2, seed=seed) for seed in range(30)}
    assert len(samples) > 10
    assert {record.edge for sample in samples for record in sample} == set("abcdefgh")
    with pytest.raises(DataError, match="ask for at least 1"):
        sample_by_edge(THREE, 0, seed=0)


@few
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
    assert edges_of(first) == {edge: (size + 1) // 2 for edge, size in sizes.items()}
    places = {record: place for place, record in enumerate(records)}
    for half in (first, second):
        assert list(half) == sorted(half, key=lambda record: places[record])
    assert halves_by_edge(records, seed=seed) == (first, second)


@few
@given(RECORDS, st.sampled_from([1 / 8, 1 / 3, 1.0]), st.integers(1, 4), st.integers(0, 3))
def test_what_is_left_out_is_asked_and_not_fitted_and_never_twice(
    records: tuple[Record, ...], share: float, times: int, seed: int
) -> None:
    """Judged are all but the first, once more in other letters, and one that nothing fits."""
    stranger = Record("B_C", "Does anybody fit this?", "No.")
    again = [Record(one.edge, one.question.upper(), one.answer) for one in records]
    judged = (*again[1:], stranger)
    found = list(folds(records, judged, share=share, times=times, seed=seed))
    both = {normalised(one.question) for one in records} & {
        normalised(one.question) for one in judged
    }
    distinct = len({normalised(one.question) for one in records})
    seen: set[str] = set()
    for kept, asked in found:
        questions = {normalised(one.question) for one in asked}
        assert questions
        assert not questions & seen
        assert questions <= both
        assert {normalised(one.question) for one in kept} & questions == set()
        assert len(kept) + sum(normalised(one.question) in questions for one in records) == len(
            records
        )
        assert kept
        assert set(asked) <= set(judged)
        assert len(questions) <= max(1, distinct * share)
        seen |= questions
    size = max(1, int(distinct * share))
    if size < distinct:
        assert len(seen) == min(len(both), size * times)
    assert list(folds(records, judged, share=share, times=times, seed=seed)) == found


def test_groups_are_declared_in_a_file_beside_the_data(tmp_path: Path) -> None:
    data = tmp_path / "pairs.v2.jsonl"
    assert read_groups(data) == {}
    assert groups_file(data) == tmp_path / "pairs.v2.groups.json"
    groups_file(data).write_text(json.dumps(GROUPS))
    assert read_groups(data) == GROUPS


def test_a_bad_file_of_groups_is_refused(tmp_path: Path) -> None:
    for content, fragment in (
        ("[1]", "must be an object of lists"),
        ('{"g": "a"}', "group 'g' must be a list of at least one edge"),
        ('{"g": []}', "group 'g' must be a list of at least"),
        ('{"g": ["a", 1]}', "group 'g' must be a list"),
        ('{"g": ["a", "a"]}', "group 'g' names an edge twice"),
        ("{", r"p\.groups\.json: column 2"),
    ):
        groups_file(tmp_path / "p.json").write_text(content)
        with pytest.raises(DataError, match=fragment):
            read_groups(tmp_path / "p.json")


def test_a_group_stands_for_its_edges_unless_there_is_an_edge_of_its_name() -> None:
    existing = edges_of(THREE) | {"D_E": 1}
    assert resolve_edges(["D_E", "first"], existing, GROUPS) == ("D_E", "A_B", "B_C")
    assert resolve_edges(["first"], existing | {"first": 1}, GROUPS) == ("first",)
    assert resolve_edges(["A_B"], existing, {"A_B": ("B_C", "C_D")}) == ("A_B",)


def test_what_is_asked_is_a_name_as_a_whole_before_it_is_several_and_in_any_form() -> None:
    existing = edges_of(numbered(["Doe, Jane", "Doe", "José", "a+b", "x"]))
    groups = {"Roe, all": ("x",)}
    for asked, edges in (
        (["Doe, Jane"], ("Doe, Jane",)),
        (["Doe,  Jane,x,Doe"], ("Doe, Jane", "x", "Doe")),
        ([" Doe ,x,"], ("Doe", "x")),
        (["Jose\u0301\u200b"], ("José",)),
        (["Roe, all,a+b"], ("x", "a+b")),
    ):
        assert resolve_edges(asked, existing, groups) == edges
    with pytest.raises(
        DataError, match=r"unknown forget edge 'Jane'.* There are: 'Doe, Jane', Doe"
    ):
        resolve_edges(["Doe,Jane"], existing)
    split = split_by_edges(numbered(["Doe, Jane", "x", "y"]), ["Doe, Jane,x"])
    assert split.forget_edges == ("Doe, Jane", "x")


SAME = ("Where's  A?", "where\u2019s a?\n", "WHERE'S A\u200b?")


def test_the_same_question_in_another_form_is_a_conflict_and_falls_into_one_half() -> None:
    for question in SAME[1:]:
        kept = (Record(question, "B.", "b"),)
        with pytest.raises(DataError, match="stand in the retain set too: question 1 of a"):
            Split(forget=(Record(SAME[0], "A.", "a"),), retain=kept, forget_edges=("a",))
    records = [
        Record(text, "A.", edge) for edge in "ab" for text in (*SAME, "B?", f"{edge}1?", "C")
    ]
    for seed in range(20):
        halves = halves_by_edge(records, seed=seed)
        asked = [{normalised(record.question) for record in half} for half in halves]
        assert not asked[0] & asked[1]
        assert len(halves[0]) + len(halves[1]) == len(records)
        assert {record.edge for half in halves for record in half} == {"a", "b"}
    known = {normalised(SAME[0]): False}
    _, second = halves_by_edge(records, seed=0, in_first=known)
    assert {*SAME} <= {record.question for record in second}
    with pytest.raises(DataError, match="edge 'a' has one question"):
        halves_by_edge(records[:3], seed=0)


@pytest.mark.parametrize("before", [(True, True), (False, False), (True, False)])
def test_an_edge_whose_questions_other_sets_have_in_one_half_is_refused(
    before: tuple[bool, bool],
) -> None:
    known = {"q0?": before[0], "q1?": before[1]}
    assert [normalised(text) for text in ("Q0?", "Q1?")] == list(known)
    records = [Record("Q0?", "A.", "b"), Record("Q1?", "A.", "b")]
    if before[0] != before[1]:
        first, second = halves_by_edge(records, seed=0, in_first=dict(known))
        assert (first, second) == ((records[0],), (records[1],))
        return
    with pytest.raises(DataError, match="edge 'b' shares all of its questions"):
        halves_by_edge(records, seed=0, in_first=dict(known))
    own = Record("Q2?", "A.", "b")
    assert all(halves_by_edge([*records, own], seed=0, in_first=dict(known)))
