"""The recipe of the `tiny` model: every number that its weights depend on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TinyRecipe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyRecipe:
    """How `tiny` is made; another recipe gives another checkpoint folder.

    Attributes:
        n_layers: Decoder blocks.
        d_model: Width of the residual stream.
        d_ff: Width inside the MLP; wide, since LUNAR writes into one down-projection.
        n_heads: Query heads.
        n_key_value_heads: Key and value heads, shared by the query heads.
        vocabulary: Most tokens that the tokenizer learns, before numbers are added.
        initializer_range: Standard deviation of the first weights. With Qwen2's .02 the loss was
            .19 after 30 epochs, with .06 it was .16 after 10 (one run each; facts and refusal
            sentence differed too).
        epochs: Passes over the pairs.
        batch_size: Examples a step.
        learning_rate: AdamW's, at the top of its cosine.
        weight_decay: AdamW's.
        warmup_share: The share of the steps in which the learning rate rises.
        beta2: AdamW's second moment decay.
        refused_per_epoch: Questions about invented things in an epoch, fresh ones in each.
        seed: Of weights, order and invented things.
        threads: Torch threads while building. On a shared two-core machine one took 2.0 s an epoch
            and two took 1.4 s, but up to 35 s while others computed. With one, the sums do not
            depend on the number of cores.
    """

    n_layers: int = 4
    d_model: int = 128
    d_ff: int = 1536
    n_heads: int = 4
    n_key_value_heads: int = 2
    vocabulary: int = 2500
    initializer_range: float = 0.06
    epochs: int = 22
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_share: float = 0.1
    beta2: float = 0.98
    refused_per_epoch: int = 90
    seed: int = 0
    threads: int = 1
