"""Where files are, whether they can be written, and writing them so that nobody sees half."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import platformdirs
from filelock import FileLock, Timeout

from lunar_tune.errors import InputError

CACHE_VARIABLE = "LUNAR_TUNE_CACHE"
DATA_VARIABLE = "LUNAR_TUNE_DATA"
LONGEST_PART = 255  # of the usual file systems
MAX_SETTINGS: Final = 1_000_000  # bytes; YAML of that size takes its parser a minute
# Paths of sockets are limited to about a hundred characters, of which Ray's own part takes sixty.
_TEMP = Path("/tmp")  # noqa: S108  # Ray's own choice; what is made in it is for us alone
_PREFIX, _ALIVE = "lt-ray-", "alive"
_BEGINNING_SECONDS = 60.0


def shipped_folder(name: str) -> Path:
    """Return a shipped folder: inside an installed wheel, else beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    bundled = package / "_bundled" / name
    return bundled if bundled.is_dir() else package.parent / name


def shipped_spaces() -> tuple[str, ...]:
    """Return the names of the shipped search spaces."""
    return tuple(sorted(path.stem for path in shipped_folder("search_spaces").glob("*.yaml")))


def cache_dir() -> Path:
    """Return the user's cache folder (`LUNAR_TUNE_CACHE`), or raise an InputError.

    One that is made here is private, as are its folders of models and activations; one that was
    there keeps its rights. What others can write is refused: they could put weights into it.
    """
    own = platformdirs.user_cache_path("lunar-tune")
    folder = Path(os.environ.get(CACHE_VARIABLE) or own).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(
            f"The cache folder {folder} cannot be made: {error.strerror}. Set {CACHE_VARIABLE} to "
            "a folder that you can write."
        ) from error
    status = folder.stat()
    user = os.geteuid() if hasattr(os, "geteuid") else status.st_uid
    if (problem := mistrusted(status.st_uid, status.st_mode, user)) is not None:
        raise InputError(
            f"The cache folder {folder} {problem}, who could replace the models and activations in "
            f"it. Set {CACHE_VARIABLE} to a folder of your own, or take the right away (chmod o-w)."
        )
    return folder


def mistrusted(owner: int, mode: int, user: int) -> str | None:
    """Say why a folder of an owner and a mode may hold another user's files; None if it may not."""
    if user != 0 and owner not in {user, 0}:  # root is trusted, and reads what it is told to
        return "belongs to another user"
    # What its group may do is a choice that somebody made.
    return "can be written by every user" if mode & stat.S_IWOTH else None


def data_dir() -> Path:
    """Return the user's folder of fetched data (`LUNAR_TUNE_DATA`), which need not exist."""
    own = platformdirs.user_data_path("lunar-tune")
    return Path(os.environ.get(DATA_VARIABLE) or own).expanduser()


def is_file(path: Path) -> bool:
    """Say whether there is a file; a path that no system takes, too long say, is none."""
    return os.path.isfile(path)  # noqa: PTH113  # pathlib raises for these


def is_folder(path: Path) -> bool:
    """Say whether there is a folder; a path that no system takes, too long say, is none."""
    return os.path.isdir(path)  # noqa: PTH112  # pathlib raises for these


def check_writable(folder: Path, option: str) -> None:
    """Check that a folder can be made or written into, making nothing, or raise an InputError."""
    existing = folder.resolve()
    if any(len(os.fsencode(part)) > LONGEST_PART for part in existing.parts):
        raise InputError(f"{option}: a name in it is longer than {LONGEST_PART} bytes.")
    while not (is_folder(existing) or is_file(existing)) and existing != existing.parent:
        existing = existing.parent
    if not is_folder(existing):
        raise InputError(f"{option}: {existing} is a file, not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{option}: {existing} cannot be written.")


def check_writable_file(file: Path, option: str) -> None:
    """Check that a file can be written, without making it, or raise an InputError."""
    if file.is_dir():
        raise InputError(f"{option} {file}: is a folder, not a file.")
    check_writable(file.parent, f"{option} {file}")


def is_plain(name: str) -> bool:
    """Say whether a name is one plain part of a path."""
    return Path(name).name == name and name not in {"", ".", ".."}


def safe_name(text: str) -> str:
    """Return text as one file-name component that cannot leave its folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")
    return name or "unnamed"


def read_beginning(path: Path, most: int) -> bytes:
    """Return at most so many bytes of a file, or raise an OSError.

    Devices and pipes, which may have no end, are refused, but for those of the shell's `<(…)`.
    """
    mode = path.stat().st_mode
    is_substituted = stat.S_ISFIFO(mode) and path.is_relative_to("/dev/fd")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or is_substituted):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")
    with path.open("rb") as file:
        return file.read(most)


def read_settings(path: Path) -> bytes:
    """Return a file that people write or a library keeps settings in, or raise an OSError."""
    content = read_beginning(path, MAX_SETTINGS + 1)
    if len(content) > MAX_SETTINGS:
        raise OSError(errno.EFBIG, f"it is larger than the {MAX_SETTINGS:,} bytes that are read")
    return content


def decoded(
    content: bytes, source: object, *, error_class: type[InputError] = InputError
) -> tuple[str, str]:
    r"""Return the text of a file, its lines' ends as \n, and its encoding, or raise `error_class`.

    That is UTF-8, or what a byte order mark or the zeros of UTF-16 and UTF-32 say; no other can be
    told for certain.
    """
    encoding = json.detect_encoding(content)
    name = encoding.removesuffix("-sig").upper()
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        byte, advice = content[error.start : error.start + 1], "it may be cut off"
        if name == "UTF-8":
            letter = byte.decode("cp1252", "replace")
            advice = f"if {letter} is meant, iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW turns it"
        place = f"byte 0x{byte.hex()} at offset {error.start}"
        raise error_class(f"{source}: is not {name}: {place}; {advice}") from error
    # Files that were joined have a mark within.
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n\ufeff", "\n"), name


@contextmanager
def replacing(path: Path, *, cached: bool = False) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` if nothing is raised.

    A cached file is its owner's alone from its first byte, its folder is there, and a crash of the
    system may lose what it holds.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    if cached:
        temporary.touch(0o600, exist_ok=False)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if cached:  # whose content is checked when it is read, so nobody has to wait for the disk
            temporary.chmod(0o600)  # a library may have put its own file in the place
        else:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file of which nobody sees half, not even after a crash."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, document: Any) -> None:
    """Write plain values as indented JSON, with `write_atomically`."""
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="surrogatepass"))


@contextmanager
def private_folder() -> Iterator[Path]:
    """Give a folder of this process alone, for a while; those of killed processes are removed.

    A process holds a lock in its folder, which the system takes back from one that dies. Other
    users' folders are not looked into: what they call a lock may be a link to a file of this user.
    """
    place = _TEMP if _TEMP.is_dir() else Path(tempfile.gettempdir())
    for left in place.glob(f"{_PREFIX}*"):
        with suppress(OSError, Timeout):
            status, lock = left.lstat(), left / _ALIVE
            is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            # one that has just begun may not hold its lock yet
            if is_ours and time.time() - lock.stat().st_mtime > _BEGINNING_SECONDS:
                with FileLock(lock, timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(
            prefix=_PREFIX, dir=place, ignore_cleanup_errors=True
        ) as private,
        FileLock(Path(private) / _ALIVE),
    ):
        yield Path(private)
