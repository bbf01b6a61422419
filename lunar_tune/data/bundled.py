"""The data that lunar-tune ships, by name, and names of data turned into files."""

from __future__ import annotations

from pathlib import Path

from lunar_tune.data.published import PUBLISHED, DataKind
from lunar_tune.errors import DataError
from lunar_tune.files import data_dir, datasets_dir
from lunar_tune.registry import Registry

__all__ = ["BUNDLED", "DataKind", "bundled_names", "published_names", "resolve_data"]

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

    A shipped name wins over a published one, and both over a file of the same name in the current
    folder; write `./mini` for that file.

    Args:
        name_or_path: A shipped name, the name of a published data set, or the path of a file.
        kind: `records` for `read_records`, `prompts` for `read_prompts`.

    Raises:
        DataError: None of these, a name of the other kind, or a published data set that was not
            fetched yet; the message lists the names that would do.
    """
    asked = str(name_or_path)
    if isinstance(name_or_path, str) and asked in BUNDLED:
        return _shipped_file(asked, kind)
    if isinstance(name_or_path, str) and asked in PUBLISHED:
        return _fetched_file(asked, kind)
    try:
        path = Path(asked).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a home that does not exist
        raise DataError(f"{asked!r} cannot be looked at ({error})") from error
    if is_folder:
        shipped = ", ".join(bundled_names(kind))
        raise DataError(f"{path} is a folder: give a file in it, or a shipped name: {shipped}.")
    if not exists:
        raise DataError(f"{asked!r} is neither a file nor a shipped name; {_would_do(kind)}")
    return path


def published_names(kind: DataKind) -> tuple[str, ...]:
    """Return the names of published data sets of one kind, fetched or not."""
    return tuple(name for name, published in PUBLISHED.items() if published.kind == kind)


def _would_do(kind: DataKind) -> str:
    shipped, published = ", ".join(bundled_names(kind)), ", ".join(published_names(kind))
    return f"there are: {shipped}; scripts/fetch_datasets fetches: {published}."


def _check_kind(name: str, held: DataKind, kind: DataKind) -> None:
    if held != kind:
        raise DataError(f"{name!r} holds {held}, {kind} are needed; {_would_do(kind)}")


def _shipped_file(name: str, kind: DataKind) -> Path:
    held, file_name = BUNDLED[name]
    _check_kind(name, held, kind)
    path = datasets_dir() / file_name
    if not path.is_file():
        raise DataError(f"shipped data set {name!r} is missing at {path}: install lunar-tune again")
    return path


def _fetched_file(name: str, kind: DataKind) -> Path:
    published = PUBLISHED[name]
    _check_kind(name, published.kind, kind)
    path = data_dir() / published.file_name
    if not path.is_file():
        raise DataError(
            f"{name!r} is not fetched yet ({path} is missing): run scripts/fetch_datasets {name} "
            f"(the same as python -m lunar_tune.fetch {name})."
        )
    return path
