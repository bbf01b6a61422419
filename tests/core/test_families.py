"""Every family: what is captured, computed again, edited and answered is what full forwards do."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    IDS,
    NEVER,
    PROMPTS,
    TREE,
    answerer,
    answers_of,
    cut_all,
    edited_by_hand,
    ends_of,
    full_forwards,
    generated,
    new_weights,
    with_eos,
)
from random_models import FAMILIES
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoConfig

from lunar_tune.engine import forward as forward_module
from lunar_tune.engine.activations import (
    ActivationSource,
    PromptActivations,
    block_reads,
    capture_streams,
)
from lunar_tune.engine.decoding import generate_tokens
from lunar_tune.engine.forward import KeyValues, arrange, tree_forward
from lunar_tune.errors import ModelError
from lunar_tune.methods.lunar.method import edited, steered, unlearning_vectors
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.device import BatchSize
from lunar_tune.models.layout import LAYOUTS, UNSUITABLE, check_layers, decoder_slice, layout_of
from lunar_tune.models.lineage import fingerprint
from lunar_tune.models.loading import LoadedModel, load_model

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
    """Windows of four tokens too: a cut decoder must keep each block's kind of attention.

    And plain answers are those of `generate`.
    """
    model = loaded(family, **changes)
    unchanged(model.model)
    full = full_forwards(model.model)
    few, many = BatchSize(14, "tokens"), BatchSize(2048, "tokens")
    streams = capture_streams(model, TREE, range(4), few)
    close(torch.stack([streams[point] for point in range(4)]), full["streams"])
    for layer, batch in enumerate((few, many, few)):
        inputs, residual = block_reads(model, TREE, streams[layer], layer, batch)
        close(inputs, full["inputs"][layer])
        close(residual, full["residual"][layer])
        down_projection = model.layout.down_projection_of(model.model, layer)
        close(residual + down_projection(inputs), streams[layer + 1])
    last = ActivationSource(model).last_tokens(PROMPTS)
    ends = [TREE.nodes_of([row]).tolist()[-1] for row in range(len(PROMPTS))]
    close(last, full["streams"][:, ends])
    never = with_eos(model, NEVER)
    assert generate_tokens(never, PROMPTS, max_new_tokens=6) == generated(
        model.model, PROMPTS, budget=6
    )


@pytest.mark.parametrize("is_edited", [True, False])
@each(WHOLE)
def test_a_forward_over_prefixes_is_full_forwards_of_the_model_edited_by_hand(
    loaded: Load, unchanged: Unchanged, family: str, changes: dict[str, Any], is_edited: bool
) -> None:
    """From above the edited block on, or from the tokens on."""
    model = loaded(family, **changes)
    unchanged(model.model)
    layer = WHOLE.index((family, changes)) % 3
    weights = new_weights(model, layer) if is_edited else {}
    by_hand = edited_by_hand(model, weights)
    full = full_forwards(by_hand)
    start, stream = 0, None
    if is_edited:
        reads = PromptActivations(ActivationSource(model), PROMPTS).reads(layer)
        start, stream = layer + 1, reads.residual + linear(reads.inputs, weights[layer])
    keys, logits = KeyValues(TREE.n_nodes), full["logits"][0].clone().zero_()
    with edited(model, {layer: weight.double() for layer, weight in weights.items()}):
        assert torch.equal(model.model(IDS).logits, by_hand(IDS).logits)
        for batch in arrange(
            TREE, range(len(PROMPTS)), budget=6, device=CPU, asked=range(TREE.n_nodes)
        ):
            hidden = tree_forward(model, batch, start, stream, keys)
            logits[batch.nodes[batch.asked]] = model.model.get_output_embeddings()(hidden)
    close(logits, full["logits"][0])
    assert set(keys.keys) == set(keys.values) == set(range(start, 3))
    for block in keys.keys:
        close(keys.keys[block], full["keys"][block])
        close(keys.values[block], full["values"][block])


@pytest.mark.parametrize("is_edited", [True, False])
@each(WHOLE)
def test_answers_are_those_of_generate_on_the_model_edited_by_hand(
    loaded: Load, unchanged: Unchanged, family: str, changes: dict[str, Any], is_edited: bool
) -> None:
    """Plain decoding and the engine's; to the budget, and with drafts to other ends."""
    model = loaded(family, **changes)
    unchanged(model.model)
    layer = WHOLE.index((family, changes)) % 3
    weights = new_weights(model, layer) if is_edited else {}
    said = generated(edited_by_hand(model, weights), PROMPTS, budget=BUDGET)
    before = generated(model.model, PROMPTS, budget=6)
    for eos, drafts in ((NEVER, None), (ends_of(said), cut_all(before, ends_of(said), 6))):
        ended, expected = with_eos(model, eos), cut_all(said, eos, BUDGET)
        with edited(model, weights):
            assert generate_tokens(ended, PROMPTS, max_new_tokens=BUDGET) == expected
        assert answers_of(answerer(ended, drafts=drafts), weights, budget=BUDGET) == expected
    assert len({len(row) for row in expected}) >= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_adds_the_shift_after_one_block_at_every_position_generated_ones_too(
    loaded: Load, unchanged: Unchanged, family: str
) -> None:
    model = with_eos(loaded(family), NEVER)
    unchanged(model.model)
    before = full_forwards(model.model)["streams"]
    with model.model.model.layers[1].register_forward_hook(
        lambda _module, _args, output: output + SHIFT.float()
    ):
        said = generated(model.model, PROMPTS, budget=6)
    with steered(model, 1, SHIFT):
        inside = full_forwards(model.model)["streams"]
        assert generate_tokens(model, PROMPTS, max_new_tokens=6) == said
        with steered(model, 1, SHIFT):
            twice = full_forwards(model.model)["streams"][2]
    assert torch.equal(inside[:2], before[:2])
    assert torch.equal(inside[2], before[2] + SHIFT.float())
    assert torch.equal(twice, inside[2] + SHIFT.float())
    assert not torch.isclose(inside[3], before[3]).all(1).any()
    assert torch.equal(full_forwards(model.model)["streams"], before)


