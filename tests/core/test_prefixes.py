"""Distinct prefixes: how they are numbered, arranged in batches, and computed part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from engine_cases import TREE, full_forwards
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.engine.activations import batches_by_length
from lunar_tune.engine.forward import KeyValues, PrefixTree, TreeBatch, arrange, tree_forward
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]


def prefixes_of(rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the prefix that ends at each token, row after row."""
    return [tuple(row[: i + 1]) for row in rows for i in range(len(row))]


few_tokens = st.lists(st.integers(0, 2), max_size=6).map(tuple)


@given(rows=st.lists(few_tokens, max_size=8))
@settings(max_examples=50, deadline=None)
def test_nodes_are_the_distinct_prefixes_and_first_marks_where_each_is_met(
    rows: list[tuple[int, ...]],
) -> None:
    tree = PrefixTree(rows)
    prefixes = prefixes_of(rows)
    nodes = tree.nodes.tolist()
    assert tree.n_nodes == len(set(prefixes))
    assert sorted(set(nodes)) == list(range(tree.n_nodes))
    of_node = dict(zip(nodes, prefixes, strict=True))
    assert [of_node[node] for node in nodes] == prefixes
    assert tree.first.tolist() == [p not in prefixes[:i] for i, p in enumerate(prefixes)]


def arranged(
    tree: PrefixTree, budget: int, rows: Sequence[int], done: Sequence[int] = ()
) -> list[TreeBatch]:
    everything, cpu = range(tree.n_nodes), torch.device("cpu")
    return arrange(tree, rows, budget=budget, device=cpu, done=done, asked=everything)


@given(rows=st.lists(few_tokens.filter(bool), min_size=1, max_size=8), budget=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_each_prefix_is_computed_once_and_not_before_those_it_extends(
    rows: list[tuple[int, ...]], budget: int
) -> None:
    tree = PrefixTree(rows)
    number = dict(zip(prefixes_of(rows), tree.nodes.tolist(), strict=True))
    prefix_of = {node: prefix for prefix, node in number.items()}
    computed: list[int] = []
    for batch in arranged(tree, budget, range(tree.n_rows)):
        new = batch.nodes.tolist()
        assert len(new) <= budget or len(batch.path) == 1
        computed += new
        assert batch.ids[0].tolist() == [prefix_of[node][-1] for node in new]
        assert batch.positions[0].tolist() == [len(prefix_of[node]) - 1 for node in new]
        for node in new:
            ancestors = [number[prefix_of[node][: i + 1]] for i in range(len(prefix_of[node]))]
            assert set(ancestors) <= set(computed)
    assert sorted(computed) == list(range(tree.n_nodes))
    for row, sequence in enumerate(rows):
        nodes = [number[prefix] for prefix in prefixes_of([sequence])]
        assert tree.nodes_of([row]).tolist() == nodes
        assert tree.nodes_of([row, row], [1, 0]).tolist() == nodes[:1]


def test_a_batch_never_holds_more_padded_tokens_than_its_budget_unless_one_row_does() -> None:
    lengths = [3, 1, 12, 3, 3, 5, 2]
    batches = list(batches_by_length(lengths, 10))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 10


@pytest.mark.parametrize("budget", [1, 3, 100])
def test_rows_that_come_later_go_on_from_what_earlier_ones_left(loaded: Load, budget: int) -> None:
    """Rows 0 and 2 extend row 1; only their own ends are computed then."""
    model = loaded("llama")
    expected = full_forwards(model.model)["logits"][0]
    keys = KeyValues(TREE.n_nodes)
    seen: list[int] = []
    for rows in ([1, 6], [2, 6, 0]):
        for batch in arranged(TREE, budget, rows, done=list(seen)):
            hidden = tree_forward(model, batch, 0, None, keys)
            logits = model.model.get_output_embeddings()(hidden)
            seen += batch.nodes.tolist()
            torch.testing.assert_close(logits, expected[batch.nodes], rtol=1e-4, atol=1e-4)
    assert len(seen) == len(set(seen))
    assert set(seen) == set(TREE.nodes_of([0, 1, 2, 6]).tolist())
