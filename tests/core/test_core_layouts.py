"""Every family: what is captured, recomputed and edited is what a full forward does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from lunar_tune.engine.streams import (
    PrefixTree,
    batches_by_length,
    block_reads,
    capture_last_tokens,
    capture_streams,
)
from lunar_tune.errors import ModelError
from lunar_tune.methods.lunar.method import edited
from lunar_tune.models.device import BatchSize
from lunar_tune.models.layout import LAYOUTS, UNSUITABLE, check_layers, decoder_slice, layout_of
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]

PROMPTS = [
    [1, 17, 40, 11],
    [1, 9],
    [1, 60, 61, 62, 63, 64, 65, 66, 67],
    [5],
    [1, 200, 17, 17, 250, 31],
]
TREE = PrefixTree(PROMPTS)
# Windows of four tokens, on all blocks or on some: cutting must keep a block's kind of attention.
SLIDING = {"sliding_window": 4}
MIXED = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
VARIANTS: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in LAYOUTS] + [
    ("mistral", SLIDING),
    ("qwen2", MIXED),
    ("qwen3", MIXED),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
]
each_variant = pytest.mark.parametrize(
    ("family", "changes"),
    VARIANTS,
    ids=["-".join((family, *changes)) for family, changes in VARIANTS],
)
each_family = pytest.mark.parametrize("family", list(LAYOUTS))


def forward(loaded: LoadedModel, prompt: list[int], **options: Any) -> Any:
    """Run the whole model on one prompt alone, without padding."""
    with torch.no_grad():
        return loaded.model(input_ids=torch.tensor([prompt]), use_cache=False, **options)


def captured(loaded: LoadedModel, budget: int = 2048) -> dict[int, torch.Tensor]:
    """Return the streams of all prompts at every point, by node."""
    return capture_streams(
        loaded, TREE, range(loaded.n_layers + 1), BatchSize(budget, "the prompts' tokens")
    )


def inputs_of(
    loaded: LoadedModel,
    streams: dict[int, torch.Tensor],
    layer: int,
    rows: list[int],
    budget: int = 2048,
) -> torch.Tensor:
    """Return what block `layer`'s down-projection reads at the tokens of some rows."""
    batch = BatchSize(budget, "the prompts' tokens")
    return block_reads(loaded, TREE, streams[layer], layer, batch).inputs[TREE.nodes_of(rows)]


@each_variant
def test_captured_streams_are_the_hidden_states_of_unpadded_prompts(
    loaded: Load, family: str, changes: dict[str, Any]
) -> None:
    model = loaded(family, **changes)
    streams = captured(model)
    assert TREE.n_rows == len(PROMPTS)
    norm = model.layout.decoder_of(model.model).norm
    for row, prompt in enumerate(PROMPTS):
        states = forward(model, prompt, output_hidden_states=True).hidden_states
        nodes = TREE.nodes_of([row])
        mine = torch.stack([streams[point][nodes] for point in range(model.n_layers + 1)])
        torch.testing.assert_close(mine[:-1], torch.stack(states[:-1])[:, 0], rtol=1e-4, atol=1e-4)
        # transformers gives the last entry after the final norm; ours is before it.
        torch.testing.assert_close(norm(mine[-1]), states[-1][0], rtol=1e-4, atol=1e-4)


@each_variant
def test_inputs_of_the_down_projection_are_those_of_a_full_forward(
    loaded: Load, family: str, changes: dict[str, Any]
) -> None:
    model = loaded(family, **changes)
    streams = captured(model)
    rows = [3, 0, 2]
    for layer in range(model.n_layers):
        seen: list[torch.Tensor] = []
        handle = model.model.model.layers[layer].mlp.down_proj.register_forward_hook(
            lambda _module, args, _output, seen=seen: seen.append(args[0][0])
        )
        for row in rows:
            forward(model, PROMPTS[row])
        handle.remove()
        mine = inputs_of(model, streams, layer, rows)
        torch.testing.assert_close(mine, torch.cat(seen), rtol=1e-4, atol=1e-4)


@each_variant
def test_a_blocks_output_is_its_residual_and_what_the_down_projection_adds(
    loaded: Load, family: str, changes: dict[str, Any]
) -> None:
    model = loaded(family, **changes)
    streams = captured(model)
    for layer in range(model.n_layers):
        reads = block_reads(model, TREE, streams[layer], layer, BatchSize(2048, "tokens"))
        down_projection = model.layout.down_projection_of(model.model, layer)
        output = reads.residual + down_projection(reads.inputs)
        torch.testing.assert_close(output, streams[layer + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 9, 14, 2048])
def test_capture_does_not_depend_on_batching(loaded: Load, budget: int) -> None:
    model = loaded("qwen2")
    together = captured(model)
    inputs = inputs_of(model, together, 1, [4, 2, 0])
    apart = captured(model, budget)
    assert apart.keys() == together.keys()
    for point, stream in apart.items():
        torch.testing.assert_close(stream, together[point], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        inputs_of(model, together, 1, [4, 2, 0], budget), inputs, rtol=1e-4, atol=1e-5
    )


def test_a_batch_never_holds_more_padded_tokens_than_its_budget_unless_one_row_does() -> None:
    lengths = [3, 1, 12, 3, 3, 5, 2]
    batches = list(batches_by_length(lengths, 10))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 10


