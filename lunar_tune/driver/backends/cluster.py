"""Where trials run; Ray's sessions: who may use them, what there is, what a trial uses.

Why there are tokens, and what Ray 2.60 does with and without, is in docs/SECURITY.md.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lunar_tune.config.options import SearchConfig
from lunar_tune.driver.backends import Backend, Resources, run_in_process
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.files import private_folder
from lunar_tune.signals import heed_again
from lunar_tune.study.folder import Folder

# The dashboard, usage statistics and Tune's own tables, loggers and signal handler are noise here;
# Tune's snapshots of its state are never restored (the study is the state).
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
}
# A trial on a CPU gains little from more cores than this with small models, and a large one is no
# CPU matter.
CPUS_PER_TRIAL = 4
AUTO = "auto"
MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
PROBE_SECONDS = 5.0
# One for the whole process: Ray reads a token once and then keeps it.
_SESSION_TOKEN = secrets.token_hex(32)
_RETRIES = "RAY_NUM_REDIS_GET_RETRIES"
_ADVICE = "Start a cluster with `ray start --head`, correct the address, or leave the option out."
_NOT_STARTED = "Nothing was run. Start again when the machine has less to do, or with --in-process."
_REFUSED = ("InvalidAuthToken", "AuthenticationError", "Unauthenticated")


@contextmanager
def opened_backend(config: SearchConfig, folder: Folder) -> Iterator[tuple[Backend, Resources]]:
    """Give who runs the tasks of a search, and what each of them uses, or raise an InputError."""
    if config.in_process:
        import torch

        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        cpus = float(os.cpu_count() or 1)
        yield run_in_process, Resources(cpus=cpus, gpus=float(on_gpu), concurrency=1)
        return
    with ray_session(config):
        from lunar_tune.driver.backends.on_ray import run_on_ray  # Ray reads its environment then

        resources, timeout = allocate_resources(config), config.trial_timeout
        run = functools.partial(run_on_ray, resources=resources, folder=folder, timeout=timeout)
        yield run, resources


@contextmanager
def ray_session(config: SearchConfig) -> Iterator[None]:
    """Inside, Ray is started or joined unless a session around has done so; or an InputError."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    imported = sys.modules.get("ray")
    if imported is not None and imported.is_initialized():
        yield
        return
    address = config.address
    with own_session() if address is None else users_token(address) as folder:
        import ray  # it reads its environment when it is imported

        # A crash is told once, as the trial's reason of failure, and not as Tune's traceback.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address is None:
            # Else Ray would join the cluster of RAY_ADDRESS or of the last `ray start`.
            options |= {"address": "local", "include_dashboard": False, "_temp_dir": str(folder)}
        else:
            options["address"] = address
        ours = signal.getsignal(signal.SIGTERM)
        try:
            try:
                ray.init(**options)
            except SystemExit as error:  # of the handler that it puts in the place of ours
                raise KeyboardInterrupt from error
            except Exception as error:  # of many kinds, a plain one among them
                if address is not None:
                    raise InputError(refusal(address, error)) from error
                raise LunarTuneError(f"Ray does not start ({error}). {_NOT_STARTED}") from error
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, ours or signal.SIG_DFL)
            yield
        finally:
            ray.shutdown()
            heed_again()


@contextmanager
def own_session() -> Iterator[Path]:
    """Give a folder for Ray's sockets and logs, with the token in the environment, for a while.

    Ray opens its own folders to everybody, the one that it is given as well: what it is given lies
    in one that it does not know.
    """
    with (
        private_folder() as private,
        # Without a mode Ray turns tokens on itself, also where it is imported already.
        _environment({MODE: None, TOKEN_FILE: None, TOKEN: _SESSION_TOKEN}),
    ):
        yield private / "r"


@contextmanager
def users_token(address: str) -> Iterator[None]:
    """Inside, a cluster is shown the token that the environment names; one here, the kept one."""
    named = bool(os.environ.get(TOKEN) or os.environ.get(TOKEN_FILE))
    kept = (Path.home() / ".ray" / "auth_token").is_file() and _is_here(address)
    changes = {_RETRIES: os.environ.get(_RETRIES, "3")}  # of one second; a refusal is final
    if MODE not in os.environ and (named or kept):
        changes[MODE] = "token"
    with _environment(changes):
        yield


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*changes, MODE)}  # Ray notes the mode there
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def check_address(address: str | None) -> None:
    """Check an address of a cluster, before anything expensive, or raise an InputError."""
    if address in {None, AUTO} or address.startswith("ray://"):
        return  # Ray says at once that it finds no cluster; a search refuses Ray Client itself
    host, port = _parts(address)
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"--address {address}: nothing answers there ({reason}). {_ADVICE}"
        ) from error


def refusal(address: str, error: BaseException) -> str:
    """Return why a cluster could not be joined and what to do."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    cause: BaseException | None = error
    while cause is not None:
        if any(word in f"{type(cause).__name__}: {cause}" for word in _REFUSED):
            return (
                f"--address {address}: the cluster needs a token and got none or a wrong one. "
                f"Set {MODE}=token, and {TOKEN} or {TOKEN_FILE} to what `ray get-auth-token` "
                "prints on the cluster's head."
            )
        cause = cause.__cause__
    return f"--address {address}: no Ray cluster answers there ({first}). {_ADVICE}"


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(
            f"--address {address}: must be HOST:PORT or auto (the cluster that this machine is in)."
        )
    return host.strip("[]"), int(port)


def _is_here(address: str) -> bool:
    """Say whether an address is one of this machine's: no other can be bound."""
    if address == AUTO:
        return True
    try:
        with socket.socket() as probe:
            probe.bind((socket.gethostbyname(_parts(address)[0]), 0))
    except (OSError, UnicodeError):
        return False
    return True


def check_gpus(config: SearchConfig) -> None:
    """Check a demand for GPUs against this machine, before Ray starts, or raise an InputError."""
    wanted = config.gpus_per_trial
    if config.address is not None or not wanted:
        return
    import torch

    available = torch.cuda.device_count()
    if wanted > available:
        raise InputError(
            f"--gpus-per-trial {wanted:g}: this machine has {available} CUDA "
            "devices that torch can see. Leave the option out to use what there is, or name a "
            "cluster with --address."
        )


def allocate_resources(config: SearchConfig) -> Resources:
    """Decide what a trial uses, or raise an InputError if it is more than one node of Ray has."""
    import ray

    nodes = [
        (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    most_cpus, most_gpus = max(cpus for cpus, _ in nodes), max(gpus for _, gpus in nodes)
    gpus = config.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if most_gpus >= 1 and config.device != "cpu" else 0.0
    if config.device.startswith("cuda") and not gpus:
        raise InputError(
            f"--device {config.device}: Ray has no GPU for a trial ({most_gpus:g} on a node). "
            "Leave the option out, or start Ray where there are GPUs."
        )
    at_once = int(most_gpus / gpus) if gpus else config.concurrency
    cpus = min(CPUS_PER_TRIAL * max(1.0, gpus), max(1.0, most_cpus // (at_once or 1)))
    fitting = sum(
        min(int(node_cpus / cpus), int(node_gpus / gpus) if gpus else int(node_cpus / cpus))
        for node_cpus, node_gpus in nodes
    )
    if fitting < 1:
        raise InputError(
            f"a trial needs {cpus:g} CPU cores and {gpus:g} GPUs on one machine; Ray has "
            f"{most_cpus:g} and {most_gpus:g}. Lower --gpus-per-trial, or raise --concurrency."
        )
    return Resources(cpus=cpus, gpus=gpus, concurrency=min(fitting, config.concurrency or fitting))
