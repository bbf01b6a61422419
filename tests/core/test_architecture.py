"""The law of the design: imports go down, and what is heavy stays where it belongs."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lunar_tune"

# The design's picture, from the ground up. A module that stands nowhere in it is an error.
FLOORS = (
    {
        "bounded",
        "display",
        "errors",
        "files",
        "reference",
        "registry",
        "secrets",
        "signals",
        "yaml_files",
    },
    {"config"},
    {"data", "models"},
    {"engine", "training"},
    {"methods", "metrics"},
    {"finetuning"},
    {"trial"},
    {"study"},
    {"tracking", "report", "export"},
    {"driver"},
    {"api", "cli"},
)
# `python -m lunar_tune.NAME`: each names the command that it runs, and nothing imports it.
ENTRIES = {
    *("ask", "cache", "collect", "compare", "describe", "fetch", "finetune", "layers", "table5"),
    *("search", "unlearn", "export.__main__", "models.__main__"),
}
GROUND, ENTRY_FLOOR = 0, len(FLOORS)
MOST_LINES = 2750  # of one package: what somebody can come to know in a day
# Where heavy packages may be imported: modules and packages by their beginning.
HOMES = {
    "ray": ("driver.backends",),
    "mlflow": ("tracking",),
    "optuna": ("study", "driver"),
}
WITHOUT_TORCH = {"data", "config"}

MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if "_bundled" not in file.parts
}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Return every module that a module imports, anywhere in it, also for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
    return frozenset(found)


def packages_of(module: str) -> set[str]:
    """Return the packages, ours or others', that a module imports from."""
    return {name.split(".")[0] for name in imports_of(module)}


def home_of(module: str) -> tuple[int, str]:
    """Return a module's floor and its package; the ground is one, and so are all entries."""
    name = module.removeprefix("lunar_tune").removeprefix(".")
    if name in ENTRIES or not name:  # the package itself names what a notebook needs
        return ENTRY_FLOOR, "entries"
    package = name.split(".")[0]
    for floor, packages in enumerate(FLOORS):
        if package in packages:
            return floor, package if floor else "ground"
    raise LookupError(f"{module} stands on no floor")


def test_a_module_imports_from_lower_layers_or_its_own_package() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module in MODULES
        for imported in imports_of(module)
        if imported.split(".")[0] == "lunar_tune" and imported != "lunar_tune"
        if home_of(imported) != home_of(module)
        if home_of(imported)[0] >= home_of(module)[0]
    ]
    assert wrong == []


def test_no_module_imports_itself_by_a_detour() -> None:
    modules = {*MODULES} - {"lunar_tune"}  # which loads what it names at first use
    graph = {module: modules & imports_of(module) for module in modules}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the cycle


@pytest.mark.parametrize("package", HOMES)
def test_a_heavy_package_is_imported_in_its_home_alone(package: str) -> None:
    users = {module for module in MODULES if package in packages_of(module)}
    homes = tuple(f"lunar_tune.{home}." for home in HOMES[package])
    assert users
    assert [module for module in users if not module.startswith(homes)] == []


def test_the_page_is_one_page_and_needs_nothing_of_this_package() -> None:
    packages = packages_of("lunar_tune.reference") - sys.stdlib_module_names
    assert packages == {"torch", "transformers"}
    page = MODULES["lunar_tune.reference"].read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 250


def test_data_and_config_never_import_torch() -> None:
    for module in MODULES:
        if home_of(module)[1] in WITHOUT_TORCH:
            assert not {"torch", "transformers", "jaxtyping", "peft"} & packages_of(module), module


def test_no_package_is_too_large_to_know() -> None:
    lines: Counter[Path] = Counter()
    for file in MODULES.values():
        lines[file.parent] += len(file.read_text(encoding="utf-8").splitlines())
    assert {str(p): n for p, n in lines.items() if n > MOST_LINES} == {}


def test_a_trial_needs_neither_ray_nor_optuna_nor_mlflow() -> None:
    todo, reached = ["lunar_tune.trial.worker", "lunar_tune.trial.assemble"], set[str]()
    while todo:
        module = todo.pop()
        reached.add(module)
        # The package itself loads what it names at first use.
        todo += imports_of(module) & set(MODULES) - reached - {"lunar_tune"}
    assert len(reached) > 30
    assert [module for module in reached if packages_of(module) & set(HOMES)] == []


def test_folders_of_data_hold_no_python() -> None:
    """An `__init__.py` in `datasets/` would shadow the package of that name."""
    for folder in ("datasets", "search_spaces"):
        assert list((ROOT / folder).rglob("*.py")) == []


MISTAKES = (
    "search --model tiny --forget-edge X_Y",
    "unlearn layer=1 coefficient=2 learning_rate=0.01 --model tiny --data nothing.json",
    "layers --model nothing",
    "collect --model nothing",
    "finetune --fix nothing=1 --save x",
    "table5 --model nothing --num-trials 1",
    "ask nothing hello",
    "export nothing --save x",
    "compare nothing",
    "describe nothing.json",
)


def test_imports_and_mistakes_load_nothing_heavy() -> None:
    """A bare import, data and cache, and commands that are wrong; in a fresh interpreter."""
    names = [name for name in MODULES if name.startswith("lunar_tune.data.")]
    code = f"""
import sys, lunar_tune
def loaded(*names): print([name for name in names if name in sys.modules])
heavy = ("torch", "transformers", "ray", "mlflow", "nltk", "scipy", "pandas", "altair")
loaded(*heavy, "optuna", "pyarrow", "numpy")
import lunar_tune.engine.cache, {", ".join(names)}
loaded("torch")
from lunar_tune.cli.main import main
for line in {MISTAKES}:
    try:
        main(line.split())
    except SystemExit as error:
        print(error.code, file=sys.stderr)
loaded(*heavy)"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    codes = [line for line in done.stderr.splitlines() if line.isdigit()]
    assert codes == ["2"] * len(MISTAKES)
    assert [line for line in done.stdout.splitlines() if line[:1] == "["] == ["[]"] * 3
