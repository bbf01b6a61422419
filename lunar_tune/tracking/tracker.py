"""The store of a command that computes: looked at before the work, and never in its way after."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lunar_tune.secrets import without_secrets
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.runs import RunContent, bring
from lunar_tune.tracking.store import (
    failing_soon,
    find_experiment,
    kept_uri,
    open_experiment,
    opened_store,
    refusals,
    with_password,
)
from lunar_tune.tracking.sync import sync

__all__ = ["Tracker"]

PATIENCE, SECONDS_BETWEEN = 5.0, 1.0
"""Seconds for which a store is waited for at the end, and between two tries."""
_AWAY = 30.0
"""Seconds for which a store that has failed is left alone: trials do not wait for it."""
logger = logging.getLogger(__name__)


class Tracker:
    """Writes runs; a store that fails is warned of once and ends nothing.

    Args:
        uri: Tracking URI.
        experiment: Of the runs; made if missing.
        name: Of what is computed, for errors.
    """

    def __init__(self, uri: str, experiment: str, name: str) -> None:
        """Look whether the store can do what will be asked of it.

        Raises:
            InputError: It cannot.
        """
        self.uri, self.experiment = with_password(uri, name), experiment
        self._has_failed, self._is_behind, self._away_until = False, False, -math.inf
        with opened_store(self.uri) as self._client:
            open_experiment(self._client, experiment)

    def place(self, before: Mapping[str, Any] | None) -> dict[str, str]:
        """Return what a search notes of its place in MLflow, with the identity that it had."""
        identity = (before or {}).get("id") or uuid.uuid4().hex
        return {"id": identity, "uri": kept_uri(self.uri), "experiment": self.experiment}

    def trial(self, search: StoredSearch, number: int) -> None:
        """Write a trial that has ended, and what an earlier failure has left out."""
        if time.monotonic() >= self._away_until:
            only = None if self._is_behind else {number}
            with self._tolerating():
                sync(search, self._client, only=only, status="RUNNING")

    def search(self, search: StoredSearch, *, note: str | None, status: str | None = None) -> bool:
        """Write everything, and say whether MLflow has it; see `sync`."""
        with self._tolerating():
            sync(search, self._client, note=note, status=status)
        return not self._is_behind

    def finish(self, search: StoredSearch, *, note: str, waiting: Callable[[], None]) -> bool:
        """Write everything at the end, where a store that is away is waited for some seconds.

        Args:
            search: That has ended.
            note: As in `sync`.
            waiting: Called when the store is waited for.
        """
        patience = time.monotonic() + PATIENCE
        while not self.search(search, note=note):
            if time.monotonic() > patience:
                return False
            waiting()
            time.sleep(SECONDS_BETWEEN)
        return True

    def write(self, content: RunContent) -> None:
        """Write one run that is over."""
        with self._tolerating():
            experiment = find_experiment(self._client, self.experiment)
            bring(self._client, str(experiment.experiment_id), (), content)

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        self._is_behind = True
        try:
            with failing_soon():
                yield
            self._is_behind = False
        except refusals() as error:
            self._away_until = time.monotonic() + _AWAY
            if not self._has_failed:
                first_line = without_secrets(str(error).partition("\n")[0])
                logger.warning("MLflow cannot be written, the work goes on: %s", first_line)
            self._has_failed = True
