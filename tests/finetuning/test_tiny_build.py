"""Building `tiny`: what happens when it fails, is repeated, or is asked for twice at once.

A recipe of one block and one epoch stands in; its check would fail, so the check is left out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lunar_tune.errors import LunarTuneError
from lunar_tune.finetuning import tiny
from lunar_tune.finetuning.tiny import TinyRecipe, TinyText

QUICK = TinyRecipe(
    n_layers=1, d_model=16, d_ff=16, n_heads=2, n_key_value_heads=1, vocabulary=400, epochs=1
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path))


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "_check", lambda *_: None)


@pytest.mark.usefixtures("_unchecked")
def test_the_same_recipe_gives_the_same_files(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        torch.manual_seed(len(folder.name))  # whatever happened before does not matter
        tiny.build_tiny(folder, QUICK, TinyText.shipped())
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in folders[1].iterdir())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.usefixtures("_unchecked")
def test_building_leaves_threads_and_random_state_as_they_were(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    tiny.build_tiny(tmp_path, QUICK, TinyText.shipped())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("_unchecked")
def test_progress_counts_epochs() -> None:
    seen: list[tuple[int, int]] = []
    tiny.ensure_tiny(QUICK, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


def test_a_model_that_knows_nothing_is_an_error_and_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(LunarTuneError, match="pairs known"):
        tiny.ensure_tiny(QUICK)
    left = [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()]
    assert left == []


def test_two_that_ask_at_once_build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def slow_build(
        folder: Path, *_: object, on_progress: Callable[[int, int], None] | None
    ) -> None:
        assert on_progress is None
        built.append(folder)
        time.sleep(0.3)

    monkeypatch.setattr(tiny, "build_tiny", slow_build)
    folders: list[Path] = []
    askers = [
        threading.Thread(target=lambda: folders.append(tiny.ensure_tiny(QUICK))) for _ in range(2)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(built) == 1
    assert folders[0] == folders[1]
    assert folders[0].is_dir()
