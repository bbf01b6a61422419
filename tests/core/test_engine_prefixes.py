"""Distinct prefixes, and a forward over them, against full forwards of single unpadded rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from transformers import DynamicCache

from lunar_tune.engine import forward as tree_module
from lunar_tune.engine.forward import KeyValues, TreeBatch, arrange, tree_forward
from lunar_tune.engine.prompt_activations import ActivationSource, PromptActivations
from lunar_tune.engine.streams import PrefixTree
from lunar_tune.methods.lunar.method import edited
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]

# Rows that share beginnings, end inside others, stand there twice, or are alone.
ROWS = (
    (1, 17, 40, 11),
    (1, 17, 40, 11, 5, 9, 200),
    (1, 17, 40, 30),
    (1, 9),
    (1, 17, 40, 11),
    (1, 60, 61, 62, 63, 64, 65, 66, 67),
    (5,),
    (5, 6, 7, 250),
)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in LAYOUTS),
    ("mistral", {"sliding_window": 64}),  # longer than any row
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
]
each_variant = pytest.mark.parametrize(
    ("family", "changes"),
    VARIANTS,
    ids=["-".join((family, *changes)) for family, changes in VARIANTS],
)


# Numbering


def prefixes_of(rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the prefix that ends at each token, row after row."""
    return [tuple(row[: i + 1]) for row in rows for i in range(len(row))]


few_tokens = st.lists(st.integers(0, 2), max_size=6).map(tuple)


@given(rows=st.lists(few_tokens, max_size=8))
@settings(max_examples=80, deadline=None)
def test_nodes_are_the_distinct_prefixes_and_first_marks_where_each_is_met(
    rows: list[tuple[int, ...]],
) -> None:
    tree = PrefixTree(rows)
    prefixes = prefixes_of(rows)
    nodes = tree.nodes.tolist()
    assert tree.n_nodes == len(set(prefixes))
    assert len(nodes) == len(prefixes)
    assert sorted(set(nodes)) == list(range(tree.n_nodes))
    of_node = dict(zip(nodes, prefixes, strict=True))
    assert [of_node[node] for node in nodes] == prefixes
    assert tree.first.tolist() == [p not in prefixes[:i] for i, p in enumerate(prefixes)]


@given(data=st.data(), rows=st.lists(few_tokens, min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_rows_have_the_nodes_of_their_tokens_whole_or_from_the_first_on(
    data: st.DataObject, rows: list[tuple[int, ...]]
) -> None:
    tree = PrefixTree(rows)
    number = dict(zip(prefixes_of(rows), tree.nodes.tolist(), strict=True))
    asked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5))
    whole = [number[prefix] for row in asked for prefix in prefixes_of([rows[row]])]
    assert tree.nodes_of(asked).tolist() == whole
    lengths = [data.draw(st.integers(0, len(rows[row]))) for row in asked]
    cut = [rows[row][:length] for row, length in zip(asked, lengths, strict=True)]
    assert tree.nodes_of(asked, lengths).tolist() == [number[prefix] for prefix in prefixes_of(cut)]
    assert tree.n_rows == len(rows)
    assert tree.lengths == tuple(map(len, rows))


def test_a_tree_of_nothing_has_no_nodes() -> None:
    for rows in ([], [()]):
        tree = PrefixTree(rows)
        assert (tree.n_nodes, tree.nodes.tolist()) == (0, [])


# Arranging


def arranged(
    tree: PrefixTree, *, budget: int, asked: set[int] | None = None, rows: Sequence[int] = ()
) -> list[TreeBatch]:
    return arrange(
        tree,
        list(rows) or range(tree.n_rows),
        budget=budget,
        device=torch.device("cpu"),
        asked=range(tree.n_nodes) if asked is None else asked,
    )


