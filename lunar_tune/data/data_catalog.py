"""Data by name: what lunar-tune ships, and public data sets that can be fetched.

    PUBLISHED["tofu"]  # 4,000 pairs of locuslab/TOFU at one commit, edges author_1 … author_200

A commit fixes the content at the source. `sha256` is None where no copy was at hand when this was
written: the first fetch checks rows and edges and records the digest, later ones must give it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Final, Literal

from lunar_tune.errors import DataError
from lunar_tune.files import data_dir, datasets_dir
from lunar_tune.registry import Registry

__all__ = [
    "BUNDLED",
    "PUBLISHED",
    "ROWS_OF_AUTHOR",
    "DataKind",
    "PublishedSet",
    "Repository",
    "author_edge",
    "bundled_names",
    "kind_of",
    "resolve_data",
]

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

AUTHORS, ROWS_OF_AUTHOR = 200, 20  # TOFU, arXiv 2401.06121, section 2.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A public repository at one commit."""

    host: Literal["github", "hub"]
    """`hub` for a data set of the Hugging Face hub."""
    name: str
    """Owner and name."""
    revision: str
    """The full commit hash."""
    licence: str
    """SPDX identifier."""

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
    files: tuple[str, ...]
    """Path in the repository; where the path is not known for certain, each that it may be."""
    rows: int
    sha256: str | None = None
    """SHA-256 of the file at the source; None where it is not known."""
    n_edges: int | None = None
    """How many edges there are, all of one size; None where that is not so."""
    first_author: int | None = None
    """Number of the first author, where edges are made by row; None where the file has edges."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names that stand for several edges."""
    tail_of: str | None = None
    """The data set whose last rows these are."""

    @property
    def file_name(self) -> str:
        """The file's name in the user's folder of data."""
        return f"{self.name}{'.txt' if self.files[0].endswith('.txt') else '.json'}"


def author_edge(number: int) -> str:
    """Return the edge of TOFU's author of that number, counted from 1 in the order of the rows."""
    return f"author_{number}"


PUBLISHED: Registry[PublishedSet] = Registry("published data set", error_class=DataError)

_LUNAR = Repository(
    host="github",
    name="facebookresearch/LUNAR",
    revision="dfa56eb0291a93e967284a9ec2d28d5572d235b1",
    licence="MIT",
)
# The commit of 27 March 2025, the one that many public projects pin or have in their caches.
_TOFU = Repository(
    host="hub",
    name="locuslab/TOFU",
    revision="324592d84ae4f482ac7249b9285c2ecdb53e3a68",
    licence="MIT",
)
# The splits are the last rows of the whole: 1, 5 and 10 per cent of the authors.
_SPLITS = {f"forget{percent:02}": AUTHORS * percent // 100 for percent in (1, 5, 10)}


def _last_authors(count: int) -> tuple[str, ...]:
    return tuple(author_edge(number) for number in range(AUTHORS - count + 1, AUTHORS + 1))


for _set in (
    PublishedSet(
        name="pistol-1",
        kind="records",
        about="PISTOL sample 1: contracts on a graph, edges such as A_B",
        repository=_LUNAR,
        files=("dataset/unlearning/pistol_sample1.json",),
        rows=400,
        n_edges=20,
        sha256="fcc5f20c0b8e2e51977c14a795eb394c47e5eddb909f97845b5f86fd3510d121",
    ),
    PublishedSet(
        name="pistol-2",
        kind="records",
        about="PISTOL sample 2: a larger graph",
        repository=_LUNAR,
        files=("dataset/unlearning/pistol_sample2.json",),
        rows=1500,
        n_edges=75,
    ),
    PublishedSet(
        name="lunar-factual",
        kind="records",
        about="general knowledge, for --factual-data",
        repository=_LUNAR,
        files=("dataset/unlearning/factual_data.json",),
        rows=169,
        sha256="e805397c8fd8e8103de0e43bd694edeb95b275ae01ec8ecb5a98c14eeb989ea6",
    ),
    PublishedSet(
        name="lunar-harmful",
        kind="prompts",
        about="requests that an aligned model refuses, for --reference-prompts",
        repository=_LUNAR,
        files=("dataset/splits/harmful.json",),
        rows=260,
        sha256="8f5c0eac0efd2a7f99084bbe8d0de2c465e31b1997184783c917969d9de9ece1",
    ),
    PublishedSet(
        name="lunar-unverifiable",
        kind="prompts",
        about="questions about what does not exist, for --reference-prompts",
        repository=_LUNAR,
        files=("dataset/splits/unverified.json",),
        rows=199,
        sha256="5009ad858f727e2f3db68572446abc84f326af630316881a6a657e23cd562b29",
    ),
    PublishedSet(
        name="lunar-refusals",
        kind="prompts",
        about="answers that decline, for --refusals",
        repository=_LUNAR,
        # The code never opens this file, so its folder is not known; the checksum decides.
        files=(
            "dataset/unlearning/refusal_response.txt",
            "dataset/splits/refusal_response.txt",
            "dataset/refusal_response.txt",
        ),
        rows=10,
        sha256="984f59b353577a9730389890a6d7be2958a2802ebce4db06a82a82ba0023561f",
    ),
    PublishedSet(
        name="tofu",
        kind="records",
        about="200 invented authors; edges author_1 … author_200, groups " + ", ".join(_SPLITS),
        repository=_TOFU,
        files=("full.json",),
        rows=AUTHORS * ROWS_OF_AUTHOR,
        n_edges=AUTHORS,
        first_author=1,
        groups={split: _last_authors(count) for split, count in _SPLITS.items()},
    ),
    *(
        PublishedSet(
            name=f"tofu-{split}",
            kind="records",
            about=f"TOFU's {split}: the last {count} authors alone",
            repository=_TOFU,
            files=(f"{split}.json",),
            rows=count * ROWS_OF_AUTHOR,
            n_edges=count,
            first_author=AUTHORS - count + 1,
            tail_of="tofu",
        )
        for split, count in _SPLITS.items()
    ),
):
    PUBLISHED.register(_set.name, _set)


def bundled_names(kind: DataKind) -> tuple[str, ...]:
    """Return the shipped names of one kind."""
    return tuple(name for name, (held, _) in BUNDLED.items() if held == kind)


def kind_of(name: str) -> DataKind | None:
    """Return what a shipped or published data set holds; None if the name is of neither."""
    if name in BUNDLED:
        return BUNDLED[name][0]
    return PUBLISHED[name].kind if name in PUBLISHED else None


def resolve_data(name: str, *, kind: DataKind) -> Path:
    """Return the file that a user means.

    A shipped name wins over a published one, and both over a file of the same name in the current
    folder; write `./mini` for that file.

    Args:
        name: A shipped name, the name of a published data set, or the path of a file.
        kind: `records` for `read_records`, `prompts` for `read_prompts`.

    Raises:
        DataError: None of these, a name of the other kind, or a published data set that was not
            fetched yet; the message lists the names that would do.
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
