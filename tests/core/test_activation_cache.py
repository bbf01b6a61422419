"""The cache of activations: what is read is what was written, whoever else writes or removes."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import logging
import os
import stat
import subprocess
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lunar_tune.engine import cache as cache_module
from lunar_tune.engine.cache import (
    ActivationCache,
    CacheEntry,
    content_key,
)
from lunar_tune.engine.prompt_activations import ActivationSource, PromptActivations
from lunar_tune.errors import InputError
from lunar_tune.models.device import GIB
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]
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


def file_of(root: Path, entry: CacheEntry, name: str = "x") -> Path:
    return root / entry.key / f"{name}.safetensors"


def fail(*_arguments: object) -> None:
    raise AssertionError("this was not to be called")


# One process


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0, 8), (7,), (5, 3), (2, 3, 4)])
def test_what_is_read_is_what_was_written(
    entry: CacheEntry, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    written = (values(shape=shape) * 3).to(dtype)
    assert entry.save("x", written)
    read = entry.load("x")
    assert read is not None
    assert read.dtype == dtype
    assert torch.equal(read, written)


def test_views_and_tensors_of_inference_are_written_as_what_they_show(entry: CacheEntry) -> None:
    with torch.inference_mode():
        inferred = values() * 2
    for name, written in (("view", values().T), ("part", values()[::3, 2:5]), ("made", inferred)):
        assert entry.save(name, written)
        read = entry.load(name)
        assert read is not None
        assert torch.equal(read, written)


def test_what_was_never_written_is_none_and_leaves_nothing(root: Path, entry: CacheEntry) -> None:
    assert entry.load("x") is None
    assert not root.exists()


def test_a_second_writing_replaces_the_first_for_those_who_read_later(entry: CacheEntry) -> None:
    entry.save("x", values(0))
    before = entry.load("x")
    entry.save("x", values(1))
    after = entry.load("x")
    assert before is not None
    assert after is not None
    assert torch.equal(before, values(0))
    assert torch.equal(after, values(1))


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


def test_a_change_to_what_was_read_reaches_no_other_reader(entry: CacheEntry) -> None:
    entry.save("x", values())
    first = entry.load("x")
    assert first is not None
    first.zero_()
    second = entry.load("x")
    assert second is not None
    assert torch.equal(second, values())


def test_what_is_mapped_stays_readable_when_it_is_removed(
    cache: ActivationCache, entry: CacheEntry
) -> None:
    written = values(shape=(3000, 100))
    entry.save("x", written)
    read = entry.load("x")
    assert cache.remove(entry.key) > written.nbytes
    assert read is not None
    assert torch.equal(read, written)
    assert entry.load("x") is None
    assert entry.save("x", written), "the folder is made again"


def test_a_digest_is_computed_once_for_each_file(
    cache: ActivationCache, entry: CacheEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x", "y"):
        entry.save(name, values())
    calls: list[Tensor] = []
    original = cache_module._digest

    def counted(tensor: Tensor) -> str:
        calls.append(tensor)
        return original(tensor)

    monkeypatch.setattr(cache_module, "_digest", counted)
    for _ in range(3):
        again = cache.entry(entry.key, ABOUT)
        assert again.load("x") is not None
    assert len(calls) == 1
    entry.load("y")
    assert len(calls) == 2
    entry.save("x", values(1))  # one for the header
    for _ in range(3):
        entry.load("x")
    assert len(calls) == 4, "another file in its place is checked"


# Damage


def shorten(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def blank(file: Path) -> None:
    """What a file can be after a power cut: its length, and zeros."""
    file.write_bytes(bytes(file.stat().st_size))


def other_content(file: Path) -> None:
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(3)}, file)


def no_digest(file: Path) -> None:
    from safetensors.torch import save_file

    save_file({"tensor": torch.zeros(3)}, file)


@pytest.mark.parametrize(
    "damage",
    [shorten, flip, blank, other_content, no_digest, lambda file: file.write_bytes(b"")],
    ids=["short", "flipped", "blank", "other", "undigested", "empty"],
)
def test_a_damaged_file_is_removed_with_a_warning_and_can_be_written_again(
    root: Path,
    entry: CacheEntry,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
) -> None:
    entry.save("x", values())
    assert entry.load("x") is not None, "and is marked as checked"
    file = file_of(root, entry)
    damage(file)
    os.utime(file, (0, 0))  # a clock's tick later, however fast this was
    with caplog.at_level(logging.WARNING):
        assert entry.load("x") is None
    assert "is damaged and is captured again" in caplog.text
    assert str(file) in caplog.text
    assert not file.exists()
    assert entry.save("x", values())
    read = entry.load("x")
    assert read is not None
    assert torch.equal(read, values())


def test_a_damaged_file_that_another_process_mended_meanwhile_stays(
    root: Path, entry: CacheEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry.save("x", values())
    flip(file_of(root, entry))
    original = cache_module._digest

    def mended_meanwhile(tensor: Tensor) -> str:
        found = original(tensor)
        monkeypatch.setattr(cache_module, "_digest", original)
        entry.save("x", values())
        return found

    monkeypatch.setattr(cache_module, "_digest", mended_meanwhile)
    assert entry.load("x") is None
    read = entry.load("x")
    assert read is not None
    assert torch.equal(read, values())


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


def test_a_file_that_is_removed_while_it_is_opened_is_not_there(
    root: Path,
    entry: CacheEntry,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Safetensors opens it, then torch does; torch's error for a missing file is its own."""
    entry.save("x", values())
    map_file = torch.UntypedStorage.from_file

    def removed_before(name: str, *arguments: Any, **options: Any) -> torch.UntypedStorage:
        Path(name).unlink()
        return map_file(name, *arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", removed_before)
    assert entry.load("x") is None
    assert caplog.text == ""
    assert not file_of(root, entry).exists()


def test_a_tensor_is_returned_whole_though_its_entry_is_removed_meanwhile(
    cache: ActivationCache, entry: CacheEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry.save("x", values())
    original = cache_module._digest

    def removed_meanwhile(tensor: Tensor) -> str:
        cache.remove(entry.key)
        return original(tensor)

    monkeypatch.setattr(cache_module, "_digest", removed_meanwhile)
    read = entry.load("x")
    assert read is not None
    assert torch.equal(read, values())
    assert cache.entries() == []


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


def test_a_full_disk_is_a_warning_and_leaves_nothing_unfinished(root: Path) -> None:
    """A process whose files may have 10,000 bytes: the writing itself fails, as on a full disk."""
    code = f"""
import resource, torch
from pathlib import Path
from lunar_tune.engine.cache import ActivationCache
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
entry = ActivationCache(1.0, Path({str(root)!r})).entry({content_key({})!r}, {{}})
print(entry.save("large", torch.zeros(10_000)), entry.save("small", torch.zeros(10)))
"""
    done = finish(start(code))
    assert done.stdout.split() == ["False", "True"]
    assert "cannot be kept on disk, the run goes on" in done.stderr
    assert unfinished(root) == []
    assert [file.name for file in root.rglob("*.safetensors")] == ["small.safetensors"]


def test_a_folder_that_cannot_be_made_stops_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    entry = ActivationCache(1.0, tmp_path / "file" / "cache").entry(content_key({}), ABOUT)
    entered = []
    with entry.locked():
        entered.append(True)
    assert entered
    assert "without a lock" in caplog.text
    assert not entry.save("x", values())
    assert entry.load("x") is None


def test_an_error_inside_the_lock_is_not_taken_for_one_of_the_lock(entry: CacheEntry) -> None:
    with pytest.raises(OSError, match="mine"), entry.locked():
        raise OSError("mine")
    with entry.locked():
        pass


def test_a_users_folder_that_cannot_be_made_is_refused_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file cannot be made: .*Set LUNAR_TUNE_CACHE"):
        ActivationCache()


def test_the_users_cache_is_moved_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path / "moved"))
    assert ActivationCache().root == tmp_path / "moved" / "activations"


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


