"""Whole searches on a model, seed by seed: what they find, and where their time goes.

Covers: for each seed one `python -m lunar_tune.search` in a process of its own, with starting
points off; the best feasible setting, confirmed; wall time split into start-up, the trials, the
sampler, what Ray and MLflow add, and the end; how that grows from the first trials to the last; the
memory of the driver and of its workers over time; how likely it is said that the best keeps its
bounds on new questions, and with --holdout whether it does; all from the search's own outputs and
its processes.
Does not cover: a single trial's stages (`bench_trial`), samplers (`bench_samplers`).

    scripts/bench_search.py --seeds 10 --num-trials 30 --json FILE
    scripts/bench_search.py --seeds 1 --num-trials 300 --options "--model tiny --solver closed_form"
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import cyclopts
import optuna
import psutil
from cyclopts import Parameter
from cyclopts.types import PositiveInt
from cyclopts.validators import Number
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.table import Table

from lunar_tune.config.options import RETAIN_FLOOR
from lunar_tune.study.study import StoredStudy
from lunar_tune.yaml_files import read_yaml

GOOD_FORGET = 0.15
COLUMNS = (
    "seed",
    "wall s",
    "to first trial s",
    "trial s",
    "sampler s",
    "ray+mlflow s",
    "after last s",
    "feasible",
    "forget",
    "retain",
)
WINDOW = 30  # trials at the beginning and at the end that are held against each other
MIB = 2**20
SECONDS_PER_LOOK = 1.0


def one_search(output: Path, seed: int, num_trials: int, options: list[str]) -> dict[str, Any]:
    """Run a search and return its figures; times of a trial are medians."""
    name = f"seed-{seed}"
    command = [sys.executable, "-m", "lunar_tune.search", "--start-from", "none", "--quiet"]
    command += ["--seed", str(seed), "--num-trials", str(num_trials), "--stop", "never", *options]
    command += ["--output", str(output), "--name", name]
    begun, start = datetime.now(), time.perf_counter()
    with tempfile.TemporaryFile() as said:  # what it says is read only where it fails
        process = subprocess.Popen(command, stdout=said, stderr=said)
        memory = _watched(process)
        wall = time.perf_counter() - start
        said.seek(0)
        text = said.read().decode(errors="replace")
    if process.returncode not in {0, 3}:
        raise SystemExit(f"seed {seed}: exit code {process.returncode}\n{text}")
    best = output / name / "best.yaml"
    found = read_yaml(best) if best.exists() else {}
    scores = found["confirmed"]["scores"] if found else {}
    notes = StoredStudy.read(output / name / "study.journal").notes
    return {
        "seed": seed,
        "wall": wall,
        "forget": scores.get("forget_rouge1"),
        "retain": scores.get("retain_rouge1"),
        "kept_again": (notes.get("new_questions") or {}).get("kept_again"),
        "kept": found.get("feasible"),
        **_times(output / name / "study.journal", name, begun, wall),
        "memory_mib": memory,
    }


def _watched(process: subprocess.Popen[bytes]) -> dict[str, list[float]]:
    """Wait for a process; return the memory of it and of its children over time, in MiB."""
    seen: dict[str, list[float]] = {"driver": [], "children": []}
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            children = driver.children(recursive=True)
            seen["driver"].append(driver.memory_info().rss / MIB)
            seen["children"].append(sum(map(_own_memory, children)) / MIB)
        time.sleep(SECONDS_PER_LOOK)
    return {who: _in_quarters(values) for who, values in seen.items()}


def _own_memory(process: psutil.Process) -> float:
    """Return the memory that only this process holds, in bytes; 0 for one that is gone."""
    try:
        return float(process.memory_full_info().uss)
    except psutil.Error:
        return 0.0


def _in_quarters(values: Sequence[float]) -> list[float]:
    """Return the medians of the second to the fourth quarter: the first one is start-up."""
    quarter = max(1, len(values) // 4)
    parts = [values[i * quarter : (i + 1) * quarter] for i in range(1, 4)]
    return [round(median(part), 1) for part in parts if part]


def _times(journal: Path, name: str, begun: datetime, wall: float) -> dict[str, Any]:
    """Split the time from one trial's start to the next; the first trial captures activations."""
    storage = JournalStorage(JournalFileBackend(str(journal)))
    trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state.is_finished()]
    feasible = [trial for trial in done if all(c <= 0 for c in trial.constraints.values())]
    first, last = done[0].datetime_start, done[-1].datetime_complete
    if first is None or last is None:
        raise SystemExit("a trial has no time")
    windows = {"first": done[1 : WINDOW + 1], "last": done[-WINDOW:], "all": done[1:]}
    return {
        "trials": len(done),
        "feasible": len(feasible),
        "to_first_trial": (first - begun).total_seconds(),
        "first_trial": done[0].user_attrs["seconds"]["trial"],
        "after_last_trial": wall - (last - begun).total_seconds(),
        **{name: _split(part) for name, part in windows.items()},
    }


