"""The cache of activations: what is read is what was written, whoever else writes or removes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import stat
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lunar_tune.engine import cache as cache_module
from lunar_tune.engine.cache import ActivationCache, CacheEntry, content_key
from lunar_tune.errors import InputError
from lunar_tune.models.device import GIB

ABOUT = {"model": "one", "kind": "streams", "dtype": "float32", "rows": 3}


@pytest.fixture
def cache(tmp_path: Path) -> ActivationCache:
    return ActivationCache(1.0, tmp_path / "cache")


@pytest.fixture
def entry(cache: ActivationCache) -> CacheEntry:
    return cache.entry(content_key({"about": "one"}), ABOUT)


@pytest.fixture
def file(cache: ActivationCache, entry: CacheEntry) -> Path:
    """Return where the entry keeps `x`."""
    return cache.root / entry.key / "x.safetensors"


def values(seed: int = 0, *, shape: Sequence[int] = (50, 8)) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def holds(entry: CacheEntry, written: Tensor, name: str = "x") -> bool:
    read = entry.load(name)
    return read is not None and read.dtype == written.dtype and torch.equal(read, written)


def unfinished(cache: ActivationCache) -> list[Path]:
    return [path for path in cache.root.rglob(".*") if path.is_file()]


def test_what_is_read_is_what_was_written(cache: ActivationCache, entry: CacheEntry) -> None:
    assert entry.load("x") is None
    assert not cache.root.exists(), "reading makes nothing"
    with torch.inference_mode():
        inferred = values() * 2
    shapes, dtypes = ((), (0, 8), (2, 3, 4)), (torch.float64, torch.bfloat16, torch.bool)
    drawn = [(values(shape=shape) * 3).to(dtype) for shape in shapes for dtype in dtypes]
    for written in (values().T, values()[::3, 2:5], inferred, *drawn):
        assert entry.save("x", written)
        assert holds(entry, written)


def test_what_was_read_stays_whatever_others_do(cache: ActivationCache, entry: CacheEntry) -> None:
    written = values(shape=(3000, 100))
    entry.save("x", written)
    read, changed = entry.load("x"), entry.load("x")
    assert read is not None
    assert changed is not None
    changed.zero_()
    assert holds(entry, written)
    entry.save("x", values(1))
    assert holds(entry, values(1))
    assert cache.remove(entry.key) > values(1).nbytes
    assert entry.load("x") is None
    assert torch.equal(read, written)
    assert entry.save("x", written), "the folder is made again"


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, file.stat().st_size // 2),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xff"),
        lambda file: save_file({"other": torch.zeros(3)}, file),
        lambda file: save_file({"tensor": torch.zeros(3)}, file),  # without a digest
    ],
)
def test_a_damaged_file_is_removed_with_a_warning_and_can_be_written_again(
    entry: CacheEntry, file: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    entry.save("x", values())
    assert holds(entry, values())
    damage(file)
    assert entry.load("x") is None
    assert f"{file} is damaged and is captured again" in caplog.text
    assert not file.exists()
    assert entry.save("x", values())
    assert holds(entry, values())


def test_what_is_left_is_mended(cache: ActivationCache, entry: CacheEntry, file: Path) -> None:
    entry.save("x", values())
    file.write_bytes(b"")
    [found] = cache.entries()
    assert (found.about, found.files) == ({}, 1)
    file.with_name(".a.tmp").touch()
    with entry.locked():
        assert unfinished(cache) == [], "what a dead process left"
        entry.save("x", values())
    assert cache.entries()[0].about == ABOUT, "the next writing mends it"


def test_a_full_disk_is_a_warning_and_leaves_nothing_unfinished(
    cache: ActivationCache, entry: CacheEntry, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files may have 10,000 bytes for a while; then a folder stands in the file's place."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        saved = entry.save("large", torch.zeros(10_000)), entry.save("x", torch.zeros(10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved == (False, True)
    assert "cannot be cached on disk, the run goes on" in caplog.text
    assert list(cache.root.rglob("*.safetensors")) == [file]
    file.unlink()
    file.mkdir()
    assert not entry.save("x", values())
    assert entry.load("x") is None
    assert "cannot be read" in caplog.text
    assert file.is_dir()
    assert unfinished(cache) == []


def test_a_folder_that_cannot_be_made_stops_no_run_and_the_users_own_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    entry = ActivationCache(1.0, tmp_path / "file" / "cache").entry(content_key({}), ABOUT)
    with suppress(KeyError), entry.locked():
        raise KeyError
    assert "without a lock" in caplog.text
    assert not entry.save("x", values())
    assert entry.load("x") is None
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file cannot be made: .*Set LUNAR_TUNE_CACHE"):
        ActivationCache()


SIZE = 40_000  # bytes of each tensor below; a description adds less than a thousand


def filled(cache: ActivationCache, name: str, *, age: float) -> CacheEntry:
    """Return an entry with one tensor, last used so many seconds ago."""
    entry = cache.entry(content_key({"name": name}), ABOUT | {"model": name})
    assert entry.save("x", values(shape=(SIZE // 4,)))
    then = time.time() - age
    os.utime(cache.root / entry.key, (then, then))
    return entry


def names_in(cache: ActivationCache) -> list[str]:
    return [entry.about["model"] for entry in cache.entries()]


def test_what_was_used_longest_ago_goes_first(cache: ActivationCache) -> None:
    few = ActivationCache(3.5 * SIZE / GIB, cache.root)
    oldest = filled(few, "oldest", age=300)
    filled(few, "middle", age=200)
    filled(few, "newest", age=100)
    # What can never fit, alone or beside what its entry holds, removes nothing.
    assert not few.entry(content_key({}), ABOUT).save("x", values(shape=(SIZE,)))
    assert not oldest.save("y", values(shape=(3 * SIZE // 4,)))
    assert names_in(few) == ["newest", "middle", "oldest"]
    oldest.load("x")
    assert names_in(few) == ["oldest", "newest", "middle"], "reading is use"
    written = filled(few, "written", age=400)
    assert names_in(few) == ["oldest", "newest", "written"]
    assert written.save("y", values(shape=(SIZE // 4,))), "never what is written to goes"
    assert sorted(names_in(few)) == ["oldest", "written"]


def test_the_disk_is_never_filled(cache: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")

    def disk(free: Callable[[], int]) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, free()))

    def held() -> int:
        return sum(entry.bytes for entry in cache.entries())

    for gib, limit in ((8, 2), (4000, 100)):  # a quarter, and no more than 100
        disk(lambda gib=gib: gib * GIB)
        assert ActivationCache(None, cache.root).limit_bytes == limit * GIB
    filled(cache, "old", age=200)
    filled(cache, "new", age=100)
    capacity = held() + cache_module._SPARE_BYTES + SIZE // 2
    disk(lambda: capacity - held())
    filled(cache, "more", age=0)
    assert sorted(names_in(cache)) == ["more", "new"]
    assert not cache.entry(content_key({}), ABOUT).save("x", values(shape=(SIZE,)))
    assert sorted(names_in(cache)) == ["more", "new"]


def test_emptying_removes_all_that_is_the_caches_and_nothing_else(cache: ActivationCache) -> None:
    """A user may point LUNAR_TUNE_CACHE at a folder in which something lies already."""
    root = cache.root
    assert (cache.empty(), cache.entries(), root.exists()) == (0, [], False)
    one, two = (filled(cache, name, age=0) for name in ("one", "two"))
    one.save("y", values())
    with cache.entry(content_key({"never": "saved"}), ABOUT).locked(), two.locked():
        (root / two.key / ".left.tmp").write_bytes(bytes(1000))
    (root / "mine").mkdir()
    for name in ("mine/x.safetensors", "mine.lock"):
        (root / name).touch()
    found = {info.key: info for info in cache.entries()}
    assert (found[one.key].about, found[one.key].files) == (ABOUT | {"model": "one"}, 2)
    for key, info in found.items():
        assert info.bytes == sum(path.stat().st_size for path in (root / key).iterdir())
    for key in ("", "..", "mine", "A" * 32, f"{'a' * 32}/../mine"):
        assert cache.remove(key) == 0
    assert cache.remove(one.key) == found[one.key].bytes
    assert cache.empty() == found[two.key].bytes > SIZE + 1000
    left = {"mine", "mine/x.safetensors", "mine.lock"}
    assert {str(path.relative_to(root)) for path in root.rglob("*")} == left


def test_only_the_owner_can_read_files(cache: ActivationCache, entry: CacheEntry) -> None:
    before = os.umask(0)
    try:
        with entry.locked():
            entry.save("x", values())
    finally:
        os.umask(before)
    paths = [cache.root, *cache.root.rglob("*")]
    assert len(paths) == 4
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def share(root: Path, ready: Path) -> bool:
    """Begin when both are ready; return whether it was this one that captured."""
    cache = ActivationCache(1.0, root)
    once, gone = (cache.entry(32 * letter, ABOUT) for letter in "ab")
    (ready / str(os.getpid())).touch()
    while len(list(ready.iterdir())) < 2:
        time.sleep(0.01)
    with once.locked():  # of two that want the same, one captures it
        captured = once.load("x") is None
        if captured:
            time.sleep(0.2)  # long enough for the other to come
            once.save("x", values())
        assert holds(once, values())
    for turn in range(40):  # without a lock: never half a file, and right or not there
        gone.save(f"point-{turn % 4}", values(turn % 4))
        read = gone.load(f"point-{turn % 4}")
        assert read is None or torch.equal(read, values(turn % 4))
        cache.remove(gone.key)
    return captured


@pytest.mark.slow
def test_two_processes_share_one_cache(cache: ActivationCache, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.mkdir()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.apply_async(share, (cache.root, ready))
        assert share(cache.root, ready) is not other.get(timeout=120)
    assert unfinished(cache) == []
    cache.empty()
    assert list(cache.root.iterdir()) == []
