"""The backend that a configuration asks for, opened for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lunar_tune.config.search_config import SearchConfig
from lunar_tune.search.backends.in_process import InProcess, resources_here
from lunar_tune.search.backends.interface import Backend, Resources
from lunar_tune.study.folder import Folder

__all__ = ["open_backend", "shared_session"]


@contextmanager
def shared_session(config: SearchConfig) -> Iterator[None]:
    """Inside, several searches use one session of what runs their tasks."""
    if config.in_process:
        yield
        return
    from lunar_tune.search.backends.ray.cluster import ray_session

    with ray_session(config):
        yield


@contextmanager
def open_backend(config: SearchConfig, folder: Folder) -> Iterator[tuple[Backend, Resources]]:
    """Give who runs the tasks of a search, and what each of them uses.

    Args:
        config: Of the search.
        folder: Of the search.

    Raises:
        InputError: A cluster cannot be reached, or has less than a trial wants.
    """
    if config.in_process:
        yield InProcess(), resources_here(config.device)
        return
    from lunar_tune.search.backends.ray.backend import OnRay
    from lunar_tune.search.backends.ray.cluster import allocate_resources, ray_session

    with ray_session(config):
        resources = allocate_resources(config)
        yield OnRay(resources, folder, config.trial_timeout), resources
