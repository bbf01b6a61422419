"""Searches on Ray: one as in this process, one under random kills (`scripts/chaos.py` in short)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import environment, run_command
from search_results import rows_of, statuses
from shared_searches import SEED, TRIALS, SharedSearch

from lunar_tune.yaml_files import read_yaml

TIMED = ("seconds", "started", "ended")


def untimed(search: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMED)}
        for row in rows_of(search)
    ]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.alone
def test_a_search_on_ray_has_the_records_of_the_same_search_without_it(
    finished: SharedSearch, empty_store: Callable[[Path], Path], tmp_path: Path
) -> None:
    """On one worker and a CPU; a stray RAY_ADDRESS is not looked at."""
    empty_store(tmp_path / "runs" / "mlflow.db")
    options = ["--num-trials", str(TRIALS), "--seed", str(SEED), "--concurrency", "1"]
    threads = str(torch.get_num_threads())
    done = run_command(
        "search",
        *(*options, "--output", "runs", "--name", "n"),
        cwd=tmp_path,
        OMP_NUM_THREADS=threads,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    numbered = [line[:4] for line in lines if f"/{TRIALS} " in line]
    assert numbered == [f"{done}/{TRIALS} " for done in range(1, TRIALS + 1)]
    for table in ("Trial status", "Logical resource usage"):
        assert table not in done.stdout
    assert lines[-1].endswith(f" --seed {SEED + 1}")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    search = tmp_path / "runs" / "n"
    assert untimed(search) == untimed(finished.folder)
    best, expected = (read_yaml(folder / "best.yaml") for folder in (search, finished.folder))
    assert best["confirmed"] == expected["confirmed"]
    names = [{path.name for path in folder.rglob("*")} for folder in (search, finished.folder)]
    assert names[0] == names[1]
    assert statuses(tmp_path / "runs") == (["FINISHED"], ["FINISHED"] * TRIALS)


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
