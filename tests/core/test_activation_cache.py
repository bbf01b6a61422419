"""The cache of activations: what is read is what was written, whoever else writes or removes."""

from __future__ import annotations

import logging
import os
import resource
import stat
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(root: Path) -> ActivationCache:
    return ActivationCache(1.0, root)


@pytest.fixture
def entry(cache: ActivationCache) -> CacheEntry:
    return cache.entry(content_key({"about": "one"}), ABOUT)


def values(seed: int = 0, *, shape: Sequence[int] = (50, 8)) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def unfinished(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.is_file()]


def holds(entry: CacheEntry, written: Tensor, name: str = "x") -> bool:
    read = entry.load(name)
    return read is not None and read.dtype == written.dtype and torch.equal(read, written)


def file_of(root: Path, entry: CacheEntry) -> Path:
    return root / entry.key / "x.safetensors"


def test_what_is_read_is_what_was_written(root: Path, entry: CacheEntry) -> None:
    assert entry.load("x") is None
    assert not root.exists(), "reading makes nothing"
    with torch.inference_mode():
        inferred = values() * 2
    for written in (values().T, values()[::3, 2:5], inferred):
        assert entry.save("x", written)
        assert holds(entry, written)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool):
        for shape in ((), (0, 8), (7,), (2, 3, 4)):
            written = (values(shape=shape) * 3).to(dtype)
            assert entry.save("x", written)
            assert holds(entry, written)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the maps of Linux are read")
def test_reading_maps_the_file_and_copies_nothing(root: Path, entry: CacheEntry) -> None:
    """The tensor's bytes lie inside the stretch of addresses that is the file."""
    entry.save("x", values(shape=(1000, 100)))
    read = entry.load("x")
    assert read is not None
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = [line.split()[0] for line in lines if str(file_of(root, entry)) in line]
    ranges = [[int(end, 16) for end in stretch.split("-")] for stretch in mapped]
    start = read.data_ptr()
    assert any(low <= start and start + read.nbytes <= high for low, high in ranges)


def test_what_was_read_stays_as_it_was_and_its_own(
    cache: ActivationCache, entry: CacheEntry
) -> None:
    """Whether others write to it, write the file again, or remove it."""
    written = values(shape=(3000, 100))
    entry.save("x", written)
    read, changed = entry.load("x"), entry.load("x")
    assert read is not None
    assert changed is not None
    changed.zero_()
    assert torch.equal(read, written)
    assert holds(entry, written)
    entry.save("x", values(1))
    assert torch.equal(read, written)
    assert holds(entry, values(1))
    entry.save("x", written)
    assert cache.remove(entry.key) > written.nbytes
    assert torch.equal(read, written)
    assert entry.load("x") is None
    assert entry.save("x", written), "the folder is made again"


