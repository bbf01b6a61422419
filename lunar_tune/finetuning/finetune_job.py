"""What is to be fine-tuned on what, without torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lunar_tune.data.invented import generate_unverifiable
from lunar_tune.data.records import Record, records_digest
from lunar_tune.finetuning.finetune_settings import FinetuneSettings
from lunar_tune.finetuning.tiny_text import Lesson
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.device import resolve_device, resolve_dtype
from lunar_tune.models.loading import load_config

__all__ = ["FinetuneJob", "unseen_prompts"]

# A record in so many is joined, in every epoch, by a question about something freshly invented:
# a model that sees the same prompts again learns these instead of refusing.
_RECORDS_PER_INVENTED = 4
_UNSEEN = 2**31 - 2  # no epoch's seed comes near
_EPOCHS = 10_000  # more than anybody trains; keeps the seeds of two runs apart


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneJob:
    """A model, what it is to learn, and how."""

    model: ModelSpec
    chat: ChatFormat
    records: tuple[Record, ...]
    """All of it is learned, what will be forgotten too."""
    data_name: str
    reference_prompts: tuple[str, ...]
    """Prompts that are to be declined."""
    refusals: tuple[str, ...]
    """Answers that decline."""
    rouge_tokenizer: str = "default"
    settings: FinetuneSettings = field(default_factory=FinetuneSettings)
    seed: int = 0

    def lessons(self, epoch: int) -> list[Lesson]:
        """Return what is learned in an epoch, counted from 0.

        Refusals are always the first sentence: which one to say cannot be known from a prompt, and
        a model that has to guess it goes on changing.
        """
        known = [Lesson(record.question, record.answer) for record in self.records]
        if not self.settings.with_refusals:
            return known
        count = max(1, len(self.records) // _RECORDS_PER_INVENTED)
        invented = generate_unverifiable(count, seed=self.seed * _EPOCHS + epoch)
        prompts = (*self.reference_prompts, *invented)
        return known + [Lesson(prompt, self.refusals[0]) for prompt in prompts]

    def document(self) -> dict[str, Any]:
        """Return everything that the result depends on, as plain values.

        Raises:
            ModelError: The base model cannot be found.
        """
        declined = json.dumps([self.reference_prompts, self.refusals[:1]])
        return {
            **identity(self.model),
            "dtype": str(resolve_dtype(self.model.dtype, resolve_device(self.model.device))),
            "data": self.data_name,
            "data_digest": records_digest(self.records),
            "chat_template": self.chat.template,
            "system_prompt": self.chat.system_prompt,
            **self.settings.document(),
            **(
                {"refusals_digest": hashlib.sha256(declined.encode()).hexdigest()}
                if self.settings.with_refusals
                else {}
            ),
            "seed": self.seed,
        }

    def key(self) -> str:
        """Return a short name: whatever gives another result has another one."""
        parts = [self.document(), *(version(name) for name in ("torch", "transformers", "peft"))]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def unseen_prompts(count: int) -> tuple[str, ...]:
    """Return prompts that cannot be answered and that no epoch holds."""
    return generate_unverifiable(count, seed=_UNSEEN)


def identity(model: ModelSpec) -> dict[str, Any]:
    """Return what tells a model's weights apart without reading them.

    On the hub that is the commit; of a folder's files, size and time of the last change.
    """
    commit = None
    if not Path(model.source).is_dir():
        commit = getattr(load_config(model), "_commit_hash", None) or model.revision
    folders = [Path(name) for name in (model.source, model.weights) if name and Path(name).is_dir()]
    files = [
        [str(file.name), file.stat().st_size, file.stat().st_mtime_ns]
        for folder in folders
        for file in sorted(folder.glob("*.safetensors"))
    ]
    return {
        "base": model.name,
        "source": model.source,
        "weights": model.weights,
        "revision": commit,
        "files": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16] if files else None,
    }
