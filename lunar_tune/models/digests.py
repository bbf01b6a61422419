"""Digests of weights where they are in memory, and of plain values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.models.weights import ADAPTER_FILE, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_WORDS = 2**20  # of 8 bytes in one sum
_SPREAD = 0x1B873593CC9E2D51  # any odd number with as many ones as zeros, more or less
_SEED = 20250207  # of the multipliers; another one gives other fingerprints


def weights_digest(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Return a SHA-256 of a model's weights: names, number formats, shapes and values.

    Each is read once where it is: its bytes as 64-bit words, multiplied by fixed random odd
    numbers, mixed and summed modulo 2⁶⁴, a sum for each mebiword. So 15 GB on a GPU cost a few
    passes over its memory and a few kilobytes of traffic. Numbers are rounded to a `dtype` before.
    """
    import torch

    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(_SEED)
    odd = torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator) * 2 + 1
    multipliers = odd.to(model.device)
    with torch.inference_mode():
        for name, tensor in sorted(model.state_dict().items()):
            values = (
                tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            )
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(_sums(values, multipliers).cpu().numpy().tobytes())
    return digest.hexdigest()


def adapter_digest(model: PreTrainedModel, folder: Path) -> str:
    """Return a digest of a base model's weights and of the adapter that is to be merged."""
    files = [(folder / name).read_bytes() for name in (ADAPTER_FILE, ADAPTER_WEIGHTS)]
    return digest_of([weights_digest(model), *(hashlib.sha256(one).hexdigest() for one in files)])


def digest_of(parts: Any) -> str:
    """Return the SHA-256 of plain values in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _sums(tensor: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """Return one sum for each stretch of a tensor's bytes, with each word spread over all 64 bits.

    A product alone leaves a word's highest bit at the highest place, where two of them cancel.
    """
    import torch

    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    if raw.storage_offset() % 8:  # a view of another tensor; words of 8 bytes must be aligned
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    sums = []
    for words in (*raw[:whole].view(torch.int64).split(_WORDS), raw[whole:].to(torch.int64)):
        product = words * multipliers[: len(words)]
        product ^= product >> 29
        product *= _SPREAD
        sums.append((product ^ (product >> 32)).sum())
    return torch.stack(sums)
