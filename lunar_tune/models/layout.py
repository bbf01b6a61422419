"""Where the decoder blocks and their MLP down-projections are, by `config.model_type`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lunar_tune.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Attribute paths of a family's parts, seen from its causal language model."""

    decoder: str = "model"  # the decoder stack: embeddings, blocks, final norm
    blocks: str = "layers"  # the list of blocks inside the decoder
    final_norm: str = "norm"  # what the decoder applies to the last block's output
    down_projection: str = "mlp.down_proj"
    """The matrix from d_ff to d_model inside a block; a `Linear`."""
    mlp_norm: str = "post_attention_layernorm"
    """What reads the residual stream before the MLP; the MLP's output is added to the same."""

    def decoder_of(self, model: PreTrainedModel) -> Any:
        """Return the decoder stack."""
        return model.get_submodule(self.decoder)

    def blocks_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the list of decoder blocks."""
        blocks: nn.ModuleList = getattr(self.decoder_of(model), self.blocks)
        return blocks

    def final_norm_of(self, model: PreTrainedModel) -> nn.Module:
        """Return the norm behind the last block."""
        norm: nn.Module = self.decoder_of(model).get_submodule(self.final_norm)
        return norm

    def down_projection_of(self, model: PreTrainedModel, layer: int) -> nn.Linear:
        """Return block `layer`'s down-projection; its weight is `[d_model, d_ff]`."""
        projection = self.blocks_of(model)[layer].get_submodule(self.down_projection)
        return cast("nn.Linear", projection)

    def down_projection_name(self, layer: int) -> str:
        """Return the path of block `layer`'s down-projection, as in `named_modules`."""
        return f"{self.decoder}.{self.blocks}.{layer}.{self.down_projection}"

    def mlp_of(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """Return block `layer`'s MLP."""
        return self.blocks_of(model)[layer].get_submodule(self.down_projection.rpartition(".")[0])

    def mlp_norm_of(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """Return the norm before block `layer`'s MLP."""
        return self.blocks_of(model)[layer].get_submodule(self.mlp_norm)


# Checked against an independent computation for each family: tests/core/test_families.py.
LAYOUTS: dict[str, BlockLayout] = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3"), BlockLayout()
)

_NORM_AFTER_MLP = "it normalises the MLP's output again before adding it to the residual stream"
_EXPERTS = "its MLP is a mixture of experts, not one down-projection"
UNSUITABLE: dict[str, str] = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "olmo2"), _NORM_AFTER_MLP),
    "granite": "it scales the MLP's output before adding it to the residual stream",
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _EXPERTS),
}


# Words of keys that change what a model computes. A family that does not declare such a key leaves
# it out, and transformers says nothing; what has tensors of its own is found among the weights.
_ARITHMETIC = re.compile(
    "alibi|chunk|clip|layer_types|logit|multiplier|mup|parallel_(attn|residual)|rope|rotary|scal|sink"
    "|softcap|window"
)
_NEUTRAL: tuple[Any, ...] = (None, 0, 1, "", [], {})


def layout_of(config: PretrainedConfig) -> BlockLayout:
    """Return the layout of a configuration's family, or raise a ModelError."""
    family = config.model_type
    suitable = f"Suitable: {', '.join(LAYOUTS)}."
    if family in UNSUITABLE:
        raise ModelError(
            f"model family {family!r} is unsuitable for LUNAR: {UNSUITABLE[family]}, so a "
            f"down-projection cannot be given a target in the residual stream. {suitable}"
        )
    if family not in LAYOUTS:
        raise ModelError(
            f"model family {family!r} is unknown: where its down-projection lies, and whether the "
            f"block adds it unchanged, has not been checked. {suitable}"
        )
    quantization = config.to_dict().get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise ModelError(
            f"the checkpoint is quantised ({method}): its down-projection has no full-precision "
            "weight to edit. Use the 16- or 32-bit checkpoint it was made from."
        )
    if reasons := list(_not_computed(config)):
        raise ModelError(
            f"config.json of {config.name_or_path or 'the model'}: {'; '.join(reasons)}. So it is "
            "not the model that was trained. Use another checkpoint, or take out what has no "
            "meaning for it."
        )
    return LAYOUTS[family]


