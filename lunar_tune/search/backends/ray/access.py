"""Who may use Ray: tokens of sessions that are started here, addresses of clusters that exist.

Checked with Ray 2.60: gcs, raylet and workers listen on every interface whatever they are told, so
that without a token anyone who reaches a port could run code. `ray.init` turns tokens on for a
cluster of its own and by default keeps one for ever in `~/.ray/auth_token`; `ray start --head`
turns them on where that file exists. An address other than `auto` is not shown any token by itself.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from lunar_tune.errors import InputError

__all__ = ["check_address", "own_session", "refusal", "users_token"]

AUTO = "auto"
MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
PROBE_SECONDS = 5.0
# Paths of sockets are limited to about a hundred characters, of which Ray's own part takes sixty.
_TEMP = Path("/tmp")  # noqa: S108  # Ray's own choice; what is made in it is for us alone
_PREFIX, _ALIVE = "lt-ray-", "alive"
_BEGINNING_SECONDS = 600.0
_RETRIES = "RAY_NUM_REDIS_GET_RETRIES"
_REFUSED = ("InvalidAuthToken", "AuthenticationError", "Unauthenticated")


@cache
def _session_token() -> str:
    """Return this process's token; Ray's loader reads it once and then keeps it."""
    return secrets.token_hex(32)


@contextmanager
def own_session() -> Iterator[Path]:
    """Give a folder for Ray's sockets and logs, with the token in the environment, for a while.

    The token is on no command line and in no file; other users can neither read the environment
    nor enter the folder, which is removed in the end. Ray opens its own folders to everybody, the
    one that it is given as well: what it is given lies in one that it does not know.

    What processes have left that were killed is removed first.
    """
    place = _TEMP if _TEMP.is_dir() else Path(tempfile.gettempdir())
    _remove_left(place)
    with (
        tempfile.TemporaryDirectory(
            prefix=_PREFIX, dir=place, ignore_cleanup_errors=True
        ) as private,
        FileLock(Path(private) / _ALIVE),  # the system takes it back from a process that dies
        # Without a mode Ray turns tokens on itself, also where it is imported already.
        _environment({MODE: None, TOKEN_FILE: None, TOKEN: _session_token()}),
    ):
        yield Path(private) / "r"


def _remove_left(place: Path) -> None:
    """Remove folders of sessions whose process is dead; one that has just begun is left alone."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError, Timeout):
            if time.time() - (folder / _ALIVE).stat().st_mtime > _BEGINNING_SECONDS:
                with FileLock(folder / _ALIVE, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def users_token(address: str) -> Iterator[None]:
    """Inside, the user's own token is shown to the cluster, if it is meant for it.

    That is one that the environment names, and the kept one for a cluster on this machine: a token
    for one cluster is not told to another.
    """
    named = bool(os.environ.get(TOKEN) or os.environ.get(TOKEN_FILE))
    kept = (Path.home() / ".ray" / "auth_token").is_file() and _is_here(address)
    mode = {MODE: "token"} if MODE not in os.environ and (named or kept) else {}
    retries = {
        _RETRIES: os.environ.get(_RETRIES, "3")
    }  # of one second; a refusal is not taken back
    with _environment(mode | retries):
        yield


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*changes, MODE)}
    _set(changes)
    try:
        yield
    finally:
        _set(before)  # Ray notes the mode there


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def check_address(address: str | None) -> None:
    """Check an address of a cluster, before anything expensive.

    Raises:
        InputError: It is none, or nobody listens there.
    """
    if address is None or address.startswith("ray://"):
        return  # a search refuses the latter itself
    found = _current_cluster() if address == AUTO else address
    if found is None:
        return  # Ray looks for processes, and says at once if there are none
    host, port = _parts(found)
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"--address {address}: nobody answers at {found} ({reason}). Start a cluster with "
            "`ray start --head`, correct the address, or leave the option out."
        ) from error


def refusal(address: str, error: BaseException) -> str:
    """Return why a cluster could not be joined and what to do."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    if any(word in text for word in _REFUSED for text in chain):
        return (
            f"--address {address}: the cluster wants a token and was shown none or another. Set "
            f"{MODE}=token, and {TOKEN} or {TOKEN_FILE} to what `ray get-auth-token` prints on its "
            "head."
        )
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"--address {address}: no Ray cluster answers there ({first}). Start one with "
        "`ray start --head`, correct the address, or leave the option out."
    )


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(
            f"--address {address}: auto (the cluster that this machine belongs to) or HOST:PORT."
        )
    return host.strip("[]"), int(port)


def _current_cluster() -> str | None:
    """Return what `auto` means: RAY_ADDRESS, or what the last `ray start` on this machine left."""
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    file = Path(os.environ.get("RAY_TMPDIR", _TEMP)) / "ray" / "ray_current_cluster"
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeError):
        return None


def _is_here(address: str) -> bool:
    """Say whether an address is one of this machine's."""
    if address == AUTO:
        return True
    try:
        host = socket.gethostbyname(_parts(address)[0])
        if ipaddress.ip_address(host).is_loopback:
            return True
        with socket.socket() as probe:
            probe.bind((host, 0))  # an address of another machine cannot be bound
    except (OSError, UnicodeError, ValueError):
        return False
    return True
