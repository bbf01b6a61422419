"""Every family: what is captured, computed again, edited and answered is what full forwards do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import engine_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import BIASED, FAMILIES
from scores_by_hand import likelihood_alone
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from lunar_tune.engine import forward
from lunar_tune.engine.activations import ActivationSource, block_reads, capture_streams
from lunar_tune.engine.decoding import generate_tokens
from lunar_tune.engine.forward import KeyValues, PrefixTree, arrange, tree_forward
from lunar_tune.errors import ModelError
from lunar_tune.methods.lunar.method import edited, steered, unlearning_vectors
from lunar_tune.metrics.likelihood import LikelihoodScorer
from lunar_tune.models.device import BatchSize, DeviceMemory
from lunar_tune.models.layout import check_layers, decoder_slice, layout_of, why_not_resumable
from lunar_tune.models.loading import LoadedModel
from lunar_tune.reference import greedy_answers
from lunar_tune.training.answer_loss import Pair

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


WHOLE: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", BIASED | {"num_key_value_heads": 1}),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}),  # a block without positions above others
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
    assert len({len(row) for row in expected}) >= 3


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **more}}


def longrope(length: int, **more: Any) -> dict[str, Any]:
    factors = {"short_factor": [1.0, 2.0, 1.5, 1.2], "long_factor": [4.0, 3.0, 5.0, 7.0]}
    before = {"original_max_position_embeddings": length}
    return rope("longrope", **(factors | before | more)) | before


TRAINED = {"factor": 4.0, "original_max_position_embeddings": 8}
ROPES = {
    "default": rope("default"),
    "linear": rope("linear", factor=4.0),
    "dynamic": rope("dynamic", factor=4.0),
    "yarn": rope("yarn", **TRAINED),
    "llama3": rope("llama3", **TRAINED, low_freq_factor=1.0, high_freq_factor=4.0),
    "longrope": longrope(512),
}
PARTIAL = {"short_factor": [1.0, 2.0], "long_factor": [4.0, 3.0], "partial_rotary_factor": 0.5}
TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FEW, ALL = ("llama", "smollm3", "gemma", "qwen3"), FAMILIES
# Every flag that a family's configuration declares and that changes arithmetic, in turn.
FLAGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "attention_bias": (FEW, {"attention_bias": True}),
    "mlp_bias": (FEW[:2], {"mlp_bias": True}),
    "granite-code": (FEW[:1], BIASED),
    "tie_word_embeddings": (ALL, {"tie_word_embeddings": True}),
    "head_dim": (ALL, {"head_dim": 16}),
    "num_key_value_heads": (ALL, {"num_key_value_heads": 4}),
    "hidden_act": (ALL, {"hidden_act": "relu"}),
    "rms_norm_eps": (ALL, {"rms_norm_eps": 0.5}),
    **{kind: (("llama", "phi3")[: 1 + ("long" in kind)], ROPES[kind]) for kind in ROPES},
    "partial": (("phi3",), longrope(512, **PARTIAL)),
    "sliding_window": (("mistral", "phi3"), {"sliding_window": 4}),
    "layer_types": (
        ("qwen2", "qwen3", "smollm3"),
        {"sliding_window": 4, "use_sliding_window": True, **TYPES},
    ),
    "no_rope_layers": (("smollm3",), {"no_rope_layers": [0, 1, 0]}),
    "no_rope_layer_interval": (
        ("smollm3",),  # which gives the blocks without positions the window
        {"no_rope_layer_interval": 2, "sliding_window": 4, "use_sliding_window": True},
    ),
    "nothing": (
        ("llama", "phi3"),  # what is read, and changes no answer
        {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "pretraining_tp": 2}
        | {"use_cache": False, "return_dict": False},
    ),
}
SHAPES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"} | {
    *("num_attention_heads", "max_position_embeddings", "use_sliding_window", "max_window_layers"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    *("original_max_position_embeddings", "rope_parameters"),  # of all kinds above
    "use_bidirectional_attention",  # refused
}


def test_every_key_of_a_family_is_known() -> None:
    """A newer transformers may read more: then it must be computed, or refused."""
    tried = {name for _, changes in FLAGS.values() for name in changes}
    base = set(PreTrainedConfig().to_dict())
    for family in FAMILIES:
        assert set(AutoConfig.for_model(family).to_dict()) - base <= tried | SHAPES


@pytest.mark.parametrize(
    ("family", "flag"),
    [(family, flag) for flag, (families, _) in FLAGS.items() for family in families],
)
def test_a_flag_is_computed_as_transformers_computes_it(
    loaded: Load, unchanged: Unchanged, family: str, flag: str
) -> None:
    """Each row alone by `generate`; two blocks are edited, or the base model judges answers."""
    model = cases.with_eos(loaded(family, **({"drawn": True} | FLAGS[flag][1])), cases.NEVER)
    unchanged(model.model)
    weights = cases.new_weights(model, 0, 2)
    by_hand = cases.edited_by_hand(model, weights)
    by_hand.config.return_dict = by_hand.config.use_cache = True
    expected = cases.generated(by_hand, cases.PROMPTS, budget=BUDGET, alone=True)
    with edited(model, weights):
        assert generate_tokens(model, cases.PROMPTS, max_new_tokens=BUDGET) == expected
        page = partial(greedy_answers, model.model, eos_ids=[], max_new_tokens=BUDGET)
        assert page(cases.PROMPTS) == expected
    if why_not_resumable(model.model.config, 9 + BUDGET) is None:
        assert cases.answers_of(cases.answerer(model), weights, budget=BUDGET) == expected
    else:
        assert "sliding_window" in FLAGS[flag][1]
    pairs = [Pair(prompt, (*range(30, 33 + i), 2)) for i, prompt in enumerate(cases.PROMPTS)]
    found = LikelihoodScorer(model, DeviceMemory(CPU)).score(pairs)
    for one, other in zip(found, (likelihood_alone(model.model, p) for p in pairs), strict=True):
        assert one.ranks == other.ranks
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_a_penalty_of_the_model_is_no_part_of_greedy_answers(loaded: Load) -> None:
    model = cases.with_eos(loaded("llama"), cases.NEVER)
    page = partial(greedy_answers, model.model, eos_ids=[], max_new_tokens=BUDGET)
    expected, own = page(cases.PROMPTS), model.model.generation_config
    said = {token for row in expected for token in row}
    penalties = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "suppress_tokens": [*said]}
    changed = copy.deepcopy(own)
    changed.update(**penalties, forced_eos_token_id=2, num_beams=2)
    model.model.generation_config = changed
    try:
        assert cases.generated(model.model, cases.PROMPTS, budget=BUDGET) != expected
        assert page(cases.PROMPTS) == expected
        assert generate_tokens(model, cases.PROMPTS, max_new_tokens=BUDGET) == expected
        assert model.model.generation_config is changed
    finally:
        model.model.generation_config = own


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


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *(("llama", {name: value}) for name, value in {
            "embedding_multiplier": 12.0, "attention_multiplier": 0.01, "logits_scaling": 8.0,
            "residual_multiplier": 0.22, "logit_scale": 0.06, "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 224, "scale_emb": 12,
            "clip_qkv": 8.0, "alibi": True, "use_parallel_residual": True, "attention_sinks": 4,
            "attention_chunk_size": 64, "no_rope_layers": [0, 1], "use_mrope": True,
            "sliding_window": 4, "partial_rotary_factor": 0.5,
        }.items()),
        ("mistral", rope("linear", factor=2.0, partial_rotary_factor=0.5)),
        ("qwen2", rope("default", mrope_section=[1, 1, 2])),
        ("qwen2", TYPES),
        ("mistral", TYPES),
        ("gemma", {"use_bidirectional_attention": True}),
    ],
)  # fmt: skip
def test_a_flag_that_is_not_computed_is_refused_by_name(
    family: str, changes: dict[str, Any]
) -> None:
    (name,) = changes
    inside = [*changes.get("rope_parameters", {name: 0})][-1]
    with pytest.raises(ModelError, match=rf"config\.json.*{inside}.*not the model that was"):
        layout_of(AutoConfig.for_model(family, num_hidden_layers=3, **changes))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 28}),
        ("llama", {"layer_types": ["full_attention"] * 32, "rope_interleaved": False}),
        ("llama", {"logits_scaling": 1.0, "final_logit_softcapping": None, "alibi": False}),
        ("phi3", {"partial_rotary_factor": 1.0, "lm_head_bias": False, "interpolate_factor": 1}),
    ],
)
def test_keys_that_change_nothing_are_no_reason(family: str, changes: dict[str, Any]) -> None:
    layout_of(AutoConfig.for_model(family, **changes))


@pytest.mark.parametrize(
    "changes", [{"max_position_embeddings": 20, **ROPES["dynamic"]}, longrope(20)]
)
def test_rows_that_would_change_each_others_positions_are_refused(
    loaded: Load, changes: dict[str, Any]
) -> None:
    """Up to the length that the model was trained with each row is what it is alone."""
    model = cases.with_eos(loaded("llama", **changes), cases.NEVER)
    prompts, most = cases.PROMPTS, 20 - max(map(len, cases.PROMPTS))
    expected = cases.generated(model.model, prompts, budget=most, alone=True)
    assert generate_tokens(model, prompts, max_new_tokens=most) == expected
    assert cases.answers_of(cases.answerer(model), {}, budget=most) == expected
    with pytest.raises(ModelError, match=r"beyond 20 tokens, and a prompt .* may have 21"):
        generate_tokens(model, prompts, max_new_tokens=most + 1)


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
