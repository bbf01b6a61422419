"""Distinct prefixes: how they are numbered, arranged in batches, and computed part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from engine_cases import TREE, full_forwards
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.engine.forward import KeyValues, TreeBatch, arrange, tree_forward
from lunar_tune.engine.streams import PrefixTree
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]


def prefixes_of(rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the prefix that ends at each token, row after row."""
    return [tuple(row[: i + 1]) for row in rows for i in range(len(row))]


few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


def arranged(
    tree: PrefixTree, budget: int, rows: Sequence[int], done: Sequence[int] = ()
) -> list[TreeBatch]:
    everything, cpu = range(tree.n_nodes), torch.device("cpu")
    return arrange(tree, rows, budget=budget, device=cpu, done=done, asked=everything)


@given(rows=st.lists(few_tokens, min_size=1, max_size=8), budget=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_each_prefix_is_computed_once_and_not_before_those_it_extends(
    rows: list[tuple[int, ...]], budget: int
) -> None:
    tree, prefixes = PrefixTree(rows), prefixes_of(rows)
    assert tree.first.tolist() == [p not in prefixes[:i] for i, p in enumerate(prefixes)]
    number = dict(zip(prefixes, tree.nodes.tolist(), strict=True))
    assert len(number) == len(set(number.values())) == tree.n_nodes
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


@pytest.mark.parametrize("budget", [1, 100])
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
