"""A random model for commands that run to their end in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import small_options


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> list[str]:
    """Return options of a run on a random model, over in no time, that every command takes."""
    options = small_options(checkpoint("qwen2"), tmp_path_factory.mktemp("small"))
    place = options.index("--fix")
    return options[:place] + options[place + 2 :]
