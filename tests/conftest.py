"""Run-time shape checks for the numeric modules, and tiny models to test them on."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest
from made_once import copy_store, made_once, make_store, shared_folder
from random_models import build_encoder, build_model, build_tokenizer
from tracking_server import tracking_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
    from shared_searches import SharedSearch
    from transformers import PreTrainedTokenizerFast

    from lunar_tune.models.loading import LoadedModel

CHECKED = ("engine", "metrics", "methods")
SLOW_FILES = {
    *("test_charts", "test_page", "test_results", "test_static_page", "test_mlflow_ui"),
    *("test_ask_command", "test_compare_command", "test_export_command", "test_finetune_command"),
    *("test_interruptions", "test_layers_command", "test_processes", "test_finetune"),
    *("test_families", "test_method_contract", "test_tasks", "test_trials_by_the_page"),
    *("test_extensions", "test_python", "test_search_endings", "test_search_run", "test_tracking"),
    *("test_docs", "test_worker", "test_copies", "test_stores", "test_chat_encoder"),
    *("test_hostile_models", "test_model_identity", "test_ui_server", "test_data_records"),
}


def chromium() -> str | None:
    """Return the path of a browser: Debian's Chromium, or what CHROMIUM names."""
    installed = shutil.which("chromium") or shutil.which("chromium-browser")
    return os.environ.get("CHROMIUM") or installed


def import_with_shape_checks() -> None:
    """Import the numeric packages so that every call checks the shapes in its signature.

    The modules import some classes for type checkers only; beartype looks annotations up in the
    module at the first call, so these names are put there.
    """
    packages = [f"lunar_tune.{name}" for name in CHECKED]
    with jaxtyping.install_import_hook(packages, "beartype.beartype"):
        for package in map(importlib.import_module, packages):
            for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                complete_annotations(importlib.import_module(found.name))


def complete_annotations(module: ModuleType) -> None:
    """Do a module's `if TYPE_CHECKING:` imports."""
    for statement in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            body = ast.Module(body=list(statement.body), type_ignores=[])
            exec(compile(body, str(module.__file__), "exec"), vars(module))


def pytest_configure(config: pytest.Config) -> None:
    """Check shapes where tests run: not in the process that only hands them out."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        import_with_shape_checks()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order what parallel processes take, and leave out browser tests where there is no browser.

    A file stays together, for its tests share what they make, unless a test says that it stands
    alone; what takes long comes first.
    """
    for item in items:
        alone = item.get_closest_marker("alone") is not None
        item.add_marker(pytest.mark.xdist_group(item.nodeid if alone else item.path.name))
        if item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.get_closest_marker("alone") is None, item.path not in slow))
    if chromium() is not None or config.option.markexpr == "browser":
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say which kinds of tests were left out, which parallel runs do not count."""
    for name in ("gpu", "ray", "browser", "slow"):
        if f"not {name}" in config.option.markexpr:
            line = f"deselected: tests marked {name} (run them with -m {name})"
            terminalreporter.write_line(line)
    if chromium() is None:
        terminalreporter.write_line("deselected: tests marked browser (no Chromium was found)")


@pytest.fixture(scope="session", autouse=True)
def weights_verified() -> Iterator[None]:
    """Let every trial of every test end with a look at the model's weights."""
    with pytest.MonkeyPatch.context() as changes:
        changes.setenv("LUNAR_TUNE_VERIFY_WEIGHTS", "1")
        yield


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Models are so small that a second thread only waits for the first."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """Return a factory of checkpoint folders, each made once."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            build_model(family, **changes).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sentence-embedding model."""
    return build_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def loaded(checkpoint: Callable[..., Path]) -> Callable[..., LoadedModel]:
    """Return a factory of loaded models, each loaded once; a test leaves them as they were."""
    from lunar_tune.models.catalog import ModelSpec
    from lunar_tune.models.loading import load_model

    made: dict[Path, LoadedModel] = {}

    def load(family: str, **changes: Any) -> LoadedModel:
        folder = checkpoint(family, **changes)
        if folder not in made:
            made[folder] = load_model(ModelSpec(name=family, source=str(folder), device="cpu"))
        return made[folder]

    return load


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> list[str]:
    """Return options of a run on a random model, which knows nothing, over in no time."""
    from command_lines import small_options

    return small_options(checkpoint("qwen2"), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SharedSearch:
    """Return a search of LUNAR on the tiny model, feasible and confirmed; only to be read."""
    from shared_searches import finished_search

    return finished_search(shared_folder(tmp_path_factory))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> SharedSearch:
    """Return a search of NPO on a random model with held-out questions; only to be read."""
    from shared_searches import held_out_search

    return held_out_search(shared_folder(tmp_path_factory))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Return a function that puts an empty MLflow store in a place.

    For tests whose subject is not the making of one, which takes five seconds. The search
    `finished` makes its own, three processes at once in `test_tracking`.
    """

    def put(place: Path) -> Path:
        made = made_once(shared_folder(tmp_path_factory) / "empty-store", make_store)
        return copy_store(made / "mlflow.db", place)

    return put


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Callable[[Path], Path]
) -> Iterator[str]:
    """Give the address of an MLflow server with an empty store."""
    folder = tmp_path_factory.mktemp("server")
    empty_store(folder / "server.db")
    with tracking_server(folder) as address:
        yield address


@pytest.fixture
def unchanged() -> Iterator[Callable[[Any], None]]:
    """Return a function that notes a model's weights; they must be the same after the test."""
    import torch

    noted: list[tuple[Any, dict[str, torch.Tensor]]] = []

    def note(model: Any) -> None:
        noted.append((model, {name: p.detach().clone() for name, p in model.named_parameters()}))

    yield note
    for model, weights in noted:
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.fixture
def model(loaded: Callable[..., LoadedModel], unchanged: Callable[[Any], None]) -> LoadedModel:
    """Return a random model that a test must leave as it was."""
    unchanged(loaded("qwen2").model)
    return loaded("qwen2")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox does not start as root, which containers often are.
        started = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Return a page of a real browser, for tests that look at what a user sees."""
    opened = browser.new_page(viewport={"width": 1440, "height": 1000})
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    opened.close()
    assert not errors