def _split(trials: Sequence[FrozenTrial]) -> dict[str, float | None]:
    """Return medians of some consecutive trials: the trial, the sampler, and all else."""
    overheads = []
    for this, following in pairwise(trials):
        if this.datetime_start is None or following.datetime_start is None:
            continue
        period = (following.datetime_start - this.datetime_start).total_seconds()
        sampler = this.user_attrs["seconds_suggest"]
        overheads.append(period - this.user_attrs["seconds"]["trial"] - sampler)
    return {
        "trial": median(trial.user_attrs["seconds"]["trial"] for trial in trials),
        "sampler": median(trial.user_attrs["seconds_suggest"] for trial in trials),
        "overhead": median(overheads) if overheads else None,
    }


def bench(
    *,
    seeds: PositiveInt = 10,
    num_trials: Annotated[int, Parameter(validator=Number(gte=3))] = 30,
    options: Annotated[str, Parameter(allow_leading_hyphen=True)] = "--model tiny",
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Run searches with several seeds and print what they found and where their time went.

    Args:
        seeds: Searches, one a seed.
        num_trials: Trials of a search.
        options: Further options of the search.
        json_file: Write the figures.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            row = one_search(Path(folder), seed, num_trials, options.split())
            figures.append(row)
            whole = row["all"]
            table.add_row(
                str(seed),
                f"{row['wall']:.0f}",
                f"{row['to_first_trial']:.1f}",
                f"{whole['trial']:.2f}",
                f"{whole['sampler']:.2f}",
                f"{whole['overhead'] or 0.0:.2f}",
                f"{row['after_last_trial']:.1f}",
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
        f"{max(row['all']['overhead'] or 0.0 for row in figures):.2f} s a trial (medians)"
    )
    _print_kept(console, figures)
    _print_growth(console, figures[-1])
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def _print_kept(console: Console, figures: Sequence[dict[str, Any]]) -> None:
    """Show how often the best keeps its bounds, and how likely that was said to be."""
    known = [row for row in figures if row["kept_again"] is not None]
    if known:
        said = sum(row["kept_again"] for row in known) / len(known)
        kept = sum(row["kept"] for row in known)
        console.print(
            f"the best keeps its bounds on new questions, as it is said, with probability "
            f"{said:.2f} (mean); where it was confirmed (with --holdout on new ones) it kept them "
            f"in {kept} of {len(known)} searches"
        )


def _print_growth(console: Console, row: dict[str, Any]) -> None:
    """Show how a search's trials and memory changed from its beginning to its end."""
    table = Table("seconds a trial", "first", "last", "ratio", box=None, header_style="bold")
    for part in ("trial", "sampler", "overhead"):
        first, last = row["first"][part] or 0.0, row["last"][part] or 0.0
        ratio = f"{last / first:.2f}" if first else "-"
        table.add_row(part, f"{first:.3f}", f"{last:.3f}", ratio)
    console.print(f"seed {row['seed']}: the first {WINDOW} trials after the first, and the last")
    console.print(table)
    for who, values in row["memory_mib"].items():
        shown = ", ".join(f"{value:.0f}" for value in values)
        console.print(f"memory of the {who} in its second to fourth quarter: {shown} MiB")


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    cyclopts.run(bench)
