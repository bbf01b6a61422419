"""A search's configuration, read back from its `config.yaml`.

Covers: every option with the value that it had, from the study where the file is gone; files that
were named relative to the folder that the search was started in; options that this version does
not know or that one did not have.
Does not cover: writing it (`search_config`), scores (`results`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from lunar_tune.config.run_options import OWN, RunOptions
from lunar_tune.config.search_config import AUTO, SearchConfig
from lunar_tune.data.bundled import BUNDLED
from lunar_tune.data.published import PUBLISHED
from lunar_tune.errors import InputError
from lunar_tune.models.catalog import CATALOG
from lunar_tune.models.chat import PUBLISHED as PUBLISHED_TURN
from lunar_tune.paths import is_file, is_folder, shipped_spaces
from lunar_tune.study.folder import Folder
from lunar_tune.study.study import StoredStudy
from lunar_tune.yaml_files import describe_mistakes

__all__ = ["StoredConfig"]

# Options that may name a file or folder, and may as well be a name.
_ADVICE = " Remove it: the study has a copy, which is taken then."
_PLACES = (
    "model",
    "model_path",
    "chat_template",
    "data",
    "retain_data",
    "factual_data",
    "reference_prompts",
    "refusals",
    "embedding_model",
)
# What is no file even where there is one of that name.
_NAMES: tuple[Container[str], ...] = (BUNDLED, PUBLISHED, CATALOG, (AUTO, OWN, PUBLISHED_TURN))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredConfig:
    """What a search was told."""

    search: SearchConfig
    """Every option, named as the search and with the output folder that it lies in now."""
    origins: Mapping[str, str]
    """Where values come from that were not left at their default, by field name."""
    resolved: Mapping[str, Any]
    """What there is beside options: the space, digests of the data, versions."""

    @classmethod
    def read(cls, folder: Folder) -> StoredConfig:
        """Read it.

        Raises:
            InputError: It is not there, or is not what a search writes.
        """
        document = _document(folder)
        given = {part: _given(document.get(part)) for part in ("search", "run")}
        resolved = document.get("resolved")
        resolved = resolved if isinstance(resolved, dict) else {}
        try:
            run = TypeAdapter(RunOptions).validate_python(_values(given["run"]))
            search = TypeAdapter(SearchConfig).validate_python(_values(given["search"]))
        except ValidationError as error:
            mistakes = "; ".join(describe_mistakes(error, ()))
            raise InputError(f"{folder.config}: {mistakes}.") from error
        started_in = _started_in(resolved)
        places: dict[str, Any] = {n: _placed(getattr(run, n), started_in) for n in _PLACES}
        search = dataclasses.replace(
            search,
            run=dataclasses.replace(run, **places),
            output=folder.path.parent,
            name=folder.name,
            space=_placed(search.space, started_in),
            layer_prior=_placed(search.layer_prior, started_in),
        )
        origins = {
            name: origin
            for part in given.values()
            for name, (_, origin) in part.items()
            if origin not in {"default", "derived"}
        }
        return cls(search=search, origins=origins, resolved=resolved)

    @property
    def trial_options(self) -> RunOptions:
        """The options of a single run of the model that the trials worked on.

        It differs from the search's where that fine-tuned its model first.
        """
        weights = _placed(self.resolved.get("weights"), _started_in(self.resolved))
        run = self.search.run
        return dataclasses.replace(run, model_path=weights) if weights is not None else run


def _document(folder: Folder) -> dict[str, Any]:
    """Return the file's content, or the study's own copy where there is no file."""
    try:
        document = yaml.safe_load(_text(folder))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{folder.config}: cannot be read ({error}).{_ADVICE}") from error
    parts = document if isinstance(document, dict) else {}
    if not all(isinstance(parts.get(part), dict) for part in ("search", "run", "resolved")):
        raise InputError(f"{folder.config}: is damaged, a part of it is missing.{_ADVICE}")
    return parts


def _text(folder: Folder) -> str:
    try:
        return folder.config.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        stored = StoredStudy.read(folder.journal)
        text = stored.notes.get("configuration") if stored is not None else None
        if text is None:
            raise InputError(
                f"{folder.path}: has no config.yaml, and its study has no copy of it, so there is "
                "no search to read or to go on with."
            ) from error
        return str(text)


def _given(part: Any) -> dict[str, tuple[Any, str]]:
    """Return value and origin of each option of a part."""
    entries = part if isinstance(part, dict) else {}
    return {
        str(name): (entry.get("value"), str(entry.get("origin")))
        for name, entry in entries.items()
        if isinstance(entry, dict)
    }


def _values(part: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """Return the values; what was derived is derived again."""
    return {name: value for name, (value, origin) in part.items() if origin != "derived"}


def _started_in(resolved: Mapping[str, Any]) -> Path:
    """Return the folder that the search was started in."""
    return Path(str(resolved.get("working_folder", ".")))


def _placed(value: str | None, started_in: Path) -> str | None:
    """Return a value that names a file where the search was started so that it is found here.

    A file of that name in the current folder is another one. What is a name of something else than
    a file stays one, as it was for the search.
    """
    if value is None or any(value in names for names in (*_NAMES, shipped_spaces())):
        return value
    here = Path(value).expanduser()
    there = started_in / here
    return str(there) if _exists(there) and there.resolve() != here.resolve() else value


def _exists(path: Path) -> bool:
    return is_file(path) or is_folder(path)
