"""A search's configuration as the options that would give it again.

Covers: options of searches and of runs that were given, as they are written in a shell.
Does not cover: reading options (`given`), which commands are shown (`search.display.summary`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from lunar_tune.cli.options.run_options import RUN_OPTIONS, RunOption
from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.secrets import without_password

__all__ = ["given_again"]

_OF_THIS_SEARCH = {"run", "name", "resume", "force"}


def given_again(
    config: SearchConfig, origins: Collection[str], *, base: RunOptions
) -> tuple[str, ...]:
    """Return options that lead to a configuration, but for the search's own name.

    They are shown: a password in an address is left out.

    Args:
        config: What was told.
        origins: Fields that were not left at their default.
        base: What a search's runs are told if nothing is given.
    """
    arguments: list[str] = []
    for option in RUN_OPTIONS:
        path = option.path_for(config.run.method)
        value = _at(config.run, path)
        if path.split(".")[0] in origins and value != _at(base, path):
            arguments += _written(option, value)
    for field in dataclasses.fields(SearchConfig):
        value = getattr(config, field.name)
        if field.name not in origins or field.name in _OF_THIS_SEARCH or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, tuple):
            arguments += [part for one in value for part in (flag, str(one))]
        elif value is not None:
            address = field.name == "tracking_uri"
            arguments += [flag, without_password(value) if address else str(value)]
    return tuple(arguments)


def _written(option: RunOption, value: Any) -> list[str]:
    if option.kind is bool:
        on, _, off = option.flag.partition("/")
        return [on if value or not off else off]
    if value is None:  # the one number that is also written as a word
        return [option.flag, "all"]
    return [option.flag, ",".join(value) if isinstance(value, tuple) else str(value)]


def _at(part: Any, path: str) -> Any:
    """Return a field of a dataclass at any depth."""
    for name in path.split("."):
        part = getattr(part, name)
    return part
