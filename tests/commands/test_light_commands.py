"""What commands load: a process each would take seconds, so one runs them after another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_lines import finish, start

pytestmark = pytest.mark.slow  # a process of its own

PROGRAM = """
import importlib, pkgutil, runpy, sys

def run(*arguments):
    sys.argv = list(arguments)
    try:
        runpy.run_module(f"lunar_tune.{arguments[0]}", run_name="__main__")
    except SystemExit as end:
        return end.code

def loaded(*names):
    return [name for name in names if name in sys.modules]

heavy = ["torch", "transformers", "ray", "mlflow", "optuna"]
assert run("cache") == 0
assert loaded(*heavy, "numpy") == []
import lunar_tune.data as data
for module in pkgutil.iter_modules(data.__path__, "lunar_tune.data."):
    importlib.import_module(module.name)
assert run("describe", "mini") == run("fetch") == 0
assert loaded(*heavy) == []
for name in ("ray", "mlflow"):
    sys.modules[name] = None
assert run("search", "--dry-run") == 0
"""


def test_lists_and_cards_load_no_torch_and_a_dry_run_needs_neither_ray_nor_mlflow(
    tmp_path: Path,
) -> None:
    done = finish(
        start([sys.executable, "-c", PROGRAM], cwd=tmp_path, LUNAR_TUNE_CACHE=str(tmp_path))
    )
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("The cache is empty", "96 pairs, 8 edges", "kept in ", "nothing was run"):
        assert shown in done.stdout
    assert list(tmp_path.iterdir()) == []
