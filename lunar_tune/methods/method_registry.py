"""The methods by name: a module of this package with an `ENTRY`, or an entry point of another one.

A package adds a method with an entry point of the group `lunar_tune.methods` that names a
`MethodEntry`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from lunar_tune import methods
from lunar_tune.config.fields import typed_setting, types_of
from lunar_tune.errors import InputError, Problems
from lunar_tune.methods.contract import Method, MethodEntry
from lunar_tune.registry import Registry

__all__ = ["METHODS", "configure_method"]


def _entries() -> Iterator[MethodEntry]:
    """Yield the entries of this package's modules, LUNAR first."""
    names = [one.name for one in pkgutil.walk_packages(methods.__path__, f"{methods.__name__}.")]
    modules = [importlib.import_module(name) for name in names if name != __name__]
    entries = [module.ENTRY for module in modules if hasattr(module, "ENTRY")]
    yield from sorted(entries, key=lambda entry: (entry.name != "lunar", entry.name))


METHODS: Registry[MethodEntry] = Registry("method", group="lunar_tune.methods")
for _entry in _entries():
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
    method = settings = None
    with problems.collect():
        settings = entry.settings(**values)
        method = entry.build(settings)
    if method is not None:
        for key in sorted(values.keys() & getattr(settings, "without_use", ())):
            problems.add(f"{key} has no meaning with --solver {method.variant}.")
        for key in sorted(given.keys() - {*method.parameters}):
            problems.add(
                f"--fix {key}: --method {name} ({method.variant}) has no such parameter or "
                "setting. "
                f"There are: {', '.join((*method.parameters, *kinds))}."
            )
    problems.raise_if_any(InputError)
    if method is None:
        raise AssertionError("what is missing comes with a noted problem")
    return method, given
