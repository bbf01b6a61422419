"""Starting and asking Ray: quiet, with what a trial may use."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError
from lunar_tune.search.backends.interface import Resources
from lunar_tune.search.backends.ray.access import check_address, own_session, refusal, users_token

if TYPE_CHECKING:
    from lunar_tune.config.search_config import SearchConfig

__all__ = ["allocate_resources", "check_gpus", "leave_ray", "ray_session"]

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


def check_gpus(config: SearchConfig) -> None:
    """Check a demand for GPUs against this machine, before Ray starts.

    Raises:
        InputError: More were demanded than there are.
    """
    wanted = config.gpus_per_trial or 0.0
    if config.address is not None or not 0 < wanted < math.inf:
        return
    import torch

    available = torch.cuda.device_count()
    if wanted > available:
        raise InputError(
            f"--gpus-per-trial {wanted:g}: this machine has {available} CUDA "
            "devices that torch can see. Leave the option out to use what there is, or name a "
            "cluster with --address."
        )


@contextmanager
def ray_session(config: SearchConfig) -> Iterator[None]:
    """Inside, Ray runs here or is connected to; after, it is shut down or left alone.

    Where Ray is there already, in a session around this one, it is used.

    Raises:
        InputError: The cluster cannot be reached.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if _is_there():
        yield
        return
    local = config.address is None
    with own_session() if local else users_token(str(config.address)) as folder:
        import ray  # it reads its environment when it is imported

        # A crash is told once, as the trial's reason of failure, and not as Tune's traceback.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        _connect(config.address, folder)
        try:
            yield
        finally:
            ray.shutdown()


def leave_ray() -> None:
    """Let go of Ray at once, in whatever state it is.

    A signal to the whole process group ends Ray's own processes too, and a driver that goes on
    without them is ended after a minute.
    """
    import ray

    ray.shutdown()


def _is_there() -> bool:
    """Say whether this process has a Ray, without importing it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _connect(address: str | None, folder: Path | None) -> None:
    """Start Ray here, in a folder, or join the cluster of an address."""
    import ray
    from ray.exceptions import RayError

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        # Without an address Ray would join the cluster of RAY_ADDRESS or of the last `ray start`.
        ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), **options)
        return
    check_address(address)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError, RayError) as error:
        raise InputError(refusal(address, error)) from error


def allocate_resources(config: SearchConfig) -> Resources:
    """Decide what a trial uses, from what Ray has; a trial runs on one node.

    Raises:
        InputError: A trial would need more than any node has.
    """
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
            f"a trial wants {cpus:g} CPU cores and {gpus:g} GPUs on one machine; Ray has "
            f"{most_cpus:g} and {most_gpus:g}. Lower --gpus-per-trial, or raise --concurrency."
        )
    return Resources(cpus=cpus, gpus=gpus, concurrency=min(fitting, config.concurrency or fitting))