def state_of(model: LoadedModel) -> Mapping[str, Any]:
    """Return what a context may have changed."""
    decoder: Any = model.model.get_decoder()
    return {
        "blocks": list(decoder.layers),
        "mlps": [block.mlp for block in decoder.layers],
        "configuration": model.model.config.to_dict(),
        "attention": model.model.config._attn_implementation,
        "hooks": sum(len(module._forward_hooks) for module in model.model.modules()),
        "weights": [(id(p), p.data_ptr(), float(p.sum())) for p in model.model.parameters()],
        "batch": forward_module._current.get(None),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_as_it_was_though_the_body_raises(
    loaded: Load, unchanged: Unchanged, family: str
) -> None:
    model = loaded(family)
    unchanged(model.model)
    before = state_of(model)
    inside: list[Mapping[str, Any]] = []
    contexts: tuple[Callable[[], AbstractContextManager[Any]], ...] = (
        lambda: edited(model, {1: torch.zeros(32, 48)}),
        lambda: steered(model, 1, SHIFT),
        lambda: decoder_slice(model.model, model.layout, 1, 2),
    )

    def spoil(
        context: Callable[[], AbstractContextManager[Any]], kind: type[BaseException]
    ) -> None:
        with context():
            inside.append(state_of(model))
            raise kind

    for context in contexts:
        for kind in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(kind):
                spoil(context, kind)
            assert state_of(model) == before
    (batch,) = arrange(TREE, range(len(PROMPTS)), budget=100, device=CPU)
    stream, keys = torch.zeros(TREE.n_nodes, 32), KeyValues(TREE.n_nodes)
    for start in range(3):
        with (
            before["blocks"][2].self_attn.register_forward_pre_hook(
                lambda *_: inside.append(state_of(model)) or 1 / 0
            ),
            pytest.raises(ZeroDivisionError),
        ):
            tree_forward(model, batch, start, stream, keys)
        assert state_of(model) == before
    assert len(inside) == 9
    assert before not in inside


def test_fingerprints_tell_families_apart_and_not_loads_or_places(
    loaded: Load, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert set(FAMILIES) == set(LAYOUTS)
    prints = {family: fingerprint(loaded(family)) for family in FAMILIES}
    assert len(set(prints.values())) == len(FAMILIES)
    assert {len(one) for one in prints.values()} == {64}
    for family, one in prints.items():
        copied = shutil.copytree(checkpoint(family), tmp_path / family)
        again = load_model(ModelSpec(name="another", source=str(copied), device="cpu"))
        assert fingerprint(again) == one


# Refusals


def test_what_lunar_cannot_edit_is_refused_by_name_with_the_reason() -> None:
    unsuitable = {
        "normalises the MLP's output again": ("gemma2", "gemma3", "gemma3_text", "olmo2"),
        "scales": ("granite",),
        "mixture of experts": ("mixtral", "qwen2_moe", "qwen3_moe"),
    }
    for reason, families in unsuitable.items():
        for family in families:
            with pytest.raises(ModelError, match=rf"{family!r} is unsuitable.*{reason}.*: llama"):
                layout_of(AutoConfig.for_model(family))
    assert set(UNSUITABLE) >= {family for families in unsuitable.values() for family in families}
    for family in ("gpt2", "phi", "opt"):
        with pytest.raises(ModelError, match=rf"{family!r} is unknown.*Suitable: llama"):
            layout_of(AutoConfig.for_model(family))
    for method in ("bitsandbytes", "gptq", "fp8"):
        config = AutoConfig.for_model("llama", quantization_config={"quant_method": method})
        with pytest.raises(ModelError, match=rf"quantised \({method}\)"):
            layout_of(config)


def test_what_does_not_fit_a_block_is_refused_and_changes_nothing(
    loaded: Load, unchanged: Unchanged
) -> None:
    """A matrix or a shift of width 1 would be spread over the whole."""
    model = loaded("llama")
    unchanged(model.model)
    before = state_of(model)
    refusals: tuple[tuple[AbstractContextManager[Any], type[Exception], str], ...] = (
        (edited(model, {0: torch.zeros(32, 48), 1: torch.zeros(48)}), ValueError, "shape"),
        (steered(model, 0, torch.ones(1)), ValueError, "width 32"),
        (steered(model, 3, SHIFT), ModelError, "3 decoder blocks"),
        (steered(model, -1, SHIFT), ModelError, "3 decoder blocks"),
    )
    for context, kind, message in refusals:
        with pytest.raises(kind, match=message), context:
            pytest.fail("the body ran")
    assert state_of(model) == before
    check_layers((2, 0, 1), 3)
    for layers, message in (
        ((3,), "layer 3: the model has 3 decoder blocks, numbered 0 to 2"),
        ((-1, 1, 9), "layer -1, 9: "),
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
    assert vectors.tolist() == [
        [pytest.approx(difference, abs=1e-12)],
        [pytest.approx(-difference, abs=1e-12)],
    ]
