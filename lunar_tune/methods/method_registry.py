"""The methods by name: a module of this package with an `ENTRY`, or an entry point of another one.

A package adds a method with an entry point of the group `lunar_tune.methods` that names a
`MethodEntry`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from lunar_tune import methods
from lunar_tune.config.fields import typed_setting, types_of
from lunar_tune.errors import Problems
from lunar_tune.methods.contract import Method, MethodEntry
from lunar_tune.registry import Registry

__all__ = ["METHODS", "configure_method"]


METHODS: Registry[MethodEntry] = Registry("method", group="lunar_tune.methods")

_names = [one.name for one in pkgutil.walk_packages(methods.__path__, f"{methods.__name__}.")]
_modules = [importlib.import_module(name) for name in _names if name != __name__]
_entries: list[MethodEntry] = [one.ENTRY for one in _modules if hasattr(one, "ENTRY")]
for _entry in sorted(_entries, key=lambda one: (one.name != "lunar", one.name)):
    METHODS.register(_entry.name, _entry)


def configure_method(
    name: str, *, solver: str | None = None, fixed: Mapping[str, Any] | None = None
) -> tuple[Method, dict[str, Any]]:
    """Return a method with its settings, and what else is fixed: parameters of the search.

    Args:
        name: In the registry.
        solver: LUNAR's way to fit; None is what `fixed` says, or the default.
        fixed: Settings and parameters by name.

    Raises:
        InputError: There is no such method or setting, or one means nothing; all of it is said.
    """
    entry, problems = METHODS[name], Problems()
    given = dict(fixed or {})
    if solver is not None:
        if entry.variant_setting != "solver":
            problems.add(f"--solver {solver} has no meaning with --method {name}.")
        elif given.setdefault("solver", solver) != solver:
            problems.add(f"--solver {solver} contradicts --fix solver={given['solver']}.")
    kinds = types_of(entry.settings)
    values: dict[str, Any] = {}
    for key in [key for key in given if key in kinds]:
        with problems.collect():
            values[key] = typed_setting(key, given.pop(key), kinds[key])
    with problems.collect():
        settings = entry.settings(**values)
        method = entry.build(settings)
        for key in sorted(values.keys() & getattr(settings, "without_use", ())):
            problems.add(f"{key} has no meaning with --solver {method.variant}.")
        for key in sorted(given.keys() - {*method.parameters}):
            problems.add(
                f"--fix {key}: --method {name} ({method.variant}) has no such parameter or "
                f"setting. There are: {', '.join((*method.parameters, *kinds))}."
            )
    problems.raise_if_any()
    return method, given
