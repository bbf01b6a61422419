"""Where the decoder blocks and their MLP down-projections are, by `config.model_type`."""

from __future__ import annotations

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
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), BlockLayout()
)

_NORM_AFTER_MLP = "it normalises the MLP's output again before adding it to the residual stream"
_EXPERTS = "its MLP is a mixture of experts, not one down-projection"
UNSUITABLE: dict[str, str] = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "olmo2"), _NORM_AFTER_MLP),
    "granite": "it scales the MLP's output before adding it to the residual stream",
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _EXPERTS),
}


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
    return LAYOUTS[family]


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
