"""Invented contracts and prompts, and the files of them that are shipped."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice, permutations
from pathlib import Path

import make_datasets
import pytest
from contract_terms import ATTRIBUTES
from contracts import EdgeSpec, GraphSpec, chain, generate_contracts, make_contracts, star
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.data.data_catalog import BUNDLED, bundled_names, resolve_data
from lunar_tune.data.records import Record, read_prompts, read_records
from lunar_tune.data.splits import (
    edges_of,
    generate_unverifiable,
    invented_words,
    seeded,
    split_by_edges,
)
from lunar_tune.errors import DataError
from lunar_tune.files import shipped_folder

GRAPH = GraphSpec((*chain("ABC"), *star("A", "pq", kind="employment"), EdgeSpec("X", "Y")))
SEEDS = st.integers(0, 10_000)


def words_of(text: str) -> set[str]:
    """Return the words that ROUGE would compare."""
    return set(re.findall("[a-z0-9]+", text.lower()))


def test_a_graph_without_meaning_and_more_attributes_than_there_are_are_refused() -> None:
    for edges, fragment in (
        ((), "has no edge"),
        ((EdgeSpec("A", "B"), EdgeSpec("A", "B", "employment")), "'A_B' stands 2 times"),
        ((EdgeSpec("A", "A"),), "cannot contract with itself"),
        ((EdgeSpec("A", "p", "employment"), EdgeSpec("A", "b"), EdgeSpec("b", "p")), "p"),
        ((*chain("AB", kind="employment"), EdgeSpec("B", "C")), "'B' is an employee"),
    ):
        with pytest.raises(DataError, match=fragment):
            GraphSpec(edges)
    for count in (0, 25):
        with pytest.raises(DataError, match=f"is {count}: a contract of sale has 1 to 24"):
            generate_contracts(GRAPH, seed=0, attributes_per_contract=count)


def test_each_kind_has_twenty_attributes_of_many_values_that_name_both_parties() -> None:
    """More values than contracts of the published size; all attributes have different names."""
    names = [attribute.name for kind in ATTRIBUTES.values() for attribute in kind]
    assert len(names) == len(set(names))
    for attributes in ATTRIBUTES.values():
        assert len(attributes) >= 20
        assert len({attribute.question for attribute in attributes}) == len(attributes)
        for attribute in attributes:
            assert attribute.question.count("{first}") == attribute.question.count("{second}") == 1
            generator = seeded("test", attribute.name)
            assert len({attribute.draw(generator) for _ in range(500)}) >= 25, attribute.name


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.integers(1, 24))
def test_every_question_has_one_short_answer_that_only_its_parties_determine(
    seed: int, count: int
) -> None:
    contracts = make_contracts(GRAPH, seed=seed, attributes_per_contract=count)
    records = generate_contracts(GRAPH, seed=seed, attributes_per_contract=count)
    assert generate_contracts(GRAPH, seed=seed, attributes_per_contract=count) == records
    other = generate_contracts(GRAPH, seed=seed + 1, attributes_per_contract=count)
    assert not {r.question for r in records} & {r.question for r in other}
    assert edges_of(records) == {edge.name: count for edge in GRAPH.edges}
    assert len({record.question for record in records}) == len(records)
    parties = {c.edge.name: (c.first.name, c.second.name) for c in contracts}
    for record in records:
        first, second = parties[record.edge]
        assert first in record.question
        assert second in record.question
        assert len(record.question.split()) <= 18
        assert 1 <= len(words_of(record.answer)) <= 6
        assert re.fullmatch(r"[A-Z0-9][A-Za-z0-9 ]*\.", record.answer)
        assert not words_of(record.answer) & words_of(f"{first} {second}")


@settings(max_examples=5, deadline=None)
@given(SEEDS)
def test_no_two_contracts_agree_and_a_wrong_one_answers_right_in_under_a_tenth(seed: int) -> None:
    """By the mean ROUGE-1 recall, without stemming, of each answer by the same term elsewhere."""
    values = defaultdict(list)
    for contract in make_contracts(GRAPH, seed=seed, attributes_per_contract=24):
        for attribute, value in contract.terms:
            values[attribute.name].append(value)
    assert all(len(set(drawn)) == len(drawn) for drawn in values.values())
    answers = [[words_of(value) for value in drawn] for drawn in values.values()]
    pairs = [pair for drawn in answers for pair in permutations(drawn, 2)]
    recalls = [len(truth & other) / len(truth) for truth, other in pairs]
    assert sum(recalls) / len(recalls) < 0.1


def test_one_more_edge_leaves_the_contracts_before_it_alone() -> None:
    longer = GraphSpec((*GRAPH.edges, EdgeSpec("Y", "Z")))
    records = generate_contracts(GRAPH, seed=5)
    assert generate_contracts(longer, seed=5)[: len(records)] == records


def test_a_party_keeps_its_name_in_all_its_contracts() -> None:
    by_edge = {c.edge.name: c for c in make_contracts(GRAPH, seed=3)}
    assert by_edge["A_B"].first == by_edge["A_p"].first
    assert by_edge["A_B"].second == by_edge["B_C"].first
    names = {party.name for c in by_edge.values() for party in (c.first, c.second)}
    assert len(names) == len(GRAPH.nodes)


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_no_invented_word_begins_with_another(seed: int) -> None:
    drawn = list(islice(invented_words(seeded("test", seed), syllables=2), 30))
    assert not [pair for pair in permutations(drawn, 2) if pair[0].startswith(pair[1])]


def test_running_out_of_words_is_an_error_and_not_a_repetition() -> None:
    with pytest.raises(ValueError, match="no new word of 1 syllables is left"):
        list(islice(invented_words(seeded("test", 0), syllables=1), 2000))


def test_prompts_are_different_questions_of_the_length_of_others_and_new_for_a_new_seed() -> None:
    prompts = generate_unverifiable(2000, seed=1)
    assert len(set(prompts)) == len(prompts) == 2000
    assert all(prompt.endswith("?") and 5 <= len(prompt.split()) <= 14 for prompt in prompts)
    assert generate_unverifiable(40, seed=1) == prompts[:40]
    assert not set(generate_unverifiable(500, seed=2)) & set(prompts)
    with pytest.raises(DataError, match="ask for at least 1"):
        generate_unverifiable(0, seed=1)


def test_at_least_twenty_five_templates_take_turns() -> None:
    """A prompt without the capitalised words after the first is its template."""
    prompts = [prompt.split(" ", 1) for prompt in generate_unverifiable(72, seed=4)]
    shapes = [f"{first} " + re.sub(r"\b[A-Z][a-z]+", "_", rest) for first, rest in prompts]
    assert len(set(shapes)) >= 25
    assert max(shapes.count(one) for one in shapes) == 2


# The shipped files


def records_of(name: str) -> tuple[Record, ...]:
    return read_records(resolve_data(name, kind="records"))


def prompts_of(name: str) -> tuple[str, ...]:
    return read_prompts(resolve_data(name, kind="prompts"))


def test_the_seeds_give_the_shipped_files_and_the_check_names_one_that_differs_or_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_datasets.main(["--check"]) == 0
    assert capsys.readouterr().out == ""
    folder = ["--folder", str(tmp_path / "new")]
    assert make_datasets.main(folder) == 0
    mini = tmp_path / "new" / "mini.json"
    mini.write_bytes(mini.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "new" / "contracts.json").unlink()
    capsys.readouterr()
    assert make_datasets.main([*folder, "--check"]) == 1
    said = capsys.readouterr().out
    assert "mini.json differs" in said
    assert "contracts.json differs" in said
    assert "unverifiable.json" not in said


def test_the_sets_have_the_edges_that_they_are_known_for() -> None:
    """The contracts have the published size."""
    assert edges_of(records_of("mini")) == dict.fromkeys(
        ["A_B", "B_C", "C_D", "E_F", "E_g", "E_h", "I_J", "K_m"], 12
    )
    assert list(edges_of(records_of("contracts")).values()) == [20] * 20
    factual = records_of("factual")
    assert len(factual) == 81
    assert {"geography", "science", "literature", "history"} < set(edges_of(factual))
    assert all(re.fullmatch("[A-Za-z0-9]+( [A-Za-z0-9]+){,3}", one.answer) for one in factual)


@pytest.mark.parametrize("name", bundled_names("records"))
def test_no_question_repeats_and_every_edge_can_be_forgotten_and_scored(name: str) -> None:
    records = records_of(name)
    assert len({record.question.casefold() for record in records}) == len(records)
    assert all(re.search("[a-z0-9]", record.answer.lower()) for record in records)
    for edge, count in edges_of(records).items():
        assert len(split_by_edges(records, [edge]).forget) == count


def test_shipped_prompts_are_short_and_different() -> None:
    for name, count in (("unverifiable", 200), ("harmful", 64), ("refusals", 10)):
        prompts = prompts_of(name)
        assert len(prompts) == len({prompt.casefold() for prompt in prompts}) == count
        assert max(len(prompt.split()) for prompt in prompts) <= 14
    assert all(prompt.endswith(".") for prompt in prompts_of("refusals"))


def test_the_sets_do_not_share_invented_names() -> None:
    def invented(texts: Sequence[str]) -> set[str]:
        inner = (text.split(" ", 1)[1] for text in texts)
        return {word for text in inner for word in re.findall(r"\b[A-Z][a-z]{3,}", text)}

    sets = [[one.question for one in records_of(name)] for name in ("mini", "contracts")]
    mini, contracts = map(invented, sets)
    assert not invented(prompts_of("unverifiable")) & (mini | contracts)
    assert mini & contracts <= {"Corp", "Group", "Works"}


def test_the_folder_holds_the_named_files_in_plain_json_and_no_python() -> None:
    """A Python file would let the folder shadow the package `datasets`."""
    files = {path.name for path in shipped_folder("datasets").iterdir()}
    assert files == {file_name for _, file_name in BUNDLED.values()} | {"README.md"}
    for path in shipped_folder("datasets").glob("*.json"):
        text = path.read_bytes().decode("utf-8")
        assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
