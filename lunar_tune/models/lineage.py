"""Where a fine-tuned or unlearned checkpoint comes from: `lunar_tune.json` beside its weights.

{"format": 1, "base": "qwen2.5-7b", "source": "Qwen/Qwen2.5-7B-Instruct", "revision": "a09a…",
 "data": "contracts", "data_digest": "5e1c…", "knowledge": {"rouge1": 0.99, …}, …}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lunar_tune.errors import ModelError
from lunar_tune.files import write_atomically

__all__ = ["LINEAGE_FILE", "Lineage", "read_lineage", "write_lineage"]

LINEAGE_FILE = "lunar_tune.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a checkpoint was made from, and how."""

    base: str
    """Name of the base model, to show."""
    source: str
    """Hub id or folder of the base model."""
    weights: str | None
    """Folder of the weights that training began with, if they were not the base model's own."""
    revision: str | None
    """Commit on the hub; None for a folder."""
    fingerprint: str
    """Fingerprint of the weights that training began with (`models.fingerprint`)."""
    data: str
    """Name of the data, to show."""
    data_digest: str
    """`records_digest` of what was learned."""
    settings: Mapping[str, Any]
    """Settings of the training, with its seed and the chat format."""
    knowledge: Mapping[str, Any] = field(default_factory=dict)
    """`rouge1` on the data, `rouge1_by_edge`, `refused` (share of prompts that cannot be answered);
    empty until it was measured."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages."""
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
        return {
            "finetuned.base": self.base,
            "finetuned.source": self.source,
            "finetuned.revision": str(self.revision),
            "finetuned.fingerprint": self.fingerprint,
            "finetuned.data": self.data,
            "finetuned.data_digest": self.data_digest,
        }

    def document(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Write it beside the weights."""
    text = json.dumps(lineage.document(), indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / LINEAGE_FILE, text.encode(errors="surrogatepass"))


def read_lineage(folder: str | Path) -> Lineage | None:
    """Read it; None where a folder has none.

    Raises:
        ModelError: There is one that cannot be read.
    """
    file = Path(folder).expanduser() / LINEAGE_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); remove it to go without.") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ModelError(
            f"{file}: not a record of this version of lunar-tune (format {_FORMAT}); remove it to "
            "go without."
        )
    names = {entry.name for entry in dataclasses.fields(Lineage)}
    try:
        lineage = Lineage(**{name: value for name, value in document.items() if name in names})
        _ = lineage.summary, lineage.tags()
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: incomplete ({error}); remove it to go without.") from error
    return lineage