def test_a_digest_is_computed_once_for_each_file(
    cache: ActivationCache, entry: CacheEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x", "y"):
        entry.save(name, values())
    calls: list[Tensor] = []
    digest = cache_module._digest
    monkeypatch.setattr(cache_module, "_digest", lambda t: (calls.append(t), digest(t))[1])
    for _ in range(3):
        assert cache.entry(entry.key, ABOUT).load("x") is not None
    assert len(calls) == 1
    entry.load("y")
    assert len(calls) == 2
    entry.save("x", values(1))  # one for the header
    for _ in range(3):
        entry.load("x")
    assert len(calls) == 4, "another file in its place is checked"


# Damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "short": lambda file: os.truncate(file, file.stat().st_size // 2),
    "flipped": flip,
    "blank": lambda file: file.write_bytes(bytes(file.stat().st_size)),  # as after a power cut
    "empty": lambda file: file.write_bytes(b""),
    "other": lambda file: save_file({"other": torch.zeros(3)}, file),
    "undigested": lambda file: save_file({"tensor": torch.zeros(3)}, file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_removed_with_a_warning_and_can_be_written_again(
    root: Path, entry: CacheEntry, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    entry.save("x", values())
    assert holds(entry, values()), "and is marked as checked"
    file = file_of(root, entry)
    DAMAGES[damage](file)
    os.utime(file, (0, 0))  # a clock's tick later, however fast this was
    with caplog.at_level(logging.WARNING):
        assert entry.load("x") is None
    assert f"{file} is damaged and is captured again" in caplog.text
    assert not file.exists()
    assert entry.save("x", values())
    assert holds(entry, values())


def test_what_happens_to_a_file_while_it_is_read_loses_nothing(
    cache: ActivationCache,
    root: Path,
    entry: CacheEntry,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest, map_file = cache_module._digest, torch.UntypedStorage.from_file

    def meanwhile(happens: Callable[[], object]) -> None:
        def once(tensor: Tensor) -> str:
            found = digest(tensor)
            monkeypatch.setattr(cache_module, "_digest", digest)
            happens()
            return found

        monkeypatch.setattr(cache_module, "_digest", once)

    entry.save("x", values())
    meanwhile(lambda: cache.remove(entry.key))
    assert holds(entry, values()), "what is removed is still whole"
    assert cache.entries() == []

    entry.save("x", values())
    flip(file_of(root, entry))
    meanwhile(lambda: entry.save("x", values()))
    assert entry.load("x") is None
    assert holds(entry, values()), "what another process has mended stays"

    def removed_before(name: str, *arguments: Any, **options: Any) -> torch.UntypedStorage:
        Path(name).unlink()
        return map_file(name, *arguments, **options)

    # Safetensors opens a file, then torch does, whose error for a missing file is its own.
    monkeypatch.setattr(torch.UntypedStorage, "from_file", removed_before)
    caplog.clear()
    assert entry.load("x") is None
    assert caplog.text == ""


def test_what_cannot_be_read_is_not_taken_for_damaged(
    root: Path, entry: CacheEntry, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder in the file's place: the system's refusal says nothing about content."""
    file_of(root, entry).mkdir(parents=True)
    assert entry.load("x") is None
    assert "cannot be read" in caplog.text
    assert file_of(root, entry).is_dir()
    assert not entry.save("x", values())
    assert "cannot be kept on disk, the run goes on" in caplog.text
    assert unfinished(root) == []


def test_an_entry_without_its_description_is_still_listed_and_removed(
    root: Path, cache: ActivationCache, entry: CacheEntry
) -> None:
    """Else it would take room for ever."""
    for text in ("", "{", "[1]"):
        entry.save("x", values())
        (root / entry.key / "about.json").write_text(text, encoding="utf-8")
        [found] = cache.entries()
        assert (found.about, found.files) == ({}, 1)
    entry.save("y", values())
    assert cache.entries()[0].about == ABOUT, "the next writing mends it"
    assert cache.remove(entry.key) > 0
    assert cache.entries() == []


# A disk that does not take it


def test_a_full_disk_is_a_warning_and_leaves_nothing_unfinished(
    root: Path, entry: CacheEntry, caplog: pytest.LogCaptureFixture
) -> None:
    """Files may have 10,000 bytes for a while: the writing itself fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        saved = entry.save("large", torch.zeros(10_000)), entry.save("small", torch.zeros(10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved == (False, True)
    assert "cannot be kept on disk, the run goes on" in caplog.text
    assert unfinished(root) == []
    assert [file.name for file in root.rglob("*.safetensors")] == ["small.safetensors"]


def test_a_folder_that_cannot_be_made_stops_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own folder is refused with advice."""
    (tmp_path / "file").touch()
    entry = ActivationCache(1.0, tmp_path / "file" / "cache").entry(content_key({}), ABOUT)
    with entry.locked():
        assert "without a lock" in caplog.text
    assert not entry.save("x", values())
    assert entry.load("x") is None
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file cannot be made: .*Set LUNAR_TUNE_CACHE"):
        ActivationCache()
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / "moved"))
    assert ActivationCache().root == tmp_path / "moved" / "activations"


def test_an_error_inside_the_lock_is_not_taken_for_one_of_the_lock(entry: CacheEntry) -> None:
    with pytest.raises(OSError, match="mine"), entry.locked():
        raise OSError("mine")
    with entry.locked():
        pass


# The limit


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


@pytest.fixture
def three(root: Path) -> tuple[ActivationCache, CacheEntry]:
    """Return a cache with room for three and a half tensors, in which are three; and the oldest."""
    cache = ActivationCache(3.5 * SIZE / GIB, root)
    oldest = filled(cache, "oldest", age=300)
    filled(cache, "middle", age=200)
    filled(cache, "newest", age=100)
    assert names_in(cache) == ["newest", "middle", "oldest"]
    return cache, oldest


def test_what_was_used_longest_ago_goes_first(three: tuple[ActivationCache, CacheEntry]) -> None:
    cache, oldest = three
    oldest.load("x")
    assert names_in(cache) == ["oldest", "newest", "middle"], "reading is use"
    filled(cache, "more", age=0)
    assert sorted(names_in(cache)) == ["more", "newest", "oldest"]


def test_the_entry_that_is_written_to_stays_though_it_is_the_oldest(
    three: tuple[ActivationCache, CacheEntry],
) -> None:
    cache, written = three
    assert written.save("y", values(shape=(SIZE // 4,)))
    assert sorted(names_in(cache)) == ["newest", "oldest"]
    assert written.load("x") is not None


def test_what_can_never_fit_is_not_written_and_removes_nothing(
    three: tuple[ActivationCache, CacheEntry],
) -> None:
    """Too large for an empty cache, beside what its own entry holds, or where nothing may be."""
    cache, grown = three
    assert not cache.entry(content_key({}), ABOUT).save("x", values(shape=(SIZE,)))
    assert not grown.save("y", values(shape=(3 * SIZE // 4,)))
    nothing = ActivationCache(0.0, cache.root)
    assert not nothing.entry(content_key({}), ABOUT).save("x", values())
    assert names_in(cache) == ["newest", "middle", "oldest"]


def test_a_disk_with_little_left_is_not_filled(
    cache: ActivationCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old entries make room on the disk too; a rest is left for results."""
    usage = namedtuple("usage", "total used free")

    def disk(free: Callable[[], int]) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, free()))

    def held() -> int:
        return sum(entry.bytes for entry in cache.entries())

    for gib, limit in ((8, 2), (4000, 100)):  # a quarter, and no more than 100
        disk(lambda gib=gib: gib * GIB)
        assert ActivationCache(None, root).limit_bytes == limit * GIB
        assert ActivationCache(0.5, root).limit_bytes == GIB // 2
    assert not root.exists(), "asking makes nothing"
    filled(cache, "old", age=200)
    filled(cache, "new", age=100)
    capacity = held() + cache_module._SPARE_BYTES + SIZE // 2
    disk(lambda: capacity - held())
    filled(cache, "more", age=0)
    assert sorted(names_in(cache)) == ["more", "new"]
    disk(lambda: cache_module._SPARE_BYTES + SIZE // 2 - held())
    assert not cache.entry(content_key({"name": "none"}), ABOUT).save("x", values(shape=(SIZE,)))
    assert sorted(names_in(cache)) == ["more", "new"]


# Listing and removing


def test_emptying_removes_all_that_is_the_caches_and_nothing_else(
    root: Path, cache: ActivationCache
) -> None:
    """A user may point LUNAR_TUNE_CACHE at a folder in which something lies already."""
    assert (cache.empty(), cache.entries(), root.exists()) == (0, [], False)
    one, two = (filled(cache, name, age=0) for name in ("one", "two"))
    one.save("y", values())
    with cache.entry(content_key({"never": "saved"}), ABOUT).locked(), two.locked():
        pass
    (root / two.key / ".left.tmp").write_bytes(bytes(1000))
    (root / "activations.csv").touch()
    (root / "mine").mkdir()
    (root / "mine" / "about.json").write_text("{}", encoding="utf-8")
    (root / "mine.lock").touch()
    found = {info.key: info for info in cache.entries()}
    assert set(found) == {one.key, two.key}
    assert (found[one.key].about, found[one.key].files) == (ABOUT | {"model": "one"}, 2)
    for key, info in found.items():
        assert info.bytes == sum(file.stat().st_size for file in (root / key).iterdir())
        assert info.used.timestamp() == pytest.approx(time.time(), abs=60)
    assert cache.remove(one.key) == found[one.key].bytes
    assert (names_in(cache), cache.remove(one.key)) == (["two"], 0)
    assert cache.empty() == found[two.key].bytes > SIZE + 1000
    assert sorted(path.name for path in root.iterdir()) == ["activations.csv", "mine", "mine.lock"]
    assert (root / "mine" / "about.json").exists()


def test_unfinished_files_of_the_dead_are_removed_and_those_of_the_living_are_not(
    root: Path, entry: CacheEntry
) -> None:
    entry.save("x", values())
    dead, theirs, living = (root / entry.key / name for name in (".a.tmp", ".tmpAb12", ".c.tmp"))
    for file in (dead, theirs, living):
        file.touch()
    long_ago = time.time() - 3 * 24 * 3600
    for file in (dead, theirs):
        os.utime(file, (long_ago, long_ago))
    entry.save("y", values())
    assert unfinished(root) == [living]


@pytest.mark.parametrize("key", ["", ".", "..", "../x", "/x", "a" * 31, "A" * 32, f"{'a' * 32}/.."])
def test_no_key_leaves_the_folder(root: Path, cache: ActivationCache, key: str) -> None:
    (root / "x").mkdir(parents=True)
    (root.parent / "x").mkdir()
    assert cache.remove(key) == 0
    assert (root / "x").is_dir()
    assert (root.parent / "x").is_dir()


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_only_the_owner_can_read_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    """Also under a folder that is there already and open to all."""
    parent = tmp_path / "open"
    parent.mkdir()
    parent.chmod(0o755)
    root = parent / "activations"
    before = os.umask(mask)
    try:
        entry = ActivationCache(1.0, root).entry(content_key({}), ABOUT)
        with entry.locked():
            entry.save("x", values())
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}
    assert {path.name for path in modes if path.is_file()} == {
        *("about.json", "x.safetensors", f"{entry.key}.lock")
    }
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE(parent.stat().st_mode) == 0o755, "what was there is left as it was"


# Two processes

WORK = """
import logging, sys, time, torch
from pathlib import Path
from lunar_tune.engine.cache import ActivationCache

logging.disable()  # a writing that is cut short warns
torch.set_num_threads(1)
cache = ActivationCache(1.0, Path(sys.argv[1]))
once, busy, gone = (cache.entry(32 * letter, {"model": letter}) for letter in "abc")
print("ready", flush=True)
sys.stdin.readline()
with once.locked():  # of two that want the same, one captures it
    tensor = once.load("x")
    if tensor is None:
        print("captured")
        time.sleep(0.2)  # long enough for the other to come
        tensor = torch.arange(1000)
        once.save("x", tensor)
    assert int(tensor.sum()) == 499500
for turn in range(40):  # without a lock, the same names over and over: never half a file
    tensor = torch.full((20_000,), turn % 4)
    assert busy.save(f"point-{turn % 4}", tensor)
    assert torch.equal(busy.load(f"point-{turn % 4}"), tensor)
for _ in range(40):  # what is read while others empty the cache is right or not there
    with gone.locked():
        gone.save("x", tensor)
    read = gone.load("x")
    assert read is None or torch.equal(read, tensor)
    cache.remove(gone.key)
print("well")
"""


@pytest.mark.slow
def test_two_processes_write_read_and_remove_at_once(root: Path, cache: ActivationCache) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(root)],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(printed) == [["captured", "well"], ["well"]]
    for turn in range(4):
        assert holds(cache.entry(32 * "b", {}), torch.full((20_000,), turn), f"point-{turn}")
    assert unfinished(root) == []
    cache.empty()
    assert list(root.iterdir()) == []
