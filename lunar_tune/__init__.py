"""lunar-tune: constrained hyperparameter search over LLM unlearning.

Covers: the names that a notebook needs, each loaded at first use, so that `import lunar_tune`
stays light.

Example:
    >>> from lunar_tune import RunOptions, unlearn  # doctest: +SKIP
    >>> run = unlearn(RunOptions(model="tiny"), layer=0, coefficient=2.0, learning_rate=0.003)
    >>> run.scores["forget_rouge1"]
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["LunarSettings", "RunOptions", "TrialResult", "Worker", "__version__"]

_HOMES = {
    "LunarSettings": "lunar_tune.methods.lunar",
    "RunOptions": "lunar_tune.trial.options",
    "TrialResult": "lunar_tune.trial.worker",
    "Worker": "lunar_tune.trial.worker",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module at first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lunar_tune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
