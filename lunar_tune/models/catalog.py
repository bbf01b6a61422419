"""The catalogue of models by short name, and what a `--model` value means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lunar_tune.config.run_options import TINY
from lunar_tune.errors import ModelError, suggestion
from lunar_tune.files import is_file, is_folder
from lunar_tune.registry import Registry

__all__ = ["CATALOG", "CatalogEntry", "ModelReference", "resolve_model"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model that the project knows by name."""

    name: str
    """Short name, as in `--model qwen2.5-7b`."""
    hub_id: str | None
    """Hugging Face id of the instruction-tuned checkpoint; None for a model built on the spot."""
    n_layers: int
    """Number of decoder blocks."""
    billions: float
    """Parameters, in billions, as its model card states them."""
    gated: bool = False
    """Whether the hub asks for an accepted licence and a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReference:
    """What a `--model` value means."""

    name: str
    """The name to show: a catalogue name, a hub id, or a folder's name."""
    source: str | None
    """Hub id or local folder to load from; None for a model built on the spot."""
    entry: CatalogEntry | None
    """The catalogue entry, if it is one."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is the newest."""

    @property
    def is_local(self) -> bool:
        """Whether the source is a folder on this machine."""
        return self.source is not None and is_folder(Path(self.source))


CATALOG: Registry[CatalogEntry] = Registry("model", error_class=ModelError)

for _name, _hub_id, _n_layers, _billions, _gated in (
    (TINY, None, 4, 0.003, False),
    ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", 28, 7.6, False),
    ("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", 36, 3.1, False),
    ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 28, 1.5, False),
    ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 24, 0.5, False),
    ("qwen2-7b", "Qwen/Qwen2-7B-Instruct", 28, 7.6, False),
    ("llama3-8b", "meta-llama/Meta-Llama-3-8B-Instruct", 32, 8.0, True),
    ("llama3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", 28, 3.2, True),
    ("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", 16, 1.2, True),
    ("llama2-7b", "meta-llama/Llama-2-7b-chat-hf", 32, 6.7, True),
    ("gemma-7b", "google/gemma-7b-it", 28, 8.5, True),
    ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", 32, 7.2, True),
):
    CATALOG.register(
        _name,
        CatalogEntry(
            name=_name, hub_id=_hub_id, n_layers=_n_layers, billions=_billions, gated=_gated
        ),
    )


def resolve_model(name: str) -> ModelReference:
    """Tell what a `--model` value means, without network.

    Raises:
        ModelError: It is no catalogue name, no existing folder and no hub id.
    """
    known, _, revision = name.partition("@")
    if known in CATALOG:
        entry = CATALOG[known]
        return ModelReference(
            name=known, source=entry.hub_id, entry=entry, revision=revision or None
        )
    folder = Path(name).expanduser()
    if name and is_folder(folder):
        return ModelReference(name=folder.resolve().name, source=str(folder.resolve()), entry=None)
    if name.startswith((".", "/", "~")) or is_file(folder):
        raise ModelError(
            f"--model {name}: no such folder. Give a folder that holds config.json and "
            f"safetensors weights, a hub id such as Qwen/Qwen2.5-7B-Instruct, "
            f"or one of: {', '.join(CATALOG)}."
        )
    if _HUB_ID.match(known):
        return ModelReference(name=known, source=known, entry=None, revision=revision or None)
    raise ModelError(
        f"unknown model {known!r}.{suggestion(known, CATALOG)} A hub id (owner/name) or a folder "
        "works as well."
    )
