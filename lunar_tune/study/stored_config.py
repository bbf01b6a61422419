"""A search's configuration on disk: `config.yaml`, every option with its origin.

Files that were named relative to the folder that the search was started in are found from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunar_tune.config.fields import from_document, options_of, plain
from lunar_tune.config.run_options import OWN, RunOptions
from lunar_tune.config.search_config import AUTO, SearchConfig
from lunar_tune.data.data_catalog import BUNDLED, PUBLISHED
from lunar_tune.errors import InputError
from lunar_tune.models.catalog import CATALOG
from lunar_tune.models.chat import PUBLISHED as PUBLISHED_TURN
from lunar_tune.paths import is_file, is_folder, shipped_spaces
from lunar_tune.study.folder import Folder
from lunar_tune.study.study import StoredStudy
from lunar_tune.yaml_files import read_yaml, write_yaml

__all__ = ["StoredConfig", "configuration_document"]

DEFAULT, DERIVED = "default", "derived"
_ADVICE = " Remove it: the study has a copy, which is taken then."
# What is no file even where there is one of that name.
_NAMES: tuple[Container[str], ...] = (BUNDLED, PUBLISHED, CATALOG, (AUTO, OWN, PUBLISHED_TURN))


def configuration_document(
    config: SearchConfig,
    *,
    given: Mapping[str, str],
    derived: Mapping[str, Any],
    resolved: Mapping[str, Any],
) -> str:
    """Return `config.yaml`: every value with its origin.

    Args:
        config: The search's configuration.
        given: Origin of the options that were not left at their default, by field name.
        derived: Values that stand for an option left open, by field name.
        resolved: What there is beside options: the space, the model's source, data digests.
    """
    options = {}
    for name in options_of(SearchConfig):
        value, origin = getattr(config, name), given.get(name, DEFAULT)
        if value in (None, ()) and name in derived:
            value, origin = derived[name], DERIVED
        options[name] = {"value": plain(value), "origin": origin}
    document = {"options": options, "resolved": plain(resolved)}
    return write_yaml(document)


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
        resolved, given = document["resolved"], _given(document["options"])
        known = options_of(SearchConfig)
        values = from_document(
            SearchConfig,
            {
                name: value
                for name, (value, origin) in given.items()
                if origin != DERIVED and not (name in known and not known[name].stored)
            },
            source=str(folder.config),
        )
        started_in = _started_in(resolved)
        for name, said in known.items():
            if said.place and name in values:
                values[name] = _placed(values[name], started_in)
        values |= {"output": folder.path.parent, "name": folder.name}
        origins = {
            name: origin for name, (_, origin) in given.items() if origin not in {DEFAULT, DERIVED}
        }
        return cls(search=SearchConfig(**values), origins=origins, resolved=resolved)

    @property
    def trial_options(self) -> RunOptions:
        """The options of a single run of the model that the trials worked on.

        It differs from the search's where that fine-tuned its model first.
        """
        weights = _placed(self.resolved.get("weights"), _started_in(self.resolved))
        return dataclasses.replace(self.search, model_path=weights) if weights else self.search


def _document(folder: Folder) -> dict[str, Any]:
    """Return the file's content, or the study's own copy where there is no file."""
    stored = StoredStudy.read(folder.journal)  # refuses what another version has written
    source = folder.config if folder.config.exists() else _study_copy(folder, stored)
    try:
        document = read_yaml(source)
    except InputError as error:
        problem = str(error).removeprefix(f"{folder.config}: ")
        raise InputError(f"{folder.config}: {problem}.{_ADVICE}") from error
    if not all(isinstance(document.get(part), dict) for part in ("options", "resolved")):
        raise InputError(f"{folder.config}: is damaged, a part of it is missing.{_ADVICE}")
    return document


def _study_copy(folder: Folder, stored: StoredStudy | None) -> str:
    text = stored.notes.get("configuration") if stored is not None else None
    if text is None:
        raise InputError(
            f"{folder.path}: has no config.yaml, and its study has no copy of it, so there is no "
            "search to read or to go on with."
        )
    return str(text)


def _given(part: Mapping[Any, Any]) -> dict[str, tuple[Any, str]]:
    """Return value and origin of each option."""
    return {
        str(name): (entry.get("value"), str(entry.get("origin")))
        for name, entry in part.items()
        if isinstance(entry, dict)
    }


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
