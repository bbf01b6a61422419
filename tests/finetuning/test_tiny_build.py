"""Building `tiny`: what happens when it fails, is repeated, or is asked for twice at once.

A recipe of one block and one epoch stands in; its check would fail, so the check is left out.
"""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lunar_tune.errors import LunarTuneError
from lunar_tune.finetuning import tiny
from lunar_tune.finetuning.tiny import TinyRecipe, TinyText, tiny_key
from lunar_tune.training import TrainingSettings

QUICK = TinyRecipe(
    sizes={
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    vocabulary=400,
    training=TrainingSettings(trained="full", epochs=1, batch_size=32),
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path))


def test_the_same_recipe_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "_check", lambda *_: None)
    screen = Console(file=io.StringIO(), force_terminal=True, width=160)
    folders = [tiny.ensure_tiny(QUICK, console=screen), tmp_path / "b"]
    folders[1].mkdir()
    torch.manual_seed(5)  # whatever happened before does not matter
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    tiny.build_tiny(folders[1], QUICK, TinyText.shipped())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert "1/1" in screen.file.getvalue(), "progress counts epochs"  # type: ignore[attr-defined]
    one, other = ({file.name: file.read_bytes() for file in path.iterdir()} for path in folders)
    assert one == other


def test_a_model_that_knows_nothing_is_an_error_and_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(LunarTuneError, match="pairs known"):
        tiny.ensure_tiny(QUICK)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_two_that_ask_at_once_build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def slow_build(folder: Path, *_: object, **_options: object) -> None:
        built.append(folder)
        time.sleep(0.3)

    monkeypatch.setattr(tiny, "build_tiny", slow_build)
    with ThreadPoolExecutor(2) as askers:
        one, other = askers.map(tiny.ensure_tiny, (QUICK, QUICK))
    assert len(built) == 1
    assert one == other
    assert one.is_dir()


def test_the_key_changes_with_recipe_and_with_text() -> None:
    text = TinyText.shipped()
    keys = [
        tiny_key(QUICK, text),
        tiny_key(replace(QUICK, seed=1), text),
        tiny_key(QUICK, replace(text, known=text.known[::-1])),
    ]
    assert len(set(keys)) == 3
    assert tiny_key(replace(QUICK), TinyText.shipped()) == keys[0]