@given(rows=st.lists(few_tokens.filter(bool), min_size=1, max_size=8), budget=st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_each_prefix_is_computed_once_and_not_before_those_it_extends(
    rows: list[tuple[int, ...]], budget: int
) -> None:
    tree = PrefixTree(rows)
    number = dict(zip(prefixes_of(rows), tree.nodes.tolist(), strict=True))
    prefix_of = {node: prefix for prefix, node in number.items()}
    computed: list[int] = []
    for batch in arranged(tree, budget=budget):
        new = batch.nodes.tolist()
        assert len(new) <= budget or len(batch.path) == 1
        computed += new
        assert batch.ids[0].tolist() == [prefix_of[node][-1] for node in new]
        assert batch.positions[0].tolist() == [len(prefix_of[node]) - 1 for node in new]
        for node in new:
            ancestors = [number[prefix_of[node][: i + 1]] for i in range(len(prefix_of[node]))]
            assert set(ancestors) <= set(computed)
    assert sorted(computed) == list(range(tree.n_nodes))


# The forward

TREE = PrefixTree(ROWS)
PREFIXES = dict(zip(TREE.nodes.tolist(), prefixes_of(ROWS), strict=True))


def new_weight(loaded: LoadedModel, layer: int) -> Tensor:
    """Return a down-projection that is far from the model's own."""
    weight = loaded.layout.down_projection_of(loaded.model, layer).weight
    generator = torch.Generator().manual_seed(layer)
    return weight + 0.3 * torch.randn(weight.shape, generator=generator)


def full_forwards(
    loaded: LoadedModel, layer: int, weight: Tensor
) -> tuple[dict[int, Tensor], dict[int, list[tuple[Tensor, Tensor]]]]:
    """Return logits, and keys and values of each block, by node: each row forward on its own."""
    by_hand = copy.deepcopy(loaded.model)
    state = by_hand.state_dict()
    state[f"model.layers.{layer}.mlp.down_proj.weight"] = weight
    by_hand.load_state_dict(state, assign=True)
    logits: dict[int, Tensor] = {}
    keys: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for row, sequence in enumerate(ROWS):
        with torch.no_grad():
            output = by_hand(
                input_ids=torch.tensor([sequence]), past_key_values=DynamicCache(), use_cache=True
            )
        kept = output.past_key_values.layers
        for place, node in enumerate(TREE.nodes_of([row]).tolist()):
            logits[node] = output.logits[0, place]
            keys[node] = [(one.keys[0, :, place], one.values[0, :, place]) for one in kept]
    return logits, keys


def forward_above(
    loaded: LoadedModel, layer: int, weight: Tensor, keys: KeyValues, *, budget: int = 100
) -> dict[int, Tensor]:
    """Return logits by node, from what the edited block's MLP reads in the base model."""
    reads = PromptActivations(ActivationSource(loaded), ROWS).reads(layer)
    # Rows that stand there twice are one row to a worker; here their nodes are the same.
    assert len(reads.inputs) == TREE.n_nodes
    stream = reads.residual + linear(reads.inputs, weight)
    logits = {}
    for batch in arranged(TREE, budget=budget):
        with edited(loaded, {layer: weight}):
            hidden = tree_forward(loaded, batch, layer + 1, stream, keys)
        head = loaded.model.get_output_embeddings()
        logits |= dict(zip(batch.nodes[batch.asked].tolist(), head(hidden), strict=True))
    return logits


@each_variant
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_above_an_edited_block_logits_keys_and_values_are_those_of_full_forwards(
    loaded: Load,
    unchanged: Callable[[Any], None],
    family: str,
    changes: dict[str, Any],
    layer: int,
) -> None:
    model = loaded(family, **changes)
    unchanged(model.model)
    weight = new_weight(model, layer)
    expected, expected_keys = full_forwards(model, layer, weight)
    keys = KeyValues(TREE.n_nodes)
    logits = forward_above(model, layer, weight, keys)
    assert set(logits) == set(expected) == set(range(TREE.n_nodes))
    for node, row in logits.items():
        torch.testing.assert_close(row, expected[node], rtol=1e-4, atol=1e-4)
    assert set(keys.keys) == set(keys.values) == set(range(layer + 1, model.n_layers))
    for block in keys.keys:
        for node in range(TREE.n_nodes):
            key, value = expected_keys[node][block]
            torch.testing.assert_close(keys.keys[block][node], key, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(keys.values[block][node], value, rtol=1e-4, atol=1e-4)


@each_variant
def test_from_the_tokens_on_logits_keys_and_values_are_those_of_full_forwards(
    loaded: Load, family: str, changes: dict[str, Any]
) -> None:
    model = loaded(family, **changes)
    weight = model.layout.down_projection_of(model.model, 0).weight
    expected, expected_keys = full_forwards(model, 0, weight)
    keys = KeyValues(TREE.n_nodes)
    for batch in arranged(TREE, budget=6):
        hidden = tree_forward(model, batch, 0, None, keys)
        logits = model.model.get_output_embeddings()(hidden)
        for node, row in zip(batch.nodes[batch.asked].tolist(), logits, strict=True):
            torch.testing.assert_close(row, expected[node], rtol=1e-4, atol=1e-4)
    for block in range(model.n_layers):
        key = torch.stack([expected_keys[node][block][0] for node in range(TREE.n_nodes)])
        torch.testing.assert_close(keys.keys[block], key, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 3, 7, 100])
def test_logits_do_not_depend_on_how_prefixes_are_batched(loaded: Load, budget: int) -> None:
    model = loaded("qwen2")
    weight = new_weight(model, 1)
    whole = forward_above(model, 1, weight, KeyValues(TREE.n_nodes))
    parts = forward_above(model, 1, weight, KeyValues(TREE.n_nodes), budget=budget)
    for node, row in whole.items():
        torch.testing.assert_close(parts[node], row, rtol=1e-4, atol=1e-4)


def test_rows_that_come_later_go_on_from_what_earlier_ones_left(loaded: Load) -> None:
    """Rows 2 and 7 extend prefixes of rows 1 and 6; only their own ends are computed then."""
    model = loaded("llama")
    expected, _ = full_forwards(model, 0, model.layout.down_projection_of(model.model, 0).weight)
    keys, everything = KeyValues(TREE.n_nodes), range(TREE.n_nodes)
    seen: list[int] = []
    for rows in ([1, 6], [2, 7, 0]):
        for batch in arrange(
            TREE, rows, budget=100, device=model.device, done=list(seen), asked=everything
        ):
            hidden = tree_forward(model, batch, 0, None, keys)
            logits = model.model.get_output_embeddings()(hidden)
            seen += batch.nodes.tolist()
            for node, row in zip(batch.nodes.tolist(), logits, strict=True):
                torch.testing.assert_close(row, expected[node], rtol=1e-4, atol=1e-4)
    assert len(seen) == len(set(seen))
    assert {PREFIXES[node] for node in seen} == set(prefixes_of([ROWS[i] for i in (1, 6, 2, 7)]))


def test_only_what_is_asked_is_returned_and_it_is_the_same(loaded: Load) -> None:
    model = loaded("gemma")
    expected, _ = full_forwards(model, 0, model.layout.down_projection_of(model.model, 0).weight)
    asked = {TREE.nodes_of([row]).tolist()[-1] for row in (0, 1, 7)}
    keys = KeyValues(TREE.n_nodes)
    found: dict[int, Tensor] = {}
    for batch in arranged(TREE, budget=8, asked=asked):
        hidden = tree_forward(model, batch, 0, None, keys)
        assert len(hidden) == len(batch.asked)
        logits = model.model.get_output_embeddings()(hidden)
        found |= dict(zip(batch.nodes[batch.asked].tolist(), logits, strict=True))
    assert set(found) == asked
    for node, row in found.items():
        torch.testing.assert_close(row, expected[node], rtol=1e-4, atol=1e-4)


def test_a_part_of_the_blocks_keeps_the_keys_of_that_part(loaded: Load) -> None:
    model = loaded("qwen3")
    weight = model.layout.down_projection_of(model.model, 0).weight
    _, expected = full_forwards(model, 0, weight)
    keys = KeyValues(TREE.n_nodes)
    for batch in arranged(TREE, budget=9, asked=set()):
        tree_forward(model, batch, 0, None, keys, stop=2)
    assert set(keys.keys) == {0, 1}
    for block in (0, 1):
        for node in range(TREE.n_nodes):
            torch.testing.assert_close(
                keys.keys[block][node], expected[node][block][0], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("family", list(LAYOUTS))
@pytest.mark.parametrize("start", [0, 1, 2])
def test_attention_and_mlp_are_put_back_also_when_a_block_raises(
    loaded: Load, family: str, start: int
) -> None:
    model = loaded(family)
    blocks = list(model.layout.blocks_of(model.model))
    mlps = [block.mlp for block in blocks]
    config = model.model.config.to_dict()
    attention = model.model.config._attn_implementation
    before = model.model(input_ids=torch.tensor([ROWS[1]]), use_cache=False).logits

    def fail(_module: Any, _args: Any) -> None:
        assert model.model.config._attn_implementation != attention
        raise RuntimeError("out of paper")

    stream = torch.zeros(TREE.n_nodes, model.model.config.hidden_size)
    (batch,) = arranged(TREE, budget=100)
    handle = blocks[-1].self_attn.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of paper"):
            tree_forward(model, batch, start, stream, KeyValues(TREE.n_nodes))
    finally:
        handle.remove()
    assert list(model.layout.blocks_of(model.model)) == blocks
    assert [block.mlp for block in blocks] == mlps
    assert model.model.config._attn_implementation == attention
    assert model.model.config.to_dict() == config
    assert tree_module._current.get(None) is None
    after = model.model(input_ids=torch.tensor([ROWS[1]]), use_cache=False).logits
    assert torch.equal(after, before)
