"""What every search test shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import small_options


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> list[str]:
    """Return options of a run on a random model, which knows nothing, over in no time."""
    return small_options(checkpoint("qwen2"), tmp_path_factory.mktemp("small"))
