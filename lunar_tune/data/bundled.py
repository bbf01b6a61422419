"""The data that lunar-tune ships, by name.

Covers: which names there are, what each holds, and names or paths turned into paths.
Does not cover: reading (`readers`); where the data come from (`datasets/README.md`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lunar_tune.errors import DataError
from lunar_tune.paths import datasets_dir
from lunar_tune.registry import Registry

__all__ = ["BUNDLED", "DataKind", "bundled_names", "resolve_data"]

DataKind = Literal["records", "prompts"]

BUNDLED: Registry[tuple[DataKind, str]] = Registry("shipped data set", error_class=DataError)
"""What each shipped name holds, and its file in the folder `datasets`."""

BUNDLED.register("mini", ("records", "mini.json"))
BUNDLED.register("contracts", ("records", "contracts.json"))
BUNDLED.register("factual", ("records", "factual.json"))
BUNDLED.register("unverifiable", ("prompts", "unverifiable.json"))
BUNDLED.register("harmful", ("prompts", "harmful.json"))
BUNDLED.register("refusals", ("prompts", "refusals.txt"))


def bundled_names(kind: DataKind) -> tuple[str, ...]:
    """Return the shipped names of one kind."""
    return tuple(name for name, (held, _) in BUNDLED.items() if held == kind)


def resolve_data(name_or_path: str | Path, *, kind: DataKind) -> Path:
    """Return the file that a user means.

    A shipped name wins over a file of the same name in the current folder; write `./mini` for
    that file.

    Args:
        name_or_path: A shipped name, or the path of a file.
        kind: `records` for `read_records`, `prompts` for `read_prompts`.

    Raises:
        DataError: Neither a shipped name nor a file, or a shipped name of the other kind; the
            message lists the names that would do.
    """
    asked = str(name_or_path)
    shipped = ", ".join(bundled_names(kind))
    if isinstance(name_or_path, str) and asked in BUNDLED:
        return _shipped_file(asked, kind)
    try:
        path = Path(asked).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a home that does not exist
        raise DataError(f"{asked!r} cannot be looked at ({error})") from error
    if is_folder:
        raise DataError(f"{path} is a folder: give a file in it, or a shipped name: {shipped}.")
    if not exists:
        raise DataError(f"{asked!r} is neither a file nor a shipped name; there are: {shipped}.")
    return path


def _shipped_file(name: str, kind: DataKind) -> Path:
    held, file_name = BUNDLED[name]
    if held != kind:
        would_do = ", ".join(bundled_names(kind))
        raise DataError(f"{name!r} holds {held}, {kind} are needed; there are: {would_do}.")
    path = datasets_dir() / file_name
    if not path.is_file():
        raise DataError(f"shipped data set {name!r} is missing at {path}: install lunar-tune again")
    return path
