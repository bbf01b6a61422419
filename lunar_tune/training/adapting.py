"""Making a model trainable for a while: an adapter put on and taken off, or all weights and back.

Covers: a LoRA adapter on every linear map of the blocks (peft); all weights, in float32 while they
are trained; the model bit for bit what it was afterwards, also after an error, or with what was
trained as its own weights where that is wanted; training mode; torch's generator.
Does not cover: the loop (`loop`), losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = ["Trained", "all_weights", "lora_adapter", "seeded", "training_mode"]


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained, and the ways between training and its end."""

    parameters: tuple[nn.Parameter, ...]
    computing: Callable[[], AbstractContextManager[Any]]
    """Inside, a forward pass for training runs in the model's own number format."""
    untrained: Callable[[], AbstractContextManager[Any]] | None
    """Inside, the model is what it was; None where that would take a second model."""
    finish: Callable[[], object]
    """To be called between training and evaluation."""


@contextmanager
def lora_adapter(
    loaded: LoadedModel, *, rank: int, alpha: float, dropout: float, keep: bool = False
) -> Iterator[Trained]:
    """Inside, a fresh adapter is on the model: W + (alpha / rank)·B·A for every linear map.

    A is drawn from torch's generator, B is zero, both in float32; the head is left alone.
    Source: Hu et al., arXiv 2106.09685.

    Args:
        loaded: The model.
        rank: Of B·A.
        alpha: Scale of B·A times rank.
        dropout: Share of A's inputs that are zero in training mode.
        keep: Whether the weights are W + (alpha / rank)·B·A, rounded to their number format, for
            good when the context ends without an error.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it, and takes any number
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model: Any = loaded.model
    with _as_it_was(model):
        adapted = get_peft_model(model, config)
        try:
            yield Trained(
                parameters=tuple(p for p in model.parameters() if p.requires_grad),
                computing=nullcontext,
                untrained=adapted.disable_adapter,
                finish=lambda: None,
            )
            if keep:
                adapted.merge_and_unload()
        finally:
            adapted.unload()  # finds nothing where the adapter was merged


@contextmanager
def all_weights(loaded: LoadedModel, *, keep: bool = False) -> Iterator[Trained]:
    """Inside, all weights are trained; a copy of them waits in host memory to be put back.

    16-bit weights are float32 until `finish`, so that small updates are not lost to rounding;
    products run in 16 bits (autocast).

    Args:
        loaded: The model.
        keep: Whether what was trained stays; then there is no copy, also not after an error.
    """
    model: Any = loaded.model  # its `to` is typed as taking itself
    dtype = model.dtype
    kept = () if keep else model.named_parameters()
    originals = {name: p.detach().to("cpu", copy=True) for name, p in kept}
    with _as_it_was(model):
        try:
            model.requires_grad_(requires_grad=True).float()
            yield Trained(
                parameters=tuple(model.parameters()),
                computing=lambda: torch.autocast(
                    loaded.device.type, dtype=dtype, enabled=dtype != torch.float32
                ),
                untrained=None,
                finish=lambda: model.to(dtype),
            )
        finally:
            model.to(dtype)
            with torch.no_grad():
                for name, original in originals.items():
                    model.get_parameter(name).copy_(original)


@contextmanager
def training_mode(loaded: LoadedModel, *, checkpointing: bool) -> Iterator[None]:
    """Inside, dropout drops; activations are computed again in the backward pass if wanted."""
    model: Any = loaded.model
    was_training = model.training
    model.train()
    if checkpointing:
        # transformers 5.23 renamed it and warns of the old name
        named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{named}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            getattr(model, f"{named}_checkpointing_disable")()
        model.train(was_training)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from a seed of one's own; after, from where it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back, at the end, which parameters want a gradient, and drop what they have of one."""
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    training = model.training
    try:
        yield
    finally:
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
