"""Whole searches on a model, seed by seed: what they find, and where their time goes.

Covers: for each seed one `python -m lunar_tune.search` in a process of its own, with starting
points off; the best feasible setting, confirmed; wall time split into the trial itself, the
sampler, and what Ray and MLflow add; all from the search's own outputs.
Does not cover: a single trial's stages.

    scripts/bench_search.py --seeds 10 --num-trials 30 --json FILE
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import optuna
import typer
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from rich.table import Table

from lunar_tune.search.config import RETAIN_FLOOR

GOOD_FORGET = 0.15
COLUMNS = ("seed", "wall s", "trial s", "sampler s", "ray+mlflow s", "feasible", "forget", "retain")


def one_search(output: Path, seed: int, num_trials: int, options: list[str]) -> dict[str, Any]:
    """Run a search and return its figures; times of a trial are medians."""
    name = f"seed-{seed}"
    command = [sys.executable, "-m", "lunar_tune.search", "--no-starting-points", "--quiet"]
    command += ["--seed", str(seed), "--num-trials", str(num_trials), *options]
    command += ["--output", str(output), "--name", name]
    start = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    wall = time.perf_counter() - start
    if code not in {0, 3}:
        raise SystemExit(f"the search with seed {seed} ended with exit code {code}")
    best = output / name / "best.yaml"
    scores = yaml.safe_load(best.read_text())["confirmed"]["scores"] if best.exists() else {}
    return {
        "seed": seed,
        "wall": wall,
        "forget": scores.get("forget_rouge1"),
        "retain": scores.get("retain_rouge1"),
        **_trial_times(output / name / "study.journal", name),
    }


def _trial_times(journal: Path, name: str) -> dict[str, Any]:
    """Split the time from one trial's start to the next; the first trial loads the model."""
    storage = JournalStorage(JournalFileBackend(str(journal)))
    trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state.is_finished()]
    overheads = []
    for this, following in pairwise(done[1:]):
        if this.datetime_start is None or following.datetime_start is None:
            continue
        period = (following.datetime_start - this.datetime_start).total_seconds()
        sampler = this.user_attrs["seconds_suggest"]
        overheads.append(period - this.user_attrs["seconds"]["trial"] - sampler)
    feasible = [trial for trial in done if all(c <= 0 for c in trial.constraints.values())]
    return {
        "trials": len(done),
        "feasible": len(feasible),
        "trial": median(trial.user_attrs["seconds"]["trial"] for trial in done),
        "sampler": median(trial.user_attrs["seconds_suggest"] for trial in done),
        "overhead": median(overheads) if overheads else None,
    }


def bench(
    seeds: Annotated[int, typer.Option(min=1, help="Searches, one a seed.")] = 10,
    num_trials: Annotated[int, typer.Option(min=3, help="Trials of a search.")] = 30,
    options: Annotated[str, typer.Option(help="Further options of the search.")] = "--model tiny",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Run searches with several seeds and print what they found and where their time went."""
    console = Console()
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            row = one_search(Path(folder), seed, num_trials, options.split())
            figures.append(row)
            console.print(row)
            table.add_row(
                str(seed),
                f"{row['wall']:.0f}",
                f"{row['trial']:.2f}",
                f"{row['sampler']:.2f}",
                "-" if row["overhead"] is None else f"{row['overhead']:.2f}",
                f"{row['feasible']}/{row['trials']}",
                *(
                    "-" if row[name] is None else f"{row[name]:.3f}"
                    for name in ("forget", "retain")
                ),
            )
    console.print(table)
    found = sum(
        row["forget"] is not None and row["forget"] <= GOOD_FORGET and row["retain"] >= RETAIN_FLOOR
        for row in figures
    )
    console.print(
        f"forget <= {GOOD_FORGET} at retain >= {RETAIN_FLOOR}: {found} of {seeds} seeds; longest "
        f"search {max(row['wall'] for row in figures):.0f} s; Ray and MLflow at most "
        f"{max(row['overhead'] or 0.0 for row in figures):.2f} s a trial (medians)"
    )
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    typer.run(bench)
