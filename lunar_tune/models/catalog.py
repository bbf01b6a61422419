"""Models by name, what `--model` and `--model-path` mean, and where a checkpoint comes from.

`lunar_tune.json` beside its weights: {"format": 1, "base": "qwen2.5-7b", "data": "contracts", …}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from lunar_tune.config.options import TINY
from lunar_tune.errors import ModelError, suggestion
from lunar_tune.files import cache_dir, is_file, is_folder, read_settings, write_json
from lunar_tune.models.weights import check_folder, is_adapter
from lunar_tune.registry import Registry

LINEAGE_FILE = "lunar_tune.json"
FETCHED = {"smollm2-135m": "weights rounded to 4 bits, from the Python package registry"}
"""What the weights are that `scripts/fetch_smollm2` puts into the cache under a catalogue name."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that the project knows by a short name, as in `--model qwen2.5-7b`."""

    hub_id: str | None  # of the instruction-tuned checkpoint; None for a model built on the spot
    n_layers: int  # number of decoder blocks
    billions: float  # parameters, in billions, as its model card states them
    licence: str  # SPDX identifier, or the hub's name of a licence that has none
    gated: bool = False  # whether the hub asks for an accepted licence first


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything that decides which weights are loaded, and how."""

    name: str  # the name to show: a catalogue name, a hub id, or a folder's name
    source: str  # hub id or folder of the base checkpoint; `tiny` until that is built
    weights: str | None = None  # folder of a fine-tuned checkpoint, or a PEFT adapter for `source`
    revision: str | None = None  # branch, tag or commit on the hub; None takes the default branch
    dtype: str = "auto"  # float32, bfloat16, float16 or auto, see `models.device.resolve_dtype`
    device: str = "auto"  # cpu, cuda or auto
    trust_remote_code: bool = False  # whether Python code that comes with the checkpoint may run

    @property
    def checkpoint(self) -> str:
        """Where configuration and weights are read from; an adapter is not a checkpoint."""
        if self.weights is not None and not is_adapter(Path(self.weights)):
            return self.weights
        return self.source

    @property
    def origin(self) -> str:
        """What the weights were made from, to show; empty where name and source say it, or none."""
        if (lineage := read_lineage(self.checkpoint)) is not None:
            return lineage.summary
        is_fetched = self.name in FETCHED and self.checkpoint == str(fetched_folder(self.name))
        return FETCHED[self.name] if is_fetched else ""


CATALOG: Registry[CatalogEntry] = Registry("model", error_class=ModelError)

for _name, *_entry in (
    (TINY, None, 4, 0.003, "Apache-2.0"),
    ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 30, 0.135, "Apache-2.0"),
    ("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", 32, 0.36, "Apache-2.0"),
    ("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 24, 1.7, "Apache-2.0"),
    ("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", 36, 3.08, "Apache-2.0"),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B", 28, 0.6, "Apache-2.0"),
    ("qwen3-1.7b", "Qwen/Qwen3-1.7B", 28, 1.7, "Apache-2.0"),
    ("qwen3-4b", "Qwen/Qwen3-4B", 36, 4.0, "Apache-2.0"),
    ("qwen3-8b", "Qwen/Qwen3-8B", 36, 8.2, "Apache-2.0"),
    ("qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct", 48, 14.7, "Apache-2.0"),
    ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", 28, 7.6, "Apache-2.0"),
    ("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", 36, 3.1, "qwen-research"),
    ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 28, 1.5, "Apache-2.0"),
    ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 24, 0.5, "Apache-2.0"),
    ("qwen2-7b", "Qwen/Qwen2-7B-Instruct", 28, 7.6, "Apache-2.0"),
    ("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", 32, 8.0, "llama3.1", True),
    ("llama3-8b", "meta-llama/Meta-Llama-3-8B-Instruct", 32, 8.0, "llama3", True),
    ("llama3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", 28, 3.2, "llama3.2", True),
    ("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", 16, 1.2, "llama3.2", True),
    ("llama2-7b", "meta-llama/Llama-2-7b-chat-hf", 32, 6.7, "llama2", True),
    ("gemma-7b", "google/gemma-7b-it", 28, 8.5, "gemma", True),
    ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", 32, 7.2, "Apache-2.0"),
    ("phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct", 32, 3.8, "MIT"),
):
    CATALOG.register(_name, CatalogEntry(*_entry))


def fetched_folder(name: str) -> Path:
    """Return where one of `FETCHED` lies, whether or not it does."""
    return cache_dir().resolve() / "models" / name


def resolve_model(name: str) -> ModelSpec:
    """Tell what a `--model` value means, without network, or raise an InputError.

    What was fetched under a name of the catalogue is taken unless a revision of the hub is named.
    """
    known, _, revision = name.partition("@")
    if known in CATALOG:
        source = CATALOG[known].hub_id or known
        if known in FETCHED and not revision and is_folder(folder := fetched_folder(known)):
            check_folder(folder, f"--model {name}")
            source = str(folder)
        return ModelSpec(name=known, source=source, revision=revision or None)
    folder = Path(name).expanduser()
    if name and is_folder(folder):
        check_folder(folder, f"--model {name}")
        return ModelSpec(name=folder.resolve().name, source=str(folder.resolve()))
    if name.startswith((".", "/", "~")) or is_file(folder):
        raise ModelError(
            f"--model {name}: no such folder. Give a folder that holds config.json and "
            f"safetensors weights, a hub id such as Qwen/Qwen2.5-7B-Instruct, "
            f"or one of: {', '.join(CATALOG)}."
        )
    if _HUB_ID.match(known):
        return ModelSpec(name=known, source=known, revision=revision or None)
    raise ModelError(
        f"unknown model {known!r}.{suggestion(known, CATALOG)} A hub id (owner/name) or a folder "
        "works as well."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a fine-tuned or unlearned checkpoint was made from, and how."""

    format: Literal[1] = 1
    base: str
    source: str  # hub id or folder of the base model
    weights: str | None  # folder that training began with; None for the base model's own weights
    revision: str | None  # commit on the hub; None for a folder
    fingerprint: str  # fingerprint of the weights that training began with
    data: str
    data_digest: str  # `records_digest` of what was learned
    settings: Mapping[str, Any]  # settings of the training, with its seed and the chat format
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

    def taught_otherwise(self, template: str, system_prompt: str | None) -> str:
        """Say how it was asked when it learned, if not as it is to be asked now; else nothing."""
        taught = self.settings.get("chat_template", template)
        system = self.settings.get("system_prompt", system_prompt)
        if (taught, system) == (template, system_prompt):
            return ""
        then, now = (
            f"chat template {shorten(one, 60)} and system prompt {other!r}"
            for one, other in ((taught, system), (template, system_prompt))
        )
        return f"was taught with {then}, and is asked with {now}: it may not answer as it learned"

    def write(self, folder: Path) -> None:
        """Write it beside the weights in a folder."""
        write_json(folder / LINEAGE_FILE, asdict(self))

    def tags(self) -> dict[str, str]:
        """Return it flat, for a tracking server."""
        names = ("base", "source", "revision", "fingerprint", "data", "data_digest")
        return {f"finetuned.{name}": str(getattr(self, name)) for name in names}


def read_lineage(folder: str | Path) -> Lineage | None:
    """Return it, None where a folder has none, or raise a ModelError."""
    from pydantic import TypeAdapter, ValidationError

    file = Path(folder).expanduser() / LINEAGE_FILE
    try:
        lineage = TypeAdapter(Lineage).validate_json(read_settings(file))
        _ = lineage.summary
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise ModelError(
            f"{file}: is not a record that this version of lunar-tune reads (format 1): "
            f"{reason}. Remove the file to do without the record."
        ) from error
    return lineage