def _not_computed(config: PretrainedConfig) -> Iterator[str]:
    """Say which keys change what the model should compute, but not what transformers computes."""
    from transformers import AutoConfig

    family, said = config.model_type, config.to_dict()
    rope, kinds = said.get("rope_parameters") or {}, said.get("layer_types") or ()
    # The family's own keys, and two that say nothing by themselves.
    read = {*AutoConfig.for_model(family).to_dict(), "max_window_layers", "partial_rotary_factor"}
    if said.get("use_sliding_window") is False:
        read.add("sliding_window")
    asked = {name: value for name, value in said.items() if name not in read}
    if set(kinds) == {"full_attention"}:
        asked.pop("layer_types", None)
    asked["mrope_section"] = rope.get("mrope_section")
    if family != "phi3":
        asked["partial_rotary_factor"] = rope.get("partial_rotary_factor")
    for name, value in asked.items():
        if _ARITHMETIC.search(name) and (value is True or value not in _NEUTRAL):
            yield f"{name} is {value!s:.40}, which transformers' {family} leaves out"
    if said.get("use_bidirectional_attention"):
        yield "use_bidirectional_attention is set: a token would see those after it"
    if "sliding_attention" in kinds and not said.get("sliding_window"):
        yield "layer_types has sliding_attention, and no sliding_window is in use"


def context_of(config: PretrainedConfig) -> int | None:
    """Return the most tokens that a row may have, None where nothing says so.

    A model that scales positions by the length of the longest row in a batch (dynamic and longrope)
    answers a row by itself only as long as no row is longer than what it was trained with.
    """
    most: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        trained = int(rope["original_max_position_embeddings"])
        return trained if most is None else min(most, trained)
    return most


def check_answers_fit(config: PretrainedConfig, longest: int) -> None:
    """Raise a ModelError if rows of a batch could change each other's answers.

    `longest` are the tokens of the longest prompt with its answer; see `context_of`.
    """
    rope, most = getattr(config, "rope_parameters", None) or {}, context_of(config)
    if rope.get("rope_type") in {"dynamic", "longrope"} and most is not None and longest > most:
        raise ModelError(
            f"the model scales positions by the longest row of a batch ({rope['rope_type']} rope) "
            f"beyond {most} tokens, and a prompt with its answer may have {longest}: what it says "
            "to one question would depend on the others. Shorten the texts, or use a model with "
            "another rope_type."
        )


def why_not_resumable(config: PretrainedConfig, longest: int) -> str | None:
    """Say why a forward cannot go on from a kept residual stream; None where it can.

    Going on from the middle takes one causal mask for all blocks and attention that reads it.
    `longest` are the tokens of the longest prompt with its answer.
    """
    attention = config._attn_implementation
    if attention != "sdpa":
        return f"the model's attention is {attention!r}, not sdpa"
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    in_force = not kinds or "sliding_attention" in kinds
    if window is not None and in_force and longest > window:
        return f"the model's attention reaches back {window} tokens, and a row may have {longest}"
    other = kinds - {"full_attention", "sliding_attention"}
    return f"the model has {', '.join(sorted(other))} blocks" if other else None


def check_layers(layers: tuple[int, ...], n_layers: int, *, option: str = "layer") -> None:
    """Check layer indices, which `option` named, or raise a ModelError."""
    outside = [layer for layer in layers if not 0 <= layer < n_layers]
    if outside:
        listed = ", ".join(map(str, outside))
        raise ModelError(
            f"{option} {listed}: the model has {n_layers} decoder blocks, numbered 0 to "
            f"{n_layers - 1}."
        )
    if len(set(layers)) != len(layers):
        raise ModelError(f"{option} {', '.join(map(str, layers))}: a layer is named twice.")


@contextmanager
def decoder_slice(
    model: PreTrainedModel, layout: BlockLayout, start: int, stop: int
) -> Iterator[Any]:
    """Inside, the decoder consists of blocks `start` to `stop - 1` only; yields the decoder.

    Called with `inputs_embeds` = the residual stream at the input of block `start`, it computes
    what these blocks do in a full forward. Modifies `model` and restores it in `finally`.
    """
    decoder = layout.decoder_of(model)
    blocks = layout.blocks_of(model)
    config = decoder.config
    n_layers, kinds = config.num_hidden_layers, getattr(config, "layer_types", None)
    try:
        setattr(decoder, layout.blocks, blocks[start:stop])
        config.num_hidden_layers = stop - start
        if kinds is not None:
            config.layer_types = kinds[start:stop]
        yield decoder
    finally:
        setattr(decoder, layout.blocks, blocks)
        config.num_hidden_layers = n_layers
        if kinds is not None:
            config.layer_types = kinds
