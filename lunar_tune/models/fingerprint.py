"""What a model is, in few characters: the same weights give the same fingerprint."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = ["fingerprint"]

_WORDS = 2**20  # of 8 bytes in one sum
_SPREAD = 0x1B873593CC9E2D51  # any odd number with as many ones as zeros, more or less
_SEED = 20250207  # of the multipliers; another one gives other fingerprints


@torch.inference_mode()
def fingerprint(loaded: LoadedModel) -> str:
    """Return a SHA-256 in hexadecimal of everything that a model's activations depend on.

    Each parameter is read once where it is: its bytes as 64-bit words, multiplied by fixed random
    odd numbers, mixed and summed modulo 2⁶⁴, a sum for each mebiword. So 15 GB on a GPU cost a few
    passes over its memory and a few kilobytes of traffic.
    """
    model = loaded.model
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    parts = {
        "config": config,
        "attention": model.config._attn_implementation,
        "device": loaded.device.type,
        "libraries": {
            name: ".".join(version(name).split(".")[:2]) for name in ("torch", "transformers")
        },
    }
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    generator = torch.Generator().manual_seed(_SEED)
    odd = torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator) * 2 + 1
    multipliers = odd.to(loaded.device)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_sums(tensor, multipliers).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(tensor: Tensor, multipliers: Tensor) -> Tensor:
    """Return one sum for each stretch of a tensor's bytes."""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    if raw.storage_offset() % 8:  # a view of another tensor; words of 8 bytes must be aligned
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    words = raw[:whole].view(torch.int64)
    parts = (*words.split(_WORDS), raw[whole:].to(torch.int64))
    return torch.stack([_mixed(part, multipliers[: len(part)]).sum() for part in parts])


def _mixed(words: Tensor, multipliers: Tensor) -> Tensor:
    """Return each word spread over all 64 bits.

    A product alone leaves a word's highest bit at the highest place, where two of them cancel.
    """
    product = words * multipliers
    product ^= product >> 29
    product *= _SPREAD
    return product ^ (product >> 32)
