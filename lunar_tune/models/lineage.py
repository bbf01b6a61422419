"""What a model is, as a fingerprint, and where it comes from: `lunar_tune.json` beside its weights.

{"format": 1, "base": "qwen2.5-7b", "source": "Qwen/Qwen2.5-7B-Instruct", "revision": "a09a…",
 "data": "contracts", "data_digest": "5e1c…", "knowledge": {"rouge1": 0.99, …}, …}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lunar_tune.errors import ModelError
from lunar_tune.files import write_json
from lunar_tune.models.loading import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LINEAGE_FILE", "Lineage", "fingerprint", "read_lineage", "write_lineage"]

LINEAGE_FILE = "lunar_tune.json"
_WORDS = 2**20  # of 8 bytes in one sum
_SPREAD = 0x1B873593CC9E2D51  # any odd number with as many ones as zeros, more or less
_SEED = 20250207  # of the multipliers; another one gives other fingerprints


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a fine-tuned or unlearned checkpoint was made from, and how."""

    format: Literal[1] = 1
    base: str
    source: str
    """Hub id or folder of the base model."""
    weights: str | None
    """Folder of the weights that training began with, if they were not the base model's own."""
    revision: str | None
    """Commit on the hub; None for a folder."""
    fingerprint: str
    """Fingerprint of the weights that training began with."""
    data: str
    data_digest: str
    """`records_digest` of what was learned."""
    settings: Mapping[str, Any]
    """Settings of the training, with its seed and the chat format."""
    knowledge: Mapping[str, Any] = field(default_factory=dict)
    """`rouge1` on the data, `rouge1_by_edge`, `refused` (share of prompts that cannot be answered);
    empty until it was measured."""
    versions: Mapping[str, str] = field(default_factory=dict)
    unlearned: Mapping[str, Any] = field(default_factory=dict)
    """What was unlearned after that: `data`, `data_digest`, `forget_edges`, `method`, `variant`,
    `parameters`, `seed`, `search`, `trial`, `scores`; empty where nothing was."""

    @property
    def summary(self) -> str:
        """One line to show."""
        forgotten = ""
        if self.unlearned:
            edges, data = ", ".join(self.unlearned["forget_edges"]), self.unlearned["data"]
            forgotten = f", {edges} of {data} unlearned ({self.unlearned['method']})"
        if not self.settings:
            return self.base + forgotten
        known = f", ROUGE-1 {self.knowledge['rouge1']:.3f}" if "rouge1" in self.knowledge else ""
        how = self.settings.get("trained", "?")
        return f"{self.base} fine-tuned ({how}) on {self.data}{known}{forgotten}"

    def tags(self) -> dict[str, str]:
        """Return it flat, for a tracking server."""
        names = ("base", "source", "revision", "fingerprint", "data", "data_digest")
        return {f"finetuned.{name}": str(getattr(self, name)) for name in names}


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Write it beside the weights."""
    write_json(folder / LINEAGE_FILE, dataclasses.asdict(lineage))


def read_lineage(folder: str | Path) -> Lineage | None:
    """Read it; None where a folder has none.

    Raises:
        ModelError: There is one that cannot be read.
    """
    from pydantic import TypeAdapter, ValidationError

    file = Path(folder).expanduser() / LINEAGE_FILE
    try:
        lineage = TypeAdapter(Lineage).validate_json(file.read_bytes())
        _ = lineage.summary
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise ModelError(
            f"{file}: not a record of this version of lunar-tune (format 1): {reason}; remove it "
            "to go without."
        ) from error
    return lineage


def fingerprint(loaded: LoadedModel) -> str:
    """Return a SHA-256 in hexadecimal of everything that a model's activations depend on.

    Each parameter is read once where it is: its bytes as 64-bit words, multiplied by fixed random
    odd numbers, mixed and summed modulo 2⁶⁴, a sum for each mebiword. So 15 GB on a GPU cost a few
    passes over its memory and a few kilobytes of traffic.
    """
    import torch

    model = loaded.model
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
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    generator = torch.Generator().manual_seed(_SEED)
    odd = torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator) * 2 + 1
    multipliers = odd.to(loaded.device)
    with torch.inference_mode():
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_sums(tensor, multipliers).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(tensor: Tensor, multipliers: Tensor) -> Tensor:
    """Return one sum for each stretch of a tensor's bytes."""
    import torch

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
