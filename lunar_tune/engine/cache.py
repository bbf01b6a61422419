"""Tensors on disk under the hash of what made them: captured once, read by whoever needs them.

    <user's cache>/activations/<key>/point-014.safetensors
                              /<key>.lock

A file holds one tensor; its header has the tensor's digest, and what to show of the entry. Reading
maps it into memory, where it stays readable when the file is deleted; so a file is replaced or
deleted, and never written to again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from lunar_tune.files import cache_dir, replacing
from lunar_tune.models.device import GIB

if TYPE_CHECKING:
    from torch import Tensor

_TENSOR, _DIGEST, _ABOUT = "tensor", "sha256", "about"
_ENDING = ".safetensors"
_KEY = re.compile(r"[0-9a-f]{32}")  # nothing under another name is ours to list or to remove
_SPARE_BYTES = 2**28  # of the disk, left for what a run has to write: its results
logger = logging.getLogger(__name__)


def content_key(parts: Mapping[str, Any]) -> str:
    """Return the name under which something made of `parts` is kept."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """One entry, to be shown."""

    key: str
    about: Mapping[str, Any]  # model, rows and so on; empty where it was lost
    files: int  # tensors that can be read
    bytes: int
    used: datetime  # when it was last used, in UTC


class ActivationCache:
    """All entries of this machine's user; a folder that cannot be used raises an InputError.

    Together they may take `limit_gib` GiB; None is a quarter of what is free on the disk, at most
    100. They are in `root`; None is the user's cache.
    """

    def __init__(self, limit_gib: float | None = None, root: Path | None = None) -> None:
        self.root = root if root is not None else cache_dir() / "activations"
        self._limit_gib = limit_gib

    @property
    def limit_bytes(self) -> int:
        """Bytes that all entries together may take."""
        if self._limit_gib is None:
            return min(100 * GIB, _free_bytes(self.root) // 4)
        return int(self._limit_gib * GIB)

    def entry(self, key: str, about: Mapping[str, Any]) -> CacheEntry:
        """Return the entry of a `content_key`, which may hold nothing yet, and is shown so."""
        return CacheEntry(self, key, about)

    def entries(self) -> list[EntryInfo]:
        """Return what there is, last used first."""
        found = [entry for key in self._keys() if (entry := _info(self.root / key)) is not None]
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def remove(self, key: str) -> int:
        """Remove one entry and return the bytes that were freed; 0 if there is no such entry."""
        if not _KEY.fullmatch(key):
            return 0
        before = _info(self.root / key)
        shutil.rmtree(self.root / key, ignore_errors=True)
        after = _info(self.root / key)
        with suppress(OSError):  # who holds it goes on; at worst two capture the same
            (self.root / f"{key}.lock").unlink()
        return (before.bytes if before else 0) - (after.bytes if after else 0)

    def empty(self) -> int:
        """Remove everything, unfinished files included, and return the bytes that were freed."""
        return sum(map(self.remove, self._keys()))

    def make_room(self, needed: int, keep: str) -> bool:
        """Remove entries other than `keep`, used longest ago first, until `needed` bytes fit.

        Return whether they fit; nothing is removed where that would not be enough.
        """
        entries = self.entries()
        others = [entry for entry in entries if entry.key != keep]
        held = sum(entry.bytes for entry in entries)
        room = min(self.limit_bytes - held, _free_bytes(self.root) - _SPARE_BYTES)
        if needed > room + sum(entry.bytes for entry in others):
            return False
        while others and needed > room:
            room += self.remove(others.pop().key)
        return needed <= room

    def _keys(self) -> set[str]:
        """Return the keys of entries, and of locks whose entries are gone."""
        names = {path.name.removesuffix(".lock") for path in self.root.glob("*")}
        return set(filter(_KEY.fullmatch, names))


class CacheEntry:
    """The tensors made of one model and one set of prompts."""

    def __init__(self, cache: ActivationCache, key: str, about: Mapping[str, Any]) -> None:
        self.key = key
        self._cache, self._about = cache, dict(about)
        self._folder = cache.root / key

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process of this machine captures for the same entry.

        What one that died has left unfinished is removed. Where no lock can be had (a full disk,
        say) it goes on without: two may capture the same.
        """
        with ExitStack() as stack:
            try:
                self._cache.root.mkdir(parents=True, exist_ok=True, mode=0o700)
                lock = FileLock(self._cache.root / f"{self.key}.lock", mode=0o600)
                stack.enter_context(lock)
                for left in self._folder.glob(".*"):  # ours and safetensors' own
                    left.unlink(missing_ok=True)
            except (OSError, NotImplementedError) as error:
                logger.warning("activations are captured without a lock: %s", error)
            yield

    def load(self, name: str) -> Tensor | None:
        """Return a tensor, mapped from its file; None if it is not there or is damaged.

        A change to the tensor changes neither the file nor what others read.
        """
        file = self._folder / f"{name}{_ENDING}"
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(_TENSOR)
                expected = (opened.metadata() or {}).get(_DIGEST)
            if _digest(tensor) != expected:
                raise SafetensorError("its digest does not match")
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError) as error:  # says nothing about the content
            if file.exists():  # else it was removed between safetensors' opening and torch's
                logger.warning("%s cannot be read and is captured again: %s", file, error)
            return None
        except SafetensorError as error:
            logger.warning("%s is damaged and is captured again: %s", file, error)
            with suppress(OSError):
                file.unlink()
            return None
        with suppress(OSError):  # removed meanwhile: the tensor is still whole
            os.utime(self._folder)
        return tensor

    def save(self, name: str, tensor: Tensor) -> bool:
        """Write a tensor; return whether it was written, which a limit or the disk may forbid."""
        from safetensors.torch import save_file

        file = self._folder / f"{name}{_ENDING}"
        content = tensor.detach().contiguous()
        try:
            self._cache.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._cache.make_room(content.nbytes, self.key):
                return False
            self._folder.mkdir(exist_ok=True, mode=0o700)
            header = {_DIGEST: _digest(content), _ABOUT: json.dumps(self._about)}
            with replacing(file, cached=True) as unfinished:
                save_file({_TENSOR: content}, unfinished, header)
        except (OSError, SafetensorError) as error:  # the latter also where the disk is full
            logger.warning("activations cannot be cached on disk, the run goes on: %s", error)
            return False
        return True


def _free_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder, which need not exist yet."""
    here = folder.absolute()
    return shutil.disk_usage(next(path for path in (here, *here.parents) if path.exists())).free


def _info(folder: Path) -> EntryInfo | None:
    """Return an entry as it is now; None if there is none. Others may be removing its files."""
    try:
        used = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
        files = list(folder.iterdir())
    except OSError:
        return None
    size = 0
    for file in files:
        with suppress(OSError):
            size += file.stat().st_size
    tensors = [file for file in files if file.suffix == _ENDING]
    about: Mapping[str, Any] = {}
    with (
        suppress(OSError, IndexError, SafetensorError),  # no file, or a damaged one
        safe_open(tensors[0], framework="np") as opened,
    ):
        about = json.loads((opened.metadata() or {}).get(_ABOUT, "{}"))
    return EntryInfo(folder.name, about, len(tensors), size, used)


def _digest(tensor: Tensor) -> str:
    from torch import uint8

    return hashlib.sha256(tensor.contiguous().flatten().view(uint8).numpy().data).hexdigest()
