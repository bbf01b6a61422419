"""Unlearning methods behind one contract; the `ENTRIES` of each module here are registered."""

import importlib
import pkgutil

from lunar_tune.methods.contract import METHODS, Method

# In the package, which is imported before any of its modules, and so sees all of them whole.
_names = [one.name for one in pkgutil.iter_modules(__path__, f"{__name__}.")]
_modules = [importlib.import_module(name) for name in _names]
_entries: list[type[Method]] = [kind for m in _modules for kind in getattr(m, "ENTRIES", ())]
for _entry in sorted(_entries, key=lambda one: (one.name != "lunar", one.name)):
    METHODS.register(_entry.name, _entry)
