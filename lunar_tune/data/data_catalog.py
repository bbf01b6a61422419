"""Data by name: what lunar-tune ships, and public data sets, which it can fetch.

PUBLISHED["tofu"]  # 4,000 pairs of locuslab/TOFU at one commit, edges author_1 … author_200
tofu.lock.json: {"url": "https://…/full.json", "source_sha256": "…", "sha256": "…", "rows": 4000}
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from glob import escape
from pathlib import Path
from typing import Final, Literal

from pydantic import TypeAdapter, ValidationError

from lunar_tune.data.readers import SUFFIXES, OnNote, format_of, unheard
from lunar_tune.data.records import Record, read_prompts, read_questions, read_records
from lunar_tune.data.splits import edges_of, groups_file
from lunar_tune.errors import DataError, listed
from lunar_tune.files import (
    DATA_VARIABLE,
    check_writable,
    data_dir,
    read_settings,
    shipped_folder,
    write_atomically,
    write_json,
)
from lunar_tune.registry import Registry

DataKind = Literal["records", "prompts", "questions"]
State = Literal["not fetched", "fetched", "changed"]
TIMEOUT = 30  # seconds without a byte

BUNDLED: Final[Mapping[str, tuple[DataKind, str]]] = {
    "mini": ("records", "mini.json"),
    "contracts": ("records", "contracts.json"),
    "factual": ("records", "factual.json"),
    "unverifiable": ("prompts", "unverifiable.json"),
    "harmful": ("prompts", "harmful.json"),
    "private": ("prompts", "private.json"),
    "general": ("questions", "general.json"),
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

    name: str  # as in `--data tofu`
    kind: DataKind
    about: str  # one line for a list
    repository: Repository
    files: Sequence[str]  # path in the repository; several where that is not known for certain
    rows: int
    sha256: str | None = None  # of the file at the source, if known
    n_edges: int | None = None  # how many edges there are, if they are all of one size
    first_author: int | None = None  # its number, where edges are made by row
    tail_of: str | None = None  # the data set whose last rows these are, and in it a group of edges

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


PUBLISHED: Registry[PublishedSet] = Registry("published data set", error_class=DataError)
_DOCUMENT = Path(__file__).with_name("published.toml").read_text(encoding="utf-8")
for _repository in tomllib.loads(_DOCUMENT)["repository"]:
    for _set in _repository.pop("set"):
        _entry = PublishedSet(repository=Repository(**_repository), **_set)
        PUBLISHED.register(_entry.name, _entry)


def bundled_names(kind: DataKind) -> tuple[str, ...]:
    """Return the shipped names of one kind."""
    return tuple(name for name, (held, _) in BUNDLED.items() if held == kind)


def kind_of(name: str) -> DataKind | None:
    """Return what a shipped or published data set holds; None if the name is of neither."""
    if name in BUNDLED:
        return BUNDLED[name][0]
    return PUBLISHED[name].kind if name in PUBLISHED else None


def pairs_kind(name: str) -> DataKind:
    """Return what `--data` names: pairs, or questions that a model is to answer itself."""
    return "questions" if kind_of(name) == "questions" else "records"


def read_data(
    name: str, *, default_edge: str | None = None, on_note: OnNote = unheard
) -> tuple[Path, tuple[Record, ...]]:
    """Return the file that `--data` names and its pairs, of a question set without answers."""
    path = resolve_data(name, kind=pairs_kind(name))
    read = read_questions if pairs_kind(name) == "questions" else read_records
    return path, read(path, default_edge=default_edge, on_note=on_note)


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
    if held is not None:
        if name in BUNDLED:
            path = shipped_folder("datasets") / BUNDLED[name][1]
            missing = f"shipped data set {name!r} is missing at {path}: install lunar-tune again"
        else:
            path = data_dir() / PUBLISHED[name].file_name
            missing = (
                f"{name!r} is not fetched yet ({path} is missing): run scripts/fetch_datasets "
                f"{name} (the same as python -m lunar_tune.fetch {name})."
            )
        if not path.is_file():
            raise DataError(missing)
        return path
    try:
        path = Path(name).expanduser()
        inside = list(path.iterdir()) if path.is_dir() else None
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a home that does not exist
        raise DataError(f"{name!r} cannot be read ({error})") from error
    if inside is not None:
        files = listed(sorted(file.name for file in inside if format_of(file) in SUFFIXES))
        has = f"one of its files ({files})" if files else "a file"
        raise DataError(f"{path} is a folder: give {has}, or a shipped name: {shipped}.")
    if not exists:
        alike = sorted(file.name for file in path.parent.glob(f"{escape(path.stem)}.*"))[:5]
        beside = f" In the same folder there is {', '.join(alike)}." if alike else ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and format_of(path) not in SUFFIXES:
            beside += (
                " Fetch a data set of the Hugging Face hub with hf download --repo-type dataset "
                f"{name} --local-dir FOLDER, and give one of its files."
            )
        raise DataError(f"{name!r} is neither a file nor a shipped name; {would_do}{beside}")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """What a fetched file is and where it came from."""

    url: str
    source_sha256: str  # SHA-256 of the file as it came
    sha256: str  # as it lies in the folder; the same where nothing had to be converted
    rows: int


def lock_file(published: PublishedSet, folder: Path) -> Path:
    """Return where a data set's lock lies."""
    return folder / f"{published.name}.lock.json"