def test_each_rows_tokens_and_its_last_one_are_known(loaded: Load) -> None:
    model = loaded("llama")
    assert TREE.token_index([1, 0]).tolist() == [4, 5, 0, 1, 2, 3]
    assert TREE.nodes_of([]).tolist() == []
    streams = captured(model)
    prompts = [PROMPTS[row] for row in (1, 0, 2)]
    last = capture_last_tokens(model, prompts, BatchSize(2048, "the prompts' tokens"))
    nodes = TREE.nodes[[5, 3, 14]]
    for point, stream in streams.items():
        torch.testing.assert_close(last[point], stream[nodes], rtol=1e-5, atol=1e-5)


@each_variant
def test_an_edited_model_is_the_model_with_that_matrix_changed_by_hand(
    loaded: Load, unchanged: Callable[[Any], None], family: str, changes: dict[str, Any]
) -> None:
    model = loaded(family, **changes)
    unchanged(model.model)
    generator = np.random.default_rng(0)
    by_hand = copy.deepcopy(model.model)
    state = by_hand.state_dict()
    weights = {}
    for layer, coefficient in ((0, 2.0), (2, -0.5)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        original = state[name].numpy().astype(np.float64)
        r, v = generator.normal(size=original.shape[0]), generator.normal(size=original.shape[1])
        weights[layer] = torch.tensor(original + coefficient * r[:, None] * v[None, :])
        state[name] = weights[layer].float()
    by_hand.load_state_dict(state)
    before = forward(model, PROMPTS[2]).logits
    with edited(model, weights):
        changed = forward(model, PROMPTS[2]).logits
    expected = by_hand(input_ids=torch.tensor([PROMPTS[2]]), use_cache=False).logits
    assert torch.equal(changed, expected)
    assert not torch.allclose(changed, before)
    assert torch.equal(forward(model, PROMPTS[2]).logits, before)


@each_family
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_weights_come_back_bit_for_bit_when_the_body_raises(
    loaded: Load, unchanged: Callable[[Any], None], family: str, kind: type[BaseException]
) -> None:
    model = loaded(family)
    unchanged(model.model)
    weight = model.layout.down_projection_of(model.model, 1).weight
    address = weight.data_ptr()

    def spoil() -> None:
        with edited(model, {1: torch.full_like(weight, float("nan"))}):
            assert bool(weight.isnan().all())
            raise kind

    with pytest.raises(kind):
        spoil()
    assert model.layout.down_projection_of(model.model, 1).weight is weight
    assert weight.data_ptr() == address


def test_a_matrix_of_the_wrong_shape_is_not_spread_over_the_weight(
    loaded: Load, unchanged: Callable[[Any], None]
) -> None:
    model = loaded("llama")
    unchanged(model.model)
    shape = model.layout.down_projection_of(model.model, 0).weight.shape
    with (
        pytest.raises(ValueError, match="shape"),
        edited(model, {0: torch.zeros(shape), 1: torch.zeros(shape[1])}),
    ):
        pytest.fail("the body ran")


@each_variant
def test_a_cut_decoder_does_what_its_blocks_do_in_a_full_forward(
    loaded: Load, family: str, changes: dict[str, Any]
) -> None:
    model = loaded(family, **changes)
    prompt = PROMPTS[2]
    full = forward(model, prompt, output_hidden_states=True)
    for start in range(model.n_layers):
        with (
            torch.no_grad(),
            decoder_slice(model.model, model.layout, start, model.n_layers) as decoder,
        ):
            states = decoder(inputs_embeds=full.hidden_states[start], use_cache=False)
        torch.testing.assert_close(
            states.last_hidden_state, full.hidden_states[-1], rtol=1e-4, atol=1e-4
        )


@each_family
def test_a_cut_decoder_is_whole_again_also_when_the_body_raises(loaded: Load, family: str) -> None:
    model = loaded(family)
    blocks = list(model.layout.blocks_of(model.model))
    config = model.model.config.to_dict()

    def cut() -> None:
        with decoder_slice(model.model, model.layout, 1, 2) as decoder:
            assert list(decoder.layers) == blocks[1:2]
            assert decoder.config.num_hidden_layers == 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        cut()
    assert list(model.layout.blocks_of(model.model)) == blocks
    assert model.model.config.to_dict() == config


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "normalises the MLP's output again"),
        ("gemma3", "normalises the MLP's output again"),
        ("gemma3_text", "normalises the MLP's output again"),
        ("olmo2", "normalises the MLP's output again"),
        ("granite", "scales"),
        ("mixtral", "mixture of experts"),
        ("qwen2_moe", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
    ],
)
def test_an_unsuitable_family_is_refused_by_name_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"{family!r} is unsuitable.*{reason}.*Suitable: llama"):
        layout_of(AutoConfig.for_model(family))
    assert family in UNSUITABLE


@pytest.mark.parametrize("family", ["gpt2", "phi", "opt"])
def test_an_unknown_family_is_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match=rf"{family!r} is unknown.*Suitable: llama"):
        layout_of(AutoConfig.for_model(family))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_a_quantised_checkpoint_is_refused_by_name(method: str) -> None:
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=rf"quantised \({method}\)"):
        layout_of(config)


def test_every_family_in_the_table_has_a_tiny_model_in_these_tests() -> None:
    assert set(LAYOUTS) == {family for family, changes in VARIANTS if not changes}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((3,), "layer 3: the model has 3 decoder blocks, numbered 0 to 2"),
        ((-1, 1, 9), "layer -1, 9: "),
        ((1, 1), "a layer is named twice"),
    ],
)
def test_layers_outside_the_model_or_named_twice_are_refused(
    layers: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        check_layers(layers, 3)
    check_layers((2, 0, 1), 3)
