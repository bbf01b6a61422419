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
    {"display", "errors", "files", "reference", "registry", "secrets", "yaml_files"},
    {"config"},
    {"data", "models"},
    {"engine", "training"},
    {"methods", "metrics"},
    {"finetuning"},
    {"trial"},
    {"study"},
    {"tracking", "report", "export"},
    {"search"},
    {"start"},
    {"api", "cli"},
)
# `python -m lunar_tune.NAME`: each names the command that it runs, and nothing imports it.
ENTRIES = {
    *("ask", "cache", "compare", "describe", "fetch", "finetune", "layers", "table5"),
    *("unlearn", "export.__main__", "search.__main__"),
}
GROUND, ENTRY_FLOOR = 0, len(FLOORS)
MOST_LINES = 2750  # of one package: what somebody can come to know in a day
# Where heavy packages may be imported: modules and packages by their beginning.
HOMES = {
    "ray": ("search.backends.ray",),
    "mlflow": ("tracking",),
    "optuna": ("study", "search"),
}

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
    """Return a module's floor and its package; the ground is one, and so are all entries.

    Raises:
        LookupError: It stands on no floor.
    """
    name = module.removeprefix("lunar_tune").removeprefix(".")
    if name in ENTRIES or not name:  # the package itself names what a notebook needs
        return ENTRY_FLOOR, "entries"
    package = name.split(".")[0]
    for floor, packages in enumerate(FLOORS):
        if package in packages:
            return floor, package if floor else "ground"
    raise LookupError(f"{module} stands on no floor")


def test_every_module_stands_on_a_floor() -> None:
    """Neighbours of one layer, a look upwards and a command's own layer are told apart."""
    assert {home_of(module)[0] for module in MODULES} == {*range(len(FLOORS)), ENTRY_FLOOR}
    with pytest.raises(LookupError):
        home_of("lunar_tune.helpers.misc")
    assert home_of("lunar_tune.data.records") != home_of("lunar_tune.models.layout")
    assert home_of("lunar_tune.data.records")[0] == home_of("lunar_tune.models.layout")[0]
    assert home_of("lunar_tune.trial.worker")[0] > home_of("lunar_tune.methods.lunar.method")[0]
    assert home_of("lunar_tune.search.loop")[0] < home_of("lunar_tune.cli.search")[0] < ENTRY_FLOOR
    assert home_of("lunar_tune.search.__main__") == home_of("lunar_tune.unlearn")


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


def test_no_package_is_too_large_to_know() -> None:
    lines: Counter[Path] = Counter()
    for file in MODULES.values():
        lines[file.parent] += len(file.read_text(encoding="utf-8").splitlines())
    assert {str(p): n for p, n in lines.items() if n > MOST_LINES} == {}


def test_two_modules_of_one_name_are_one_thing() -> None:
    """A command and its entry are named as the command is; all other names are given once."""
    names = Counter(
        module.rpartition(".")[2]
        for module, file in MODULES.items()
        if file.name != "__init__.py" and home_of(module)[1] not in {"cli", "entries"}
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_data_and_config_never_import_torch() -> None:
    forbidden = {"torch", "transformers", "jaxtyping", "peft"}
    for module in MODULES:
        if home_of(module)[1] in {"data", "config"}:
            assert not forbidden & packages_of(module), module


def test_a_trial_needs_neither_ray_nor_optuna_nor_mlflow() -> None:
    """Nothing that it imports, at once or when it runs, does."""
    todo, reached = ["lunar_tune.trial.worker", "lunar_tune.trial.assemble"], set[str]()
    while todo:
        module = todo.pop()
        reached.add(module)
        # The package itself loads what it names at first use.
        todo += imports_of(module) & set(MODULES) - reached - {"lunar_tune"}
    assert len(reached) > 30
    assert [module for module in reached if packages_of(module) & set(HOMES)] == []


@pytest.mark.parametrize("folder", ["datasets", "search_spaces"])
def test_folders_of_data_hold_no_python(folder: str) -> None:
    """An `__init__.py` in `datasets/` would shadow the package of that name."""
    assert list((ROOT / folder).rglob("*.py")) == []
    assert any((ROOT / folder).iterdir())


def test_a_bare_import_loads_nothing_heavy_and_data_and_cache_no_torch() -> None:
    """In a fresh interpreter, from the repository's root."""
    heavy = ("torch", "transformers", "ray", "optuna", "mlflow", "pyarrow", "numpy")
    names = [name for name in MODULES if name.startswith("lunar_tune.data.")]
    code = f"""
import sys, lunar_tune
print([name for name in {heavy} if name in sys.modules])
import lunar_tune.engine.cache, {", ".join(names)}
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["[]", "False"], done.stderr


def test_a_mistake_is_found_before_anything_heavy_is_loaded() -> None:
    mistakes = (
        "search --model tiny --forget-edge X_Y",
        "unlearn layer=1 coefficient=2 learning_rate=0.01 --model tiny --data nothing.json",
        "layers --model nothing",
        "finetune --fix nothing=1 --save x",
        "table5 --model nothing --num-trials 1",
        "ask nothing hello",
        "export nothing --save x",
        "compare nothing",
        "describe nothing.json",
    )
    code = f"""
import sys
from lunar_tune.cli.main import main
for line in {mistakes}:
    try:
        main(line.split())
    except SystemExit as error:
        print(error.code, file=sys.stderr)
heavy = ("torch", "transformers", "ray", "mlflow", "nltk", "scipy", "pandas", "altair")
print(*(name for name in heavy if name in sys.modules), "loaded")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    codes = [line for line in done.stderr.splitlines() if line.isdigit()]
    assert codes == ["2"] * len(mistakes)
    assert done.stdout.splitlines()[-1] == "loaded"
