"""Which model the published LUNAR code's file means, and where the paths in it lie.

Covers: families, base and fine-tuned paths; the layout of the published repository.
Does not cover: every other key (`configuration`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lunar_tune.errors import Problems
from lunar_tune.models.catalog import CATALOG
from lunar_tune.paths import is_file, is_folder
from lunar_tune.trial.published.keys import PublishedValues
from lunar_tune.yaml_files import shown

__all__ = ["ModelChoice", "Places", "choose_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z")
# What that code calls a model, where neither our name nor the hub's says it.
_FAMILIES: Final = {
    "llama3-8b-instruct": "llama3-8b",
    "llama2-7b-chat": "llama2-7b",
    "mistral-7b-instruct": "mistral-7b",
}


@dataclass(frozen=True, slots=True)
class Places:
    """Where relative paths are looked for."""

    roots: tuple[Path, ...]

    @classmethod
    def of(cls, config: Path) -> Places:
        """Return the file's folder, the two above (its repository is one) and the current one."""
        folder = config.resolve().parent
        near = [folder, *list(folder.parents)[:2], Path.cwd()]
        return cls(tuple(dict.fromkeys(near)))

    def file(self, name: str) -> Path | None:
        """Return the first file of that name."""
        return next((path for path in self._candidates(name) if is_file(path)), None)

    def folder(self, name: str) -> Path | None:
        """Return the first folder of that name."""
        return next((path for path in self._candidates(name) if is_folder(path)), None)

    def tried(self, name: str) -> str:
        """Return all places, for a message."""
        return ", ".join(map(str, self._candidates(name)))

    def _candidates(self, name: str) -> list[Path]:
        path = Path(name).expanduser()
        # An absolute path stays itself below every root.
        return list(dict.fromkeys(root / path for root in self.roots))


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model, and what was made of the keys that named it."""

    model: str | None
    """Catalogue name, folder or hub id; None where none could be found, which is then noted."""
    model_path: str | None = None
    """Folder of fine-tuned weights."""
    became: dict[str, str] = field(default_factory=dict)


def choose_model(values: PublishedValues, places: Places, problems: Problems) -> ModelChoice:
    """Return the model that the published code would load.

    That code loads `model_path`; the family only chooses its prompt format, and the base path is
    there to be referred to. Here the base, or else the family, is the model, and `model_path`
    its fine-tuned weights, which may be an adapter.
    """
    tuned = values.model_path
    if not tuned or tuned == values.base_model_path:
        choice = _base_model(values, places, problems)
        if tuned:
            choice.became["model_path"] = "the same as base_model_path: no fine-tuned weights"
        return choice
    folder = places.folder(tuned)
    if folder is None:
        model = _source("model_path", tuned, places, problems)
        became = {"model_path": f"--model {model}: there is no such folder, so it is a hub id"}
        for key in ("model_family", "base_model_path"):
            became |= _overruled(values, key, "model_path")
        return ModelChoice(model, became=became)
    named = values.base_model_path or _catalogue_name(values.model_family or "")
    if named is None:
        became = {"model_path": f"--model {folder}"} | _overruled(
            values, "model_family", "model_path"
        )
        return ModelChoice(str(folder), became=became)
    choice = _base_model(values, places, problems)
    choice.became["model_path"] = f"--model-path {folder}"
    return ModelChoice(choice.model, str(folder), choice.became)


def _base_model(values: PublishedValues, places: Places, problems: Problems) -> ModelChoice:
    """Return the model that base_model_path says, else the family's."""
    family, base = values.model_family, values.base_model_path
    named = _catalogue_name(family or "")
    if base:
        model = _source("base_model_path", base, places, problems)
        became = {"base_model_path": f"--model {model}"}
        if model == named:
            return ModelChoice(model, became=became | {"model_family": f"--model {model}"})
        became |= _overruled(values, "model_family", "base_model_path")
        return ModelChoice(model, became=became)
    if named is None:
        written = f"is {shown(family)}, which is not known" if family else "is missing"
        problems.add(
            f"model_family: {written}, and base_model_path is missing; give base_model_path, or "
            f"a family such as {', '.join(_FAMILIES)}, Qwen2.5-7B-Instruct"
        )
    return ModelChoice(named, became={"model_family": f"--model {named}"})


def _overruled(values: PublishedValues, key: str, winner: str) -> dict[str, str]:
    if getattr(values, key) is None:
        return {}
    return {key: f"unused: {winner} says which model is loaded"}


def _source(key: str, source: str, places: Places, problems: Problems) -> str | None:
    """Return a folder, a catalogue name or a hub id; note that it is none of them."""
    folder = places.folder(source)
    if folder is not None:
        return str(folder)
    if source in CATALOG or _HUB_ID.match(source):
        return _catalogue_name(source) or source
    problems.add(
        f"{key}: is {shown(source)}, neither a folder nor a hub id (owner/name); looked at "
        f"{places.tried(source)}"
    )
    return None


def _catalogue_name(text: str) -> str | None:
    """Return the catalogue's name for a family, a hub id or a name of our own."""
    asked = text.casefold()
    if asked in _FAMILIES:
        return _FAMILIES[asked]
    for name, entry in CATALOG.items():
        hub_id = (entry.hub_id or name).casefold()
        if asked in (name, hub_id, hub_id.rpartition("/")[2]):
            return name
    return None
