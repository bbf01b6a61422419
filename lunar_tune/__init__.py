"""lunar-tune: constrained hyperparameter search over LLM unlearning.

Example:
    >>> import lunar_tune as lt
    >>> found = lt.search(model="tiny", num_trials=12)  # doctest: +SKIP
    >>> found.answers()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lunar_tune.api import Search, load, method, metric, search, unlearn
    from lunar_tune.errors import InputError, TrialError
    from lunar_tune.methods.contract import Edit, Fit, Method, PreparedMethod
    from lunar_tune.trial.single import SingleRun

__version__ = "0.1.0"
__all__ = [
    "Edit",
    "Fit",
    "InputError",
    "Method",
    "PreparedMethod",
    "Search",
    "SingleRun",
    "TrialError",
    "__version__",
    "load",
    "method",
    "metric",
    "search",
    "unlearn",
]
_HOMES = {
    **dict.fromkeys(("Search", "load", "method", "metric", "search", "unlearn"), "api"),
    **dict.fromkeys(("InputError", "TrialError"), "errors"),
    **dict.fromkeys(("Edit", "Fit", "Method", "PreparedMethod"), "methods.contract"),
    "SingleRun": "trial.single",
}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lunar_tune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