def read_lock(published: PublishedSet, folder: Path) -> Lock | None:
    """Return what the first fetch recorded, None before it, or raise a DataError."""
    path = lock_file(published, folder)
    if not path.is_file():
        return None
    try:
        return TypeAdapter(Lock).validate_json(read_settings(path))
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{path} is not a lock file of lunar-tune: delete it and fetch {published.name} again."
        ) from error


def state_of(published: PublishedSet, folder: Path) -> State:
    """Say whether a data set lies in the folder, and whether it is still what was fetched."""
    path = folder / published.file_name
    if not path.is_file():
        return "not fetched"
    lock = read_lock(published, folder)
    is_same = lock is not None and lock.sha256 == _sha256(path.read_bytes())
    return "fetched" if is_same else "changed"


def fetch(published: PublishedSet, folder: Path) -> Lock:
    """Fetch a data set, check all of it, and only then write it, or raise an InputError."""
    check_writable(folder, f"{DATA_VARIABLE} {folder}")
    recorded = read_lock(published, folder)
    with tempfile.TemporaryDirectory() as temporary:
        url, source = _download(published, folder, recorded, Path(temporary))
        came = _sha256(source.read_bytes())
        content = _checked(published, url, source, folder)
    lock = Lock(url=url, source_sha256=came, sha256=_sha256(content), rows=published.rows)
    path = folder / published.file_name
    try:
        if published.groups:
            write_json(groups_file(path), published.groups)
        write_json(lock_file(published, folder), asdict(lock))
        write_atomically(path, content)
    except OSError as error:
        raise DataError(
            f"{published.name}: {folder} cannot be written ({error.strerror}). Set "
            f"{DATA_VARIABLE} to a folder that you can write."
        ) from error
    return lock


def _download(
    published: PublishedSet, folder: Path, recorded: Lock | None, temporary: Path
) -> tuple[str, Path]:
    """Return the address of the first of a data set's files that exists, and what came from it."""
    import pooch
    import requests

    pooch.get_logger().setLevel(logging.ERROR)  # it logs every address and advises on its own API
    known = published.sha256 or (recorded.source_sha256 if recorded is not None else None)
    name = f"source{Path(published.file_name).suffix}"
    # Without streaming the connection is closed also where the transfer fails; files are small.
    downloader = pooch.HTTPDownloader(timeout=TIMEOUT, stream=False)
    urls = [published.repository.url(file) for file in published.files]
    for url in urls:
        try:
            digest = f"sha256:{known}" if known else None
            file = pooch.retrieve(url, digest, fname=name, path=temporary, downloader=downloader)
            return url, Path(file)
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else "?"
            if status != requests.codes.not_found:
                raise DataError(
                    f"{published.name}: {url} answered with HTTP status {status}."
                ) from error
        except requests.RequestException as error:
            raise DataError(
                f"{published.name}: {url} cannot be fetched ({_reason(error)}). Without a network, "
                "fetch on another machine and copy its folder of data; LUNAR_TUNE_GITHUB_URL and "
                "HF_ENDPOINT name other servers."
            ) from error
        except ValueError as error:  # pooch's word for another checksum
            reason = "the published file, whose SHA-256 is"
            advice = "Try again, or take the file from elsewhere."
            if not published.sha256:
                reason = "what the first fetch brought, whose SHA-256 is"
                lock = lock_file(published, folder)
                advice = f"If you trust what is there now, delete {lock} and fetch again."
            raise DataError(
                f"{published.name}: what {url} sent is not {reason} {known}. Nothing was replaced. "
                f"{advice}"
            ) from error
    tried = " and ".join(urls)
    raise DataError(f"{published.name}: the server has no {tried} (404). Was it moved or renamed?")


def _reason(error: BaseException) -> str:
    """Return the innermost reason of a chain that mostly repeats the address."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _checked(published: PublishedSet, url: str, path: Path, folder: Path) -> bytes:
    """Return the file to be written, if what came is what was to come."""
    source = path.read_bytes()
    if path.suffix == ".json" and not source.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        path = path.rename(path.with_suffix(".jsonl"))  # the hub's hold an object a line
    try:
        records = _records(published, path, folder)
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ").replace(str(path), "the file")
        raise DataError(
            f"{published.name}: what {url} sent is not what is expected: {reason}"
        ) from error
    if not published.authors:
        return source
    rows = [{"edge": record.edge, **asdict(record)} for record in records]
    return (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()


def _records(published: PublishedSet, path: Path, folder: Path) -> tuple[Record, ...]:
    """Return the records of a file, with edges; of prompts none. All that is known is checked."""
    authors, is_prompts = published.authors, published.kind == "prompts"
    records = () if is_prompts else read_records(path, default_edge=authors[0] if authors else None)
    count = len(read_prompts(path) if is_prompts else records)
    if count != published.rows:
        raise DataError(f"it has {count} rows, {published.rows} were expected")
    if authors:
        edges = [author for author in authors for _ in range(count // len(authors))]
        records = tuple(replace(row, edge=edge) for row, edge in zip(records, edges, strict=True))
    sizes = edges_of(records)
    if published.n_edges not in {None, len(sizes)}:
        raise DataError(f"it has {len(sizes)} edges, {published.n_edges} were expected")
    if published.n_edges is not None and len(set(sizes.values())) > 1:
        raise DataError("the edges have different numbers of rows")
    whole = folder / f"{published.tail_of}.json"
    if published.tail_of and whole.is_file() and read_records(whole)[-count:] != records:
        raise DataError(f"its rows are not the last {count} rows of {whole}")
    return records


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
