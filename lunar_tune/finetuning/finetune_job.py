"""What is to be fine-tuned on what, without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

from lunar_tune.config.fields import same_option, types_of
from lunar_tune.config.options import AUTO, TINY
from lunar_tune.data.records import Record, records_digest
from lunar_tune.data.splits import generate_unverifiable
from lunar_tune.errors import Problems
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.device import resolve_device
from lunar_tune.models.fingerprint import told_apart
from lunar_tune.training import TrainingSettings, setting, with_settings

# A record in so many is joined, in every epoch, by a question about something freshly invented:
# a model that sees the same prompts again learns these instead of refusing.
_RECORDS_PER_INVENTED = 4
UNSEEN = 2**31 - 2  # a seed of invented things to which no epoch's comes near
_EPOCHS = 10_000  # more than anybody trains; keeps the seeds of two runs apart
# Learning rates. The adapter's is LUNAR's published code's. For all weights it would throw a
# pretrained model far off: 1e-5 is TOFU's (arXiv 2401.06121, Llama-2-7B).
_RATES = {"lora": 1e-4, "full": 1e-5}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings):
    """How a model learns the data; the adapter's defaults are those of LUNAR's published code."""

    batch_size: int = same_option(TrainingSettings, "batch_size", default=16)
    weight_decay: float = same_option(TrainingSettings, "weight_decay", default=0.0)
    learning_rate: float | None = setting(None, above=0)
    """AdamW's, after a warm-up of a twentieth and before a linear fall to zero; none is 1e-4 for an
    adapter, 1e-5 for all weights."""
    with_refusals: bool = setting(False)
    """Train on prompts that cannot be answered too, with a refusal. Off, as in the published code:
    an instruction model declines already. One that has only random weights, or has learned to
    answer everything, has to be taught, since LUNAR redirects to refusals."""

    @property
    def rate(self) -> float:
        """The learning rate."""
        return _RATES[self.trained] if self.learning_rate is None else self.learning_rate

    def document(self) -> dict[str, object]:
        """Return what counts as plain values: of an adapter only where there is one."""
        unused = {"checkpointing"}
        if self.trained != "lora":
            unused |= {"rank", "alpha", "dropout"}
        values = asdict(self) | {"learning_rate": self.rate}
        return {name: value for name, value in values.items() if name not in unused}


def recipe(model: str, fixed: Mapping[str, Any] = MappingProxyType({})) -> FinetuneSettings:
    """Return how a model learns, by itself before a search or by the command, with what is fixed.

    `tiny` is so small that all of it is trained, at a rate that would break a large one, and it
    would forget to decline (docs/log.md); the others take the published defaults.
    """
    problems, settings = Problems(), FinetuneSettings()
    if model == TINY:
        settings = replace(settings, trained="full", epochs=20, batch_size=16, with_refusals=True)
        if fixed.get("trained") in (None, settings.trained):  # the rate belongs to what is trained
            settings = replace(settings, learning_rate=1e-3)
    known = types_of(FinetuneSettings)
    for name in fixed:
        if name not in known:
            problems.add(
                f"--fix {name}: not a setting of fine-tuning. There are: {', '.join(known)}."
            )
    with problems.collect():
        settings = with_settings(settings, fixed)
    problems.raise_if_any()
    return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneJob:
    """A model, what it is to learn, and how."""

    model: ModelSpec
    chat: ChatFormat
    records: tuple[Record, ...]  # all of it is learned, what will be forgotten too
    data_name: str
    reference_prompts: tuple[str, ...]  # prompts that are to be declined
    refusals: tuple[str, ...]  # answers that decline
    notes: tuple[str, ...] = ()  # as in `DataSets`
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

    @property
    def trained_model(self) -> ModelSpec:
        """The model as it is trained: on a CPU in float32, whatever `auto` is for trials."""
        is_open = self.model.dtype == AUTO and resolve_device(self.model.device).type == "cpu"
        return replace(self.model, dtype="float32") if is_open else self.model

    def document(self) -> dict[str, Any]:
        """Return everything that the result depends on, as plain values, or raise a ModelError."""
        document = {
            **told_apart(self.trained_model),
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
