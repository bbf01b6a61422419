"""Tensors on disk under the hash of what made them: captured once, read by whoever needs them.

    <user's cache>/activations/<key>/about.json
                                    /point-014.safetensors      one tensor, its digest in the header

Covers: atomic writes, processes that write at once, a digest checked once per process and file, a
bound on the size (the entries used longest ago go first), files that only their owner can read.
Does not cover: what is captured (`streams`) and what goes into a key (`prompts`).

Reading maps a file into memory: pages are loaded as they are touched and shared between processes.
A file that is deleted while it is mapped stays readable for those who have it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from lunar_tune.memory import GIB
from lunar_tune.paths import cache_dir

__all__ = ["ActivationCache", "CacheEntry", "EntryInfo", "content_key", "default_limit_gib"]

_TENSOR, _DIGEST = "tensor", "sha256"
_ABOUT = "about.json"
_KEY_CHARACTERS = 32
_STALE_SECONDS = 24 * 3600  # an unfinished file of this age belongs to a process that died
_checked: set[tuple[str, int, int]] = set()
logger = logging.getLogger(__name__)


def content_key(parts: Mapping[str, Any]) -> str:
    """Return the name under which something made of `parts` is kept."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_CHARACTERS]


def default_limit_gib() -> float:
    """Return the size that the cache may grow to: a quarter of the disk's free space, at most 100 GiB."""
    free = shutil.disk_usage(cache_dir()).free
    return min(100.0, free / 4 / GIB)


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """One entry, to be shown."""

    key: str
    about: Mapping[str, Any]
    """Model, rows and so on."""
    files: int
    bytes: int
    used: float
    """When it was last used, in seconds since 1970."""


class ActivationCache:
    """All entries of this machine's user.

    Args:
        limit_gib: GiB that all entries together may take; None is `default_limit_gib`.
        root: The folder; None is the user's cache.
    """

    def __init__(self, limit_gib: float | None = None, root: Path | None = None) -> None:
        self.root = root if root is not None else cache_dir() / "activations"
        self._limit_gib = limit_gib

    @property
    def limit_bytes(self) -> int:
        """Bytes that all entries together may take."""
        limit = default_limit_gib() if self._limit_gib is None else self._limit_gib
        return int(limit * GIB)

    def entry(self, key: str, about: Mapping[str, Any]) -> CacheEntry:
        """Return an entry, which may hold nothing yet.

        Args:
            key: From `content_key`.
            about: What to show of it.
        """
        return CacheEntry(self, key, about)

    def entries(self) -> list[EntryInfo]:
        """Return what there is, last used first."""
        found = []
        for folder in self._folders():
            with contextlib.suppress(OSError, ValueError):  # removed by another process meanwhile
                files = [file.stat() for file in folder.glob("*.safetensors")]
                about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
                size = sum(file.st_size for file in files)
                used = folder.stat().st_mtime
                found.append(EntryInfo(folder.name, about, len(files), size, used))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def remove(self, key: str) -> None:
        """Remove one entry; one that is not there is no mistake."""
        folder = self.root / key
        if folder.parent == self.root:
            shutil.rmtree(folder, ignore_errors=True)

    def empty(self) -> int:
        """Remove everything, unfinished files included, and return the bytes that were freed."""
        freed = sum(file.stat().st_size for file in self.root.rglob("*") if file.is_file())
        shutil.rmtree(self.root, ignore_errors=True)
        return freed

    def make_room(self, needed: int, keep: str) -> bool:
        """Remove entries used longest ago until `needed` bytes fit; say whether they do.

        Args:
            needed: Bytes that are going to be written.
            keep: The entry that they belong to, which stays.
        """
        entries = self.entries()
        held = sum(entry.bytes for entry in entries)
        for entry in reversed(entries):
            if held + needed <= self.limit_bytes:
                break
            if entry.key != keep:
                self.remove(entry.key)
                held -= entry.bytes
        return held + needed <= self.limit_bytes and needed < shutil.disk_usage(self.root).free

    def _folders(self) -> list[Path]:
        return [path for path in self.root.glob("*") if path.is_dir()] if self.root.exists() else []


class CacheEntry:
    """The tensors made of one model and one set of prompts."""

    def __init__(self, cache: ActivationCache, key: str, about: Mapping[str, Any]) -> None:
        self.key = key
        self._cache = cache
        self._about = dict(about)
        self._folder = cache.root / key

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process of this machine captures for the same entry."""
        self._make_folder()
        with FileLock(self._cache.root / f"{self.key}.lock", mode=0o600):
            yield

    def load(self, name: str) -> Tensor | None:
        """Return a tensor, mapped from its file; None if it is not there or is damaged."""
        file = self._folder / f"{name}.safetensors"
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(_TENSOR)
                expected = (opened.metadata() or {}).get(_DIGEST)
            self._check(file, tensor, expected)
            os.utime(self._folder)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            logger.warning("%s is damaged (%s) and is captured again", file, error)
            file.unlink(missing_ok=True)
            return None
        return tensor

    def save(self, name: str, tensor: Tensor) -> bool:
        """Write a tensor; return whether there was room for it.

        Args:
            name: The file's name without its ending.
            tensor: In host memory.
        """
        try:
            self._make_folder()
            if not self._cache.make_room(tensor.nbytes, self.key):
                return False
            _write(
                self._folder / f"{name}.safetensors",
                lambda path: save_file({_TENSOR: tensor}, path, {_DIGEST: _digest(tensor)}),
            )
        except OSError as error:
            logger.warning("activations cannot be kept on disk, the run goes on: %s", error)
            return False
        return True

    def _make_folder(self) -> None:
        self._cache.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder.mkdir(exist_ok=True, mode=0o700)
        about = self._folder / _ABOUT
        if not about.exists():
            text = json.dumps(self._about, indent=1)
            _write(about, lambda path: Path(path).write_text(text, encoding="utf-8"))
        for left in self._folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    left.unlink()

    def _check(self, file: Path, tensor: Tensor, expected: str | None) -> None:
        """Compare content and digest, once for each file in a process's life."""
        stat = file.stat()
        mark = (str(file), stat.st_mtime_ns, stat.st_size)
        if mark in _checked:
            return
        if _digest(tensor) != expected:
            raise ValueError("its digest does not match")
        _checked.add(mark)


def _digest(tensor: Tensor) -> str:
    raw = tensor.contiguous().flatten().view(uint8).numpy()
    return hashlib.sha256(memoryview(raw)).hexdigest()


def _write(target: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the target and rename: readers see the whole file or none."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=target.parent)  # mode 0600
    os.close(handle)
    unfinished = Path(name)
    try:
        write(unfinished)
        unfinished.chmod(0o600)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
