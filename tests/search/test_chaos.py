"""A search under random kills, in short; the long version is `scripts/chaos.py` by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import environment

SCRIPT = Path(__file__).parents[2] / "scripts" / "chaos.py"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.alone
def test_a_search_under_kills_has_every_trial_once_in_all_records(
    tmp_path: Path, empty_store: Callable[[Path], Path]
) -> None:
    empty_store(tmp_path / "chaos" / "server.db")
    told = tmp_path / "chaos.json"
    options = ["--trials", "3", "--kills", "1", "--seed", "0", "--json", str(told)]
    options += ["--output", str(tmp_path / "chaos"), "--time-limit", "280"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    outcome = json.loads(told.read_text()) if told.exists() else {}
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert outcome["kills_by_kind"]["driver"] == outcome["kills"] == 1, "with this seed"
    assert outcome["trials_found"] == outcome["trials_expected"] >= 3
    assert outcome["duplicates"] == outcome["left_running"] == outcome["disagreements"] == []
