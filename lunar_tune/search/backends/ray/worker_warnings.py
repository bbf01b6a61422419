"""Warnings of a Ray worker, on their way to whoever watches the search.

    worker: logger.warning(…)  ->  result["warnings"]  ->  driver: screen and search.log

Covers: collecting what this package warns of in a worker, and saying it in the driver.
Does not cover: what Ray's workers print, which stays in Ray's own logs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lunar_tune.secrets import without_secrets

__all__ = ["WARNINGS", "WarningsHeard", "say_warnings"]

WARNINGS = "warnings"
"""The key of a worker's warnings in what it reports."""

_PACKAGE = "lunar_tune"
logger = logging.getLogger(__name__)


class WarningsHeard(logging.Handler):
    """Keeps what this package warns of in this process, until it is taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []
        logging.getLogger(_PACKAGE).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self._texts.append(record.getMessage())

    def close(self) -> None:
        """Hear no more."""
        logging.getLogger(_PACKAGE).removeHandler(self)
        super().close()

    def take(self) -> dict[str, list[str]]:
        """Return what was kept since the last time, for a report; nothing if it is nothing."""
        texts, self._texts = self._texts, []
        return {WARNINGS: texts} if texts else {}


def say_warnings(report: Mapping[str, Any]) -> None:
    """Say what a worker warned of."""
    for text in report.get(WARNINGS, ()):
        logger.warning("a worker: %s", without_secrets(text))
