"""lunar-tune: constrained hyperparameter search over LLM unlearning.

Example:
    >>> from lunar_tune import unlearn_once  # doctest: +SKIP
    >>> run = unlearn_once(layer=1, coefficient=2.0, learning_rate=0.003)
    >>> run.scores["forget_rouge1"]
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "LunarSettings": "lunar_tune.methods.lunar",
    "RunOptions": "lunar_tune.config.run_options",
    "SearchResults": "lunar_tune.report.results",
    "SingleRun": "lunar_tune.trial.single",
    "Worker": "lunar_tune.trial.worker",
    "load_search": "lunar_tune.report.results",
    "unlearn_once": "lunar_tune.trial.single",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 they are texts


def __getattr__(name: str) -> Any:
    """Load a public name from its module at first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lunar_tune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
