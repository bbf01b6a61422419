"""One search on Ray: it is the search that this process runs without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import run_command
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
