"""A configuration as the options that give it again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lunar_tune.config.fields import flag_of, options_of
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.secrets import without_password

__all__ = ["options_again"]


def options_again(config: SearchConfig, given: Collection[str]) -> tuple[str, ...]:
    """Return options that lead to a configuration, but for the search's own name.

    They are shown: a password in an address is left out.

    Args:
        config: What was told.
        given: Fields that were not left at their default.
    """
    arguments: list[str] = []
    for name, said in options_of(SearchConfig).items():
        value = getattr(config, name)
        default = SearchConfig.__dataclass_fields__[name].default
        if said.stored and name in given and value != default:
            arguments += _written(name, value, commas=said.commas)
    return tuple(arguments)


def _written(name: str, value: Any, *, commas: bool) -> list[str]:
    flag = flag_of(name)
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, tuple):
        texts = [",".join(value)] if commas else value
        return [part for text in texts for part in (flag, text)]
    return [] if value is None else [flag, without_password(str(value))]