def with_room_for(tensors: float, root: Path) -> ActivationCache:
    return ActivationCache(tensors * SIZE / GIB, root)


def test_what_was_used_longest_ago_goes_first(root: Path) -> None:
    cache = with_room_for(3.5, root)
    oldest = filled(cache, "oldest", age=300)
    filled(cache, "middle", age=200)
    filled(cache, "newest", age=100)
    assert names_in(cache) == ["newest", "middle", "oldest"]

    oldest.load("x")
    assert names_in(cache) == ["oldest", "newest", "middle"], "reading is use"
    filled(cache, "more", age=0)
    assert sorted(names_in(cache)) == ["more", "newest", "oldest"]


def test_the_entry_that_is_written_to_stays_though_it_is_the_oldest(root: Path) -> None:
    cache = with_room_for(3.5, root)
    written = filled(cache, "written", age=300)
    filled(cache, "middle", age=200)
    filled(cache, "newest", age=100)
    assert written.save("y", values(shape=(SIZE // 4,)))
    assert sorted(names_in(cache)) == ["newest", "written"]
    assert written.load("x") is not None


def test_what_can_never_fit_is_not_written_and_removes_nothing(root: Path) -> None:
    """Too large for an empty cache, or beside what its own entry holds."""
    cache = with_room_for(2.5, root)
    filled(cache, "other", age=100)
    large = cache.entry(content_key({"name": "large"}), ABOUT)
    assert not large.save("x", values(shape=(SIZE,)))
    assert names_in(cache) == ["other"]

    grown = filled(cache, "grown", age=0)
    assert not grown.save("y", values(shape=(SIZE // 2,)))
    assert sorted(names_in(cache)) == ["grown", "other"]
    assert sum(entry.bytes for entry in cache.entries()) <= cache.limit_bytes


def test_a_limit_of_zero_writes_nothing(root: Path) -> None:
    cache = ActivationCache(0.0, root)
    assert not cache.entry(content_key({}), ABOUT).save("x", values())
    assert cache.entries() == []
    assert list(root.iterdir()) == []


def disk(monkeypatch: pytest.MonkeyPatch, free: Callable[[], int]) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, free()))


def test_a_disk_with_little_left_is_not_filled(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old entries make room on the disk too; a rest is left for results."""
    spare = cache_module._SPARE_BYTES

    def held() -> int:
        return sum(entry.bytes for entry in cache.entries())

    filled(cache, "old", age=200)
    filled(cache, "new", age=100)
    capacity = held() + spare + SIZE // 2
    disk(monkeypatch, lambda: capacity - held())
    filled(cache, "more", age=0)
    assert sorted(names_in(cache)) == ["more", "new"]

    disk(monkeypatch, lambda: spare + SIZE // 2 - held())
    assert not cache.entry(content_key({"name": "none"}), ABOUT).save("x", values(shape=(SIZE,)))
    assert sorted(names_in(cache)) == ["more", "new"]


def test_the_limit_is_a_quarter_of_what_is_free_and_no_more_than_100_gib(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk(monkeypatch, lambda: 8 * GIB)
    assert ActivationCache(None, root).limit_bytes == 2 * GIB
    assert ActivationCache(0.5, root).limit_bytes == GIB // 2
    disk(monkeypatch, lambda: 4000 * GIB)
    assert ActivationCache(None, root).limit_bytes == 100 * GIB
    assert not root.exists(), "asking makes nothing"


# Listing and removing


def test_entries_say_what_they_hold(root: Path, cache: ActivationCache) -> None:
    assert cache.entries() == []
    entry = cache.entry(content_key({"about": "one"}), ABOUT)
    before = time.time()
    entry.save("x", values())
    entry.save("y", values())
    (root / "notes").mkdir()
    (root / "notes" / "x.safetensors").touch()

    [found] = cache.entries()
    folder = root / entry.key
    assert (found.key, found.about, found.files) == (entry.key, ABOUT, 2)
    assert found.bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert found.bytes > 2 * values().nbytes
    assert found.used.timestamp() == pytest.approx(before, abs=60)


def test_removing_one_leaves_the_others_and_no_trace_of_it(
    root: Path, cache: ActivationCache
) -> None:
    gone, stays = (filled(cache, name, age=0) for name in ("gone", "stays"))
    with gone.locked():
        pass
    [size] = [entry.bytes for entry in cache.entries() if entry.key == gone.key]
    assert cache.remove(gone.key) == size
    assert names_in(cache) == ["stays"]
    assert [path.name for path in root.iterdir()] == [stays.key]
    assert cache.remove(gone.key) == 0


def test_emptying_removes_all_that_is_the_caches_and_nothing_else(
    root: Path, cache: ActivationCache
) -> None:
    """A user may point LUNAR_TUNE_CACHE at a folder in which something lies already."""
    for name in ("one", "two"):
        filled(cache, name, age=0)
    with cache.entry(content_key({"never": "saved"}), ABOUT).locked():
        pass
    (root / content_key({"name": "one"}) / ".left.tmp").write_bytes(bytes(1000))
    (root / "activations.csv").touch()
    (root / "mine").mkdir()
    (root / "mine" / "about.json").write_text("{}", encoding="utf-8")
    (root / "mine.lock").touch()
    total = sum(entry.bytes for entry in cache.entries())

    assert cache.empty() == total > 2 * SIZE + 1000
    assert sorted(path.name for path in root.iterdir()) == ["activations.csv", "mine", "mine.lock"]
    assert (root / "mine" / "about.json").exists()
    assert cache.empty() == 0


def test_emptying_what_was_never_made_frees_nothing(root: Path, cache: ActivationCache) -> None:
    assert cache.empty() == 0
    assert not root.exists()


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


def test_keys_are_of_the_content_and_not_of_its_order() -> None:
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": "1"})


# Permissions


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    """Also under a folder that is there already and open to all."""
    with umask(mask):
        parent = tmp_path / "open"
        parent.mkdir()
        parent.chmod(0o755)
        root = parent / "activations"
        entry = ActivationCache(1.0, root).entry(content_key({}), ABOUT)
        with entry.locked():
            entry.save("x", values())
        entry.load("x")
    paths = [root, *root.rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert {path.name for path in paths if path.is_file()} == {
        *("about.json", "x.safetensors", f"{entry.key}.lock")
    }
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE(parent.stat().st_mode) == 0o755, "what was there is left as it was"


# Several processes


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        output, errors = process.communicate("go\n", timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def both(code: str) -> list[str]:
    """Run code in two processes that begin together; return what each printed after that."""
    ready = 'print("ready", flush=True)\nsys.stdin.readline()\n'
    imports = (
        "import sys, time, torch\nfrom pathlib import Path\n"
        "from lunar_tune.engine.cache import ActivationCache\ntorch.set_num_threads(1)\n"
    )
    processes = [start(imports + ready + code) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    done = [finish(process) for process in processes]
    assert [one.stderr for one in done] == ["", ""]
    return [one.stdout for one in done]


def test_another_process_reads_what_was_written(root: Path, entry: CacheEntry) -> None:
    entry.save("x", values())
    code = f"""
from pathlib import Path
from lunar_tune.engine.cache import ActivationCache
entry = ActivationCache(1.0, Path({str(root)!r})).entry({entry.key!r}, {{}})
print(entry.load("x").tolist())
"""
    assert torch.equal(torch.tensor(json.loads(finish(start(code)).stdout)), values())


def test_two_processes_that_write_at_once_both_read_what_they_wrote(
    root: Path, entry: CacheEntry
) -> None:
    """Without a lock, the same names over and over: a reader never meets half a file."""
    code = f"""
entry = ActivationCache(1.0, Path({str(root)!r})).entry({entry.key!r}, {ABOUT!r})
equal = 0
for turn in range(40):
    seed = turn % 4
    tensor = torch.randn(20_000, generator=torch.Generator().manual_seed(seed))
    assert entry.save(f"point-{{seed}}", tensor)
    read = entry.load(f"point-{{seed}}")
    equal += read is not None and torch.equal(read, tensor)
print(equal)
"""
    assert [printed.strip() for printed in both(code)] == ["40", "40"]
    for seed in range(4):
        read = entry.load(f"point-{seed}")
        assert read is not None
        assert torch.equal(read, values(seed, shape=(20_000,)))
    assert unfinished(root) == []
    assert sorted(path.name for path in (root / entry.key).iterdir()) == [
        *("about.json", *(f"point-{seed}.safetensors" for seed in range(4)))
    ]


def test_of_two_processes_that_want_the_same_one_captures_it(
    root: Path, tmp_path: Path, entry: CacheEntry
) -> None:
    log = tmp_path / "captures"
    code = f"""
entry = ActivationCache(1.0, Path({str(root)!r})).entry({entry.key!r}, {ABOUT!r})
with entry.locked():
    tensor = entry.load("x")
    if tensor is None:
        with open({str(log)!r}, "a") as file:
            file.write("captured\\n")
        tensor = torch.arange(1000)
        time.sleep(0.2)  # long enough for the other to come
        entry.save("x", tensor)
print(int(tensor.sum()))
"""
    assert [printed.strip() for printed in both(code)] == ["499500", "499500"]
    assert log.read_text() == "captured\n"


def test_emptying_while_others_write_and_read_breaks_nothing(
    root: Path, cache: ActivationCache, entry: CacheEntry
) -> None:
    """What is read is right or not there; what is left can be listed and removed."""
    code = f"""
import logging
logging.disable()  # a writing that is cut short warns
entry = ActivationCache(1.0, Path({str(root)!r})).entry({entry.key!r}, {ABOUT!r})
tensor = torch.arange(5000)
for _ in range(60):
    with entry.locked():
        entry.save("x", tensor)
    read = entry.load("x")
    assert read is None or torch.equal(read, tensor)
    ActivationCache(1.0, Path({str(root)!r})).empty()
print("well")
"""
    assert [printed.strip() for printed in both(code)] == ["well", "well"]
    cache.empty()
    assert cache.entries() == []
    assert list(root.iterdir()) == []


def test_importing_the_cache_loads_no_torch() -> None:
    code = "import sys, lunar_tune.engine.cache\nprint('torch' in sys.modules)"
    assert finish(start(code)).stdout.strip() == "False"


# Prompts' activations with a cache

PROMPTS = ((1, 17, 40, 11), (1, 17, 9), (1, 60, 61, 62, 63, 64), (5, 6))


@contextmanager
def forwards(loaded: LoadedModel) -> Iterator[Counter[int]]:
    """Inside, count how often each block is run."""
    counts: Counter[int] = Counter()

    def count(layer: int) -> Callable[..., None]:
        return lambda *_: counts.update([layer])

    with ExitStack() as stack:
        for layer, block in enumerate(loaded.layout.blocks_of(loaded.model)):
            stack.callback(block.register_forward_hook(count(layer)).remove)
        yield counts


@pytest.fixture
def model(loaded: Load, unchanged: Callable[[Any], None]) -> LoadedModel:
    one = loaded("qwen2")
    unchanged(one.model)
    return one


def expected_reads(model: LoadedModel, layer: int) -> tuple[Tensor, Tensor]:
    """Return what block `layer` works on, from an unbatched forward of each row, by node."""
    block: Any = model.layout.blocks_of(model.model)[layer]
    seen: list[Tensor] = []

    def note(_module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0][0])

    nodes: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for module in (block.post_attention_layernorm, block.mlp.down_proj):
            stack.callback(module.register_forward_pre_hook(note).remove)
        for prompt in PROMPTS:
            seen.clear()
            with torch.no_grad():
                model.model(input_ids=torch.tensor([prompt]), use_cache=False)
            for place in range(len(prompt)):
                nodes.setdefault(prompt[: place + 1], (seen[1][place], seen[0][place]))
    inputs, residual = zip(*nodes.values(), strict=True)
    return torch.stack(inputs), torch.stack(residual)


def assert_right(activations: PromptActivations, layer: int) -> None:
    inputs, residual = expected_reads(activations.source.loaded, layer)
    reads = activations.reads(layer)
    torch.testing.assert_close(reads.inputs, inputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reads.residual, residual, rtol=1e-4, atol=1e-4)


def test_a_second_run_reads_from_disk_without_a_sweep(model: LoadedModel, root: Path) -> None:
    """What remains is the one block that is asked for, run on its kept input."""
    first_source = ActivationSource(model, ActivationCache(1.0, root))
    first = PromptActivations(first_source, PROMPTS, layers=(1, 2))
    with forwards(model) as counts:
        last = first_source.last_tokens(PROMPTS)
        kept = {layer: first.reads(layer) for layer in (1, 2)}
    assert counts[0] == 2, "a sweep for the last tokens and one for both blocks' inputs"

    source = ActivationSource(model, ActivationCache(1.0, root))
    second = PromptActivations(source, PROMPTS, layers=(1, 2))
    with forwards(model) as counts:
        again = source.last_tokens(PROMPTS)
        assert counts == Counter()
        for layer in (2, 1):
            reads = second.reads(layer)
            assert torch.equal(reads.inputs, kept[layer].inputs)
            assert torch.equal(reads.residual, kept[layer].residual)
        assert counts == Counter({1: 1, 2: 1})
    assert torch.equal(again, last)
    assert_right(second, 1)


def test_what_was_kept_on_disk_equals_what_is_kept_in_memory(
    model: LoadedModel, root: Path
) -> None:
    memory = ActivationSource(model)
    disk = ActivationSource(model, ActivationCache(1.0, root))
    for _ in range(2):
        assert torch.equal(disk.last_tokens(PROMPTS), memory.last_tokens(PROMPTS))
    for layer in range(3):
        kept, captured = (
            PromptActivations(source, PROMPTS, layers=(0, 1, 2)).reads(layer)
            for source in (disk, memory)
        )
        assert torch.equal(kept.inputs, captured.inputs)
        assert torch.equal(kept.residual, captured.residual)


def test_a_layer_that_was_not_announced_is_captured_when_it_is_asked_for(
    model: LoadedModel, root: Path
) -> None:
    for cache in (None, ActivationCache(1.0, root)):
        activations = PromptActivations(ActivationSource(model, cache), PROMPTS, layers=(1,))
        for layer in (1, 2, 0):
            assert_right(activations, layer)
    names = sorted(file.stem for file in root.rglob("*.safetensors"))
    assert names == ["point-000", "point-001", "point-002"]


def test_with_a_limit_of_zero_layers_are_captured_on_demand_and_kept_in_memory(
    model: LoadedModel, root: Path
) -> None:
    source = ActivationSource(model, ActivationCache(0.0, root))
    activations = PromptActivations(source, PROMPTS, layers=(0, 1, 2))
    for layer in (1, 2, 1, 0):
        assert_right(activations, layer)
    assert source.last_tokens(PROMPTS).shape == (4, len(PROMPTS), 32)
    assert list(root.rglob("*.safetensors")) == []
    with forwards(model) as counts:
        activations.reads(1)
    assert counts == Counter()


def test_a_damaged_file_is_captured_again(model: LoadedModel, root: Path) -> None:
    def activations() -> PromptActivations:
        source = ActivationSource(model, ActivationCache(1.0, root))
        return PromptActivations(source, PROMPTS, layers=(1, 2))

    activations().reads(2)
    gc.collect()
    [file] = root.rglob("point-002.safetensors")
    shorten(file)
    assert_right(activations(), 2)
    with forwards(model) as counts:
        activations().reads(2)
    assert counts == Counter({2: 1})


def key_of(source: ActivationSource, kind: str = "streams", prompts: Any = PROMPTS) -> str:
    entry = source.entry(kind, prompts)
    assert entry is not None
    return entry.key


def test_what_activations_depend_on_gives_another_key_and_nothing_else_does(
    loaded: Load, model: LoadedModel, cache: ActivationCache
) -> None:
    def source(changed: LoadedModel) -> ActivationSource:
        return ActivationSource(changed, cache)

    half = dataclasses.replace(model, model=copy.deepcopy(model.model).bfloat16())
    one_weight = dataclasses.replace(model, model=copy.deepcopy(model.model))
    one_weight.model.model.layers[1].mlp.down_proj.weight.data[3, 5] += 1e-3
    keys = [
        key_of(source(model)),
        key_of(source(model), prompts=PROMPTS[:-1]),
        key_of(source(model), prompts=PROMPTS[::-1]),
        key_of(source(model), prompts=((1, 1, 7, 40, 11), *PROMPTS[1:])),
        key_of(source(model), kind="last tokens"),
        key_of(source(loaded("qwen2", seed=1))),
        key_of(source(loaded("llama"))),
        key_of(source(half)),
        key_of(source(one_weight)),
    ]
    assert len(set(keys)) == len(keys)

    same = dataclasses.replace(model, model=copy.deepcopy(model.model))
    assert key_of(source(same), prompts=[list(prompt) for prompt in PROMPTS]) == keys[0]


def test_an_entry_is_described_by_model_kind_dtype_and_rows(
    model: LoadedModel, cache: ActivationCache
) -> None:
    source = ActivationSource(model, cache)
    source.last_tokens(PROMPTS)
    [found] = cache.entries()
    assert found.about == {
        "kind": "last tokens",
        "model": "qwen2",
        "dtype": "float32",
        "rows": len(PROMPTS),
    }


def test_without_a_cache_nothing_is_fingerprinted(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunar_tune.engine.prompt_activations.fingerprint", fail)
    source = ActivationSource(model)
    source.last_tokens(PROMPTS)
    assert_right(PromptActivations(source, PROMPTS), 1)
