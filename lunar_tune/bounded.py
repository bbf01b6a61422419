"""Calls of what a stranger wrote, in a child process that may take so much time and memory."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

import psutil

MEMORY: Final = 2**30  # bytes beyond those of this process, unless a call says another number
_PATIENCE: Final = 20
"""Seconds by the clock for each of a core: where a machine is busy, or a fork waits for a lock that
another thread held."""


class OutOfBoundsError(RuntimeError):
    """A call took more time or memory than it may."""


def bounded(call: Callable[[], Any], *, seconds: int, memory: int = MEMORY) -> Any:
    """Return what a call gives, plain values for JSON, or raise a RuntimeError with its reason.

    The child is a fork, so the call sees all that is loaded; it must not use a device or threads.
    It may take `seconds` of one core, twenty times that by the clock, and bytes of `memory`. The
    call runs in this process, without limits, on other systems than Linux and where a child may not
    be made: in a worker of a pool, or where the system has no memory for one.
    """
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return _here(call)
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(call, seconds, memory, sending), daemon=True)
    with warnings.catch_warnings(), receiving:
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: there may be threads
        try:
            child.start()
        except OSError:
            return _here(call)
        finally:
            sending.close()
        content, asleep = b"", False
        try:
            asleep = not receiving.poll(_PATIENCE * seconds)
            content = b"" if asleep else receiving.recv_bytes()
        except EOFError:
            pass
        finally:
            child.kill()  # it has sent all that it had, or we were interrupted
            child.join()
    if not content:
        if child.exitcode not in (0, -signal.SIGXCPU, -signal.SIGKILL):
            raise RuntimeError(f"it ended its process (exit code {child.exitcode})")
        slow = asleep or child.exitcode == -signal.SIGXCPU
        what = f"{seconds} s" if slow else f"{memory >> 20} MiB of memory"
        raise OutOfBoundsError(f"it takes more than {what}")
    error, value = json.loads(content)
    if error:
        raise RuntimeError(error)
    return value


def _here(call: Callable[[], Any]) -> Any:
    """Return what a call gives in this process, or raise a RuntimeError with its reason."""
    try:
        return call()
    except Exception as error:
        raise RuntimeError(str(error) or type(error).__name__) from error


def _run(call: Callable[[], Any], seconds: int, memory: int, sending: Connection) -> None:
    """Send, from the child, the call's error, empty if there is none, and its value."""
    import resource

    gc.disable()  # a tensor of the parent's that dies here would call a device that is not there
    bounds = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: psutil.Process().memory_info().vms + memory,
        resource.RLIMIT_CORE: 0,
    }
    try:
        for kind, most in bounds.items():
            hard = resource.getrlimit(kind)[1]
            soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (soft, hard))
        try:
            said = "", call()
        except MemoryError:
            return
        except BaseException as error:
            said = str(error) or type(error).__name__, None
        sending.send_bytes(json.dumps(said).encode())
    finally:
        os._exit(0)  # nothing is written or put away twice
