"""Data by name: what lunar-tune ships, and public data sets that can be fetched.

PUBLISHED["tofu"]  # 4,000 pairs of locuslab/TOFU at one commit, edges author_1 … author_200
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Final, Literal

from lunar_tune.errors import DataError
from lunar_tune.files import data_dir, datasets_dir
from lunar_tune.registry import Registry

DataKind = Literal["records", "prompts"]

BUNDLED: Final[Mapping[str, tuple[DataKind, str]]] = {
    "mini": ("records", "mini.json"),
    "contracts": ("records", "contracts.json"),
    "factual": ("records", "factual.json"),
    "unverifiable": ("prompts", "unverifiable.json"),
    "harmful": ("prompts", "harmful.json"),
    "refusals": ("prompts", "refusals.txt"),
}
"""What each shipped name holds, and its file in the folder `datasets`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A public repository at one commit."""

    host: Literal["github", "hub"]  # `hub` for a data set of the Hugging Face hub
    name: str  # owner and name
    revision: str  # the full commit hash
    licence: str  # SPDX identifier

    @property
    def page(self) -> str:
        """Where a person can read about it."""
        site = "github.com" if self.host == "github" else "huggingface.co/datasets"
        return f"https://{site}/{self.name}/tree/{self.revision}"

    def url(self, file: str) -> str:
        """Return the address of a file, on the server that the environment may name instead."""
        if self.host == "github":
            server = os.environ.get("LUNAR_TUNE_GITHUB_URL") or "https://raw.githubusercontent.com"
            return f"{server.rstrip('/')}/{self.name}/{self.revision}/{file}"
        server = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{server.rstrip('/')}/datasets/{self.name}/resolve/{self.revision}/{file}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSet:
    """A data set that can be fetched, and what it must hold."""

    name: str
    """As in `--data tofu`."""
    kind: DataKind
    about: str
    """One line for a list."""
    repository: Repository
    files: Sequence[str]
    """Path in the repository; where the path is not known for certain, each that it may be."""
    rows: int
    sha256: str | None = None
    """SHA-256 of the file at the source; None where it is not known."""
    n_edges: int | None = None
    """How many edges there are, all of one size; None where that is not so."""
    first_author: int | None = None
    """Number of the first author, where edges are made by row; None where the file has edges."""
    tail_of: str | None = None
    """The data set whose last rows these are, in which they are a group of edges."""

    @property
    def file_name(self) -> str:
        """The file's name in the user's folder of data."""
        return f"{self.name}{'.txt' if self.files[0].endswith('.txt') else '.json'}"

    @property
    def authors(self) -> tuple[str, ...]:
        """The edges that are made by row, each of as many rows; none where the file has edges."""
        if self.first_author is None:
            return ()
        return tuple(f"author_{self.first_author + n}" for n in range(self.n_edges or 0))

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Edges by the names of groups."""
        parts = [entry for entry in PUBLISHED.values() if entry.tail_of == self.name]
        return {part.name.removeprefix(f"{self.name}-"): part.authors for part in parts}


def _published() -> Registry[PublishedSet]:
    document = Path(__file__).with_name("published.toml").read_text(encoding="utf-8")
    entries: Registry[PublishedSet] = Registry("published data set", error_class=DataError)
    for content in tomllib.loads(document)["repository"]:
        sets = content.pop("set")
        for one in sets:
            entries.register(one["name"], PublishedSet(repository=Repository(**content), **one))
    return entries


PUBLISHED = _published()


def bundled_names(kind: DataKind) -> tuple[str, ...]:
    """Return the shipped names of one kind."""
    return tuple(name for name, (held, _) in BUNDLED.items() if held == kind)


def kind_of(name: str) -> DataKind | None:
    """Return what a shipped or published data set holds; None if the name is of neither."""
    if name in BUNDLED:
        return BUNDLED[name][0]
    return PUBLISHED[name].kind if name in PUBLISHED else None


def resolve_data(name: str, *, kind: DataKind) -> Path:
    """Return the file that a user means by a name or a path, or raise a DataError.

    A shipped name wins over a published one, and both over a file of the same name in the current
    folder; write `./mini` for that file.
    """
    held, shipped = kind_of(name), ", ".join(bundled_names(kind))
    published = ", ".join(other for other, entry in PUBLISHED.items() if entry.kind == kind)
    would_do = f"there are: {shipped}; scripts/fetch_datasets fetches: {published}."
    if held is not None and held != kind:
        raise DataError(f"{name!r} holds {held}, {kind} are needed; {would_do}")
    if name in BUNDLED:
        path = datasets_dir() / BUNDLED[name][1]
        if not path.is_file():
            raise DataError(
                f"shipped data set {name!r} is missing at {path}: install lunar-tune again"
            )
        return path
    if name in PUBLISHED:
        path = data_dir() / PUBLISHED[name].file_name
        if not path.is_file():
            raise DataError(
                f"{name!r} is not fetched yet ({path} is missing): run scripts/fetch_datasets "
                f"{name} (the same as python -m lunar_tune.fetch {name})."
            )
        return path
    try:
        path = Path(name).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a home that does not exist
        raise DataError(f"{name!r} cannot be looked at ({error})") from error
    if is_folder:
        raise DataError(f"{path} is a folder: give a file in it, or a shipped name: {shipped}.")
    if not exists:
        alike = sorted(file.name for file in path.parent.glob(f"{escape(path.stem)}.*"))[:5]
        beside = f" In the same folder there is {', '.join(alike)}." if alike else ""
        raise DataError(f"{name!r} is neither a file nor a shipped name; {would_do}{beside}")
    return path
