"""lunar-tune: constrained hyperparameter search over LLM unlearning.

Example:
    >>> import lunar_tune as lt
    >>> found = lt.search(model="tiny", num_trials=12)  # doctest: +SKIP
    >>> found.answers()
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
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


class _Package(ModuleType):
    """The package, whose public names are loaded at first use."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'lunar_tune' has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        package = sys.modules.get(f"{__name__}.{name}")
        if package is not None and vars(found) is not vars(package):
            # Modules of the package `lunar_tune.search` are found behind the function, too.
            vars(package).update(vars(found))
            found.__dict__ = vars(package)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        # Importing the package `lunar_tune.search` must not put it in the place of the function.
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # By its name, like every module: a method of a notebook may refer to it on Ray's workers.
        return importlib.import_module, (self.__name__,)

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Package
