"""Every family: what is captured, computed again, edited and answered is what full forwards do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import engine_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import FAMILIES
from torch import Tensor
from transformers import AutoConfig

from lunar_tune.engine import forward
from lunar_tune.engine.activations import ActivationSource, block_reads, capture_streams
from lunar_tune.engine.decoding import generate_tokens
from lunar_tune.engine.forward import KeyValues, PrefixTree, arrange, tree_forward
from lunar_tune.errors import ModelError
from lunar_tune.methods.lunar.method import edited, steered, unlearning_vectors
from lunar_tune.models.device import BatchSize
from lunar_tune.models.layout import check_layers, decoder_slice, layout_of
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]
Unchanged = Callable[[Any], None]
CPU = torch.device("cpu")
BUDGET = 12
SHIFT = torch.linspace(-3.0, 4.0, 32, dtype=torch.float64)


def window(tokens: int) -> list[tuple[str, dict[str, Any]]]:
    """Return models whose attention reaches back so far, in all blocks and in some."""
    mixed = {"use_sliding_window": True, "max_window_layers": 1}
    return [
        ("mistral", {"sliding_window": tokens}),
        *((family, {"sliding_window": tokens, **mixed}) for family in ("qwen2", "qwen3")),
    ]


BIASED = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
WHOLE: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", BIASED | {"num_key_value_heads": 1}),
    *window(64)[:2],  # longer than any row
]


def each(variants: list[tuple[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    ids = ["-".join((family, *changes)) for family, changes in variants]
    return pytest.mark.parametrize(("family", "changes"), variants, ids=ids)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@each(WHOLE + window(4))
def test_streams_and_what_blocks_read_are_those_of_unpadded_full_forwards(
    loaded: Load, unchanged: Unchanged, family: str, changes: dict[str, Any]
) -> None:
    model = loaded(family, **changes)
    unchanged(model.model)
    full = cases.full_forwards(model.model)
    few, many = BatchSize(14, "tokens"), BatchSize(2048, "tokens")
    streams = capture_streams(model, cases.TREE, range(4), few)
    close(torch.stack([streams[point] for point in range(4)]), full["streams"])
    for layer, batch in enumerate((few, many, few)):
        inputs, residual = block_reads(model, cases.TREE, streams[layer], layer, batch)
        close(inputs, full["inputs"][layer])
        close(residual, full["residual"][layer])
        down_projection = model.layout.down_projection_of(model.model, layer)
        close(residual + down_projection(inputs), streams[layer + 1])
    last = ActivationSource(model).last_tokens(cases.PROMPTS)
    ends = [cases.TREE.nodes_of([row]).tolist()[-1] for row in range(len(cases.PROMPTS))]
    close(last, full["streams"][:, ends])
    said = generate_tokens(cases.with_eos(model, cases.NEVER), cases.PROMPTS, max_new_tokens=6)
    assert said == cases.generated(model.model, cases.PROMPTS, budget=6)


@pytest.mark.parametrize("is_edited", [True, False])
@each(WHOLE)
def test_answers_are_those_of_generate_on_the_model_edited_by_hand(
    loaded: Load, unchanged: Unchanged, family: str, changes: dict[str, Any], is_edited: bool
) -> None:
    model = loaded(family, **changes)
    unchanged(model.model)
    layer = WHOLE.index((family, changes)) % 3
    weights = cases.new_weights(model, layer) if is_edited else {}
    said = cases.generated(cases.edited_by_hand(model, weights), cases.PROMPTS, budget=BUDGET)
    before = cases.generated(model.model, cases.PROMPTS, budget=6)
    ends = cases.ends_of(said)
    for eos, drafts in ((cases.NEVER, None), (ends, cases.cut_all(before, ends, 6))):
        ended, expected = cases.with_eos(model, eos), cases.cut_all(said, eos, BUDGET)
        with edited(model, weights):
            assert generate_tokens(ended, cases.PROMPTS, max_new_tokens=BUDGET) == expected
        assert (
            cases.answers_of(cases.answerer(ended, drafts=drafts), weights, budget=BUDGET)
            == expected
        )
    assert len({len(row) for row in expected}) >= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_shifts_every_position(loaded: Load, unchanged: Unchanged, family: str) -> None:
    model = cases.with_eos(loaded(family), cases.NEVER)
    unchanged(model.model)
    before = cases.full_forwards(model.model)["streams"]
    with model.model.model.layers[1].register_forward_hook(lambda _m, _a, x: x + SHIFT.float()):
        said = cases.generated(model.model, cases.PROMPTS, budget=6)
    with steered(model, 1, SHIFT):
        inside = cases.full_forwards(model.model)["streams"]
        assert generate_tokens(model, cases.PROMPTS, max_new_tokens=6) == said
        with steered(model, 1, SHIFT):
            twice = cases.full_forwards(model.model)["streams"][2]
    assert torch.equal(inside[:2], before[:2])
    assert torch.equal(inside[2], before[2] + SHIFT.float())
    assert torch.equal(twice, inside[2] + SHIFT.float())
    assert not torch.isclose(inside[3], before[3]).all(1).any()


def state_of(model: LoadedModel) -> list[Any]:
    decoder: Any = model.model.get_decoder()
    return [
        [(block, block.mlp) for block in decoder.layers],
        (model.model.config.to_dict(), model.model.config._attn_implementation),
        sum(len(module._forward_hooks) for module in model.model.modules()),
        [(id(p), p.data_ptr(), float(p.sum())) for p in model.model.parameters()],
        forward._current.get(None),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_after_errors(loaded: Load, unchanged: Unchanged, family: str) -> None:
    model = loaded(family)
    unchanged(model.model)
    before, inside = state_of(model), []

    def interrupted(*_: Any) -> None:
        inside.append(state_of(model))
        raise KeyboardInterrupt

    for context in (
        edited(model, {1: torch.zeros(32, 48)}),
        steered(model, 1, SHIFT),
        decoder_slice(model.model, model.layout, 1, 2),
    ):
        with suppress(KeyboardInterrupt), context:
            interrupted()
        assert state_of(model) == before
    (batch,) = arrange(cases.TREE, range(len(cases.PROMPTS)), budget=100, device=CPU)
    nodes, attention = cases.TREE.n_nodes, model.model.model.layers[2].self_attn
    with attention.register_forward_pre_hook(interrupted), suppress(KeyboardInterrupt):
        tree_forward(model, batch, 1, torch.zeros(nodes, 32), KeyValues(nodes))
    assert state_of(model) == before
    assert len(inside) == 4
    assert before not in inside


def test_what_lunar_cannot_edit_is_refused_by_name_with_the_reason() -> None:
    for family, message in (
        ("gemma2", "'gemma2' is unsuitable.*normalises the MLP's output again.*: llama"),
        ("gemma3_text", "'gemma3_text' is unsuitable.*normalises the MLP's output again"),
        ("granite", "'granite' is unsuitable.*scales"),
        ("mixtral", "'mixtral' is unsuitable.*mixture of experts"),
        ("gpt2", "'gpt2' is unknown.*Suitable: llama"),
    ):
        with pytest.raises(ModelError, match=message):
            layout_of(AutoConfig.for_model(family))
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"quantised \(gptq\)"):
        layout_of(config)


def test_what_does_not_fit_a_block_changes_nothing(loaded: Load, unchanged: Unchanged) -> None:
    """A matrix or a shift of width 1 would be spread over the whole."""
    model = loaded("llama")
    unchanged(model.model)
    refusals: tuple[tuple[AbstractContextManager[Any], type[Exception], str], ...] = (
        (edited(model, {0: torch.zeros(32, 48), 1: torch.zeros(48)}), ValueError, "shape"),
        (steered(model, 0, torch.ones(1)), ValueError, "width 32"),
        (steered(model, -1, SHIFT), ModelError, "3 decoder blocks"),
    )
    for context, kind, message in refusals:
        with pytest.raises(kind, match=message), context:
            pytest.fail("the body ran")
    for layers, message in (
        ((-1, 1, 9), "layer -1, 9: the model has 3 decoder blocks, numbered 0 to 2"),
        ((1, 1), "a layer is named twice"),
    ):
        with pytest.raises(ModelError, match=message):
            check_layers(layers, 3)


def test_vectors_are_differences_of_means_in_float64_also_of_half_precision_streams() -> None:
    """In bfloat16, 256 + 1 is 256: a sum in that format would lose every small row."""
    rows = torch.tensor([256.0] + [1.0] * 300, dtype=torch.bfloat16)
    reference = torch.stack([rows, rows, -rows])[..., None]
    vectors = unlearning_vectors(reference=reference, forget=reference[:, 1:2])
    difference = (256 + 300) / 301 - 1
    assert vectors.flatten().tolist() == pytest.approx([difference, -difference], abs=1e-12)


def prefixes_of(rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the prefix that ends at each token, row after row."""
    return [tuple(row[: i + 1]) for row in rows for i in range(len(row))]


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
    every = range(tree.n_nodes)
    for batch in arrange(tree, range(tree.n_rows), budget=budget, device=CPU, asked=every):
        new = batch.nodes.tolist()
        assert len(new) <= budget or len(batch.path) == 1
        computed += new
        assert batch.ids[0].tolist() == [prefix_of[node][-1] for node in new]
        assert batch.positions[0].tolist() == [len(prefix_of[node]) - 1 for node in new]
        for node in new:
            ancestors = [number[prefix_of[node][: i + 1]] for i in range(len(prefix_of[node]))]
            assert set(ancestors) <= set(computed)
    assert sorted(computed) == list(every)
    for row, sequence in enumerate(rows):
        nodes = [number[prefix] for prefix in prefixes_of([sequence])]
        assert tree.nodes_of([row]).tolist() == nodes
        assert tree.nodes_of([row, row], [1, 0]).tolist() == nodes[:1]
