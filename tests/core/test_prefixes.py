"""Distinct prefixes: how they are numbered and arranged in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.engine.forward import arrange
from lunar_tune.engine.streams import PrefixTree


def prefixes_of(rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the prefix that ends at each token, row after row."""
    return [tuple(row[: i + 1]) for row in rows for i in range(len(row))]


CPU = torch.device("cpu")
few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@given(rows=st.lists(few_tokens, min_size=1, max_size=8), budget=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_each_prefix_is_computed_once_in_order(rows: list[tuple[int, ...]], budget: int) -> None:
    tree, prefixes = PrefixTree(rows), prefixes_of(rows)
    assert tree.first.tolist() == [p not in prefixes[:i] for i, p in enumerate(prefixes)]
    number = dict(zip(prefixes, tree.nodes.tolist(), strict=True))
    assert len(number) == len(set(number.values())) == tree.n_nodes
    prefix_of = {node: prefix for prefix, node in number.items()}
    computed: list[int] = []
    for batch in arrange(
        tree, range(tree.n_rows), budget=budget, device=CPU, asked=range(tree.n_nodes)
    ):
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
