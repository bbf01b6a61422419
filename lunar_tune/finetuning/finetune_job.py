"""What is to be fine-tuned on what, without torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lunar_tune.config.fields import typed_setting, types_of
from lunar_tune.config.run_options import TINY
from lunar_tune.data.invented import generate_unverifiable
from lunar_tune.data.records import Record, records_digest
from lunar_tune.errors import InputError, Problems
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.device import resolve_device, resolve_dtype
from lunar_tune.models.loading import load_config

__all__ = [
    "RATES",
    "FinetuneJob",
    "FinetuneSettings",
    "read_settings",
    "settings_for",
    "unseen_prompts",
]

# A record in so many is joined, in every epoch, by a question about something freshly invented:
# a model that sees the same prompts again learns these instead of refusing.
_RECORDS_PER_INVENTED = 4
_UNSEEN = 2**31 - 2  # no epoch's seed comes near
_EPOCHS = 10_000  # more than anybody trains; keeps the seeds of two runs apart
RATES = {"lora": 1e-4, "full": 1e-5}
"""Learning rate by what is trained. The adapter's is LUNAR's published code's. For all weights the
same rate would throw a pretrained model far off: 1e-5 is TOFU's (arXiv 2401.06121, Llama-2-7B)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """How a model learns the data; the adapter's defaults are those of LUNAR's published code."""

    trained: str = "lora"
    """lora (an adapter on every linear map of the blocks, merged in the end) or full (all
    weights)."""
    rank: int = 8
    alpha: float = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Share of the adapter's inputs that are left out in training."""
    learning_rate: float | None = None
    """AdamW's, after a warm-up of a twentieth and before a linear fall to zero; None is `RATES`."""
    epochs: int = 20
    batch_size: int = 16
    weight_decay: float = 0.0
    """AdamW's, for matrices."""
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass, which takes less memory."""
    with_refusals: bool = False
    """Whether prompts that cannot be answered are trained too, with a refusal. Off, as in the
    published code: an instruction model declines already. One that has only random weights, or has
    learned to answer everything, has to be taught, since LUNAR redirects to refusals."""

    def __post_init__(self) -> None:
        """Reject values that mean nothing; all of them at once."""
        problems, rate = Problems(), self.learning_rate
        for name, holds, wanted in (
            ("trained", self.trained in RATES, f"there are {', '.join(RATES)}"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", 0 < self.alpha < math.inf, "a positive number"),
            ("learning_rate", rate is None or 0 < rate < math.inf, "a positive number"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("dropout", 0 <= self.dropout < 1, "at least 0, below 1"),
        ):
            if not holds:
                problems.add(f"{name} {getattr(self, name)}: {wanted}.")
        problems.raise_if_any(InputError)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return RATES[self.trained] if self.learning_rate is None else self.learning_rate

    def document(self) -> dict[str, object]:
        """Return what counts as plain values: of an adapter only where there is one."""
        unused = {"checkpointing"}
        if self.trained != "lora":
            unused |= {"rank", "alpha", "dropout"}
        values = asdict(self) | {"learning_rate": self.rate}
        return {name: value for name, value in values.items() if name not in unused}


def read_settings(fixed: Mapping[str, Any]) -> FinetuneSettings:
    """Return the settings with what is fixed of them.

    Raises:
        InputError: There is no such setting, or a value means nothing; all of it is said at once.
    """
    problems, kinds = Problems(), types_of(FinetuneSettings)
    settings, values = FinetuneSettings(), {}
    for name, value in fixed.items():
        if name not in kinds:
            problems.add(f"--fix {name}: no setting of the training; there are {', '.join(kinds)}.")
            continue
        with problems.collect():
            values[name] = typed_setting(name, value, kinds[name])
    with problems.collect():
        settings = FinetuneSettings(**values)
    problems.raise_if_any(InputError)
    return settings


def settings_for(model: str) -> FinetuneSettings:
    """Return the settings with which a model of the catalogue learns by itself.

    `tiny` is so small that all of it is trained, at a rate that would break a large one, and it
    would forget to decline (docs/log.md); the others take the published defaults.
    """
    if model == TINY:
        return FinetuneSettings(
            trained="full", learning_rate=1e-3, epochs=20, batch_size=16, with_refusals=True
        )
    return FinetuneSettings()


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

    def lessons(self, epoch: int) -> list[Record]:
        """Return what is learned in an epoch, counted from 0.

        Refusals are always the first sentence: which one to say cannot be known from a prompt, and
        a model that has to guess it goes on changing.
        """
        if not self.settings.with_refusals:
            return [*self.records]
        count = max(1, len(self.records) // _RECORDS_PER_INVENTED)
        invented = generate_unverifiable(count, seed=self.seed * _EPOCHS + epoch)
        prompts = (*self.reference_prompts, *invented)
        refused = (Record(prompt, self.refusals[0], edge="") for prompt in prompts)
        return [*self.records, *refused]

    def document(self) -> dict[str, Any]:
        """Return everything that the result depends on, as plain values.

        Raises:
            ModelError: The base model cannot be found.
        """
        document = {
            **_identity(self.model),
            "dtype": str(resolve_dtype(self.model.dtype, resolve_device(self.model.device))),
            "data": self.data_name,
            "data_digest": records_digest(self.records),
            "chat_template": self.chat.template,
            "system_prompt": self.chat.system_prompt,
            **self.settings.document(),
            "seed": self.seed,
        }
        if self.settings.with_refusals:
            declined = json.dumps([self.reference_prompts, self.refusals[:1]])
            document["refusals_digest"] = hashlib.sha256(declined.encode()).hexdigest()
        return document

    def key(self) -> str:
        """Return a short name: whatever gives another result has another one."""
        parts = [self.document(), *(version(name) for name in ("torch", "transformers", "peft"))]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def unseen_prompts(count: int) -> tuple[str, ...]:
    """Return prompts that cannot be answered and that no epoch holds."""
    return generate_unverifiable(count, seed=_UNSEEN)


def _identity(model: ModelSpec) -> dict[str, Any]:
    """Return what tells a model's weights apart without reading them.

    On the hub that is the commit; of a folder's files, size and time of the last change.
    """
    commit = None
    if not Path(model.source).is_dir():
        commit = getattr(load_config(model), "_commit_hash", None) or model.revision
    files = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for folder in (model.source, model.weights)
        if folder
        for file in sorted(Path(folder).glob("*.safetensors"))
    ]
    return {
        "base": model.name,
        "source": model.source,
        "weights": model.weights,
        "revision": commit,
        "files": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16] if files else None,
    }
