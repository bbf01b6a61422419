"""How fast each sampler finds the best setting: replays on recorded surfaces.

Covers: any number of files (`surfaces`, recorded by `bench_real`; by default those in
docs/surfaces), from the files alone; samplers replayed on each with many seeds, one trial at a time
and four at a time, without starting points, over the ranges of the file's axes. A replayed trial
gets the scores of the setting nearest to what was proposed (logarithms where the space is
logarithmic), and the constraint as a search sets it.
A sampler that returns to one setting again and again learns nothing there, which a search, whose
scores change between settings, need not suffer from.
Does not cover: scores between settings, Ray, the journal file (replays keep their study in memory).

    scripts/bench_samplers.py --json FILE
    scripts/bench_samplers.py --grid FILE FILE --samplers gp,random
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import cyclopts
import optuna
from cyclopts.types import PositiveInt
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from rich.console import Console
from rich.table import Table
from surfaces import LOGARITHMIC, NEAR, ROUGE, Surface, judged, optimum_of, read_surface

from lunar_tune.cli.main import reporting_errors
from lunar_tune.config.options import RETAIN_FLOOR, SearchConfig
from lunar_tune.display import build_progress
from lunar_tune.driver.space import LAYER, SAMPLERS
from lunar_tune.errors import InputError, Problems

SURFACES = Path(__file__).resolve().parents[1] / "docs" / "surfaces"
AFTER = (10, 20, 30, 50)  # trials after which the best is looked at
JUDGED = 30  # of them
AT_ONCE = (1, 4)


def distributions_of(surface: Surface) -> dict[str, BaseDistribution]:
    """Return what a sampler may propose: blocks, or a range from an axis' least to its largest."""
    return {
        name: IntDistribution(int(min(values)), int(max(values)))
        if name == LAYER
        else FloatDistribution(
            min(values), max(values), log=name in LOGARITHMIC and len(values) > 1
        )
        for name, values in surface.axes.items()
    }


class Replay(NamedTuple):
    """One sampler with one seed on a surface."""

    told: list[float]
    """Objective of each trial, infinite where it was not feasible."""
    seconds: list[float]
    """Of each suggestion."""

    def best(self, count: int) -> float:
        """Return the best feasible objective of the first trials; infinite without one."""
        return min(self.told[:count])

    def trials_to(self, score: float) -> float:
        """Return after how many trials a score was reached; infinite if it was not."""
        return next((float(n) for n, told in enumerate(self.told, 1) if told <= score), math.inf)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is searched in a replay, and for what."""

    surface: Surface
    floor: float
    goal: str = ROUGE
    count: int = AFTER[-1]
    """Trials."""
    space: Mapping[str, BaseDistribution] | None = None
    """Default: what `distributions_of` says of the surface."""
    starts: Sequence[Mapping[str, Any]] = ()
    """Settings that are tried first."""


def replay(subject: Subject, sampler: optuna.samplers.BaseSampler, at_once: int) -> Replay:
    """Search a surface; `at_once` trials are asked for before any of them is told, in order."""
    study = optuna.create_study(sampler=sampler, direction="minimize")
    for start in subject.starts:
        study.enqueue_trial(dict(start))
    surface = subject.surface
    distributions = dict(subject.space or distributions_of(surface))
    told: list[float] = []
    seconds: list[float] = []
    while len(told) < subject.count:
        trials = []
        for _ in range(min(at_once, subject.count - len(told))):
            start_time = time.perf_counter()
            trials.append(study.ask(distributions))
            seconds.append(time.perf_counter() - start_time)
        told += [tell(study, trial, surface.at(trial.params), subject) for trial in trials]
    return Replay(told, seconds)


def tell(
    study: optuna.Study, trial: optuna.Trial, scores: Mapping[str, Any], subject: Subject
) -> float:
    """Tell a trial as a search does; return its objective, infinite if it is not feasible."""
    if "failure" in scores:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return math.inf
    objective, missed = judged(scores, subject.floor, subject.goal)
    for name, amount in missed.items():
        trial.set_constraint(name, amount)
    study.tell(trial, objective)
    return float(objective) if max(missed.values()) <= 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sampler over all seeds."""

    sampler: str
    at_once: int
    best: dict[int, list[float]]
    """Best feasible forget score of each seed, by number of trials."""
    trials: list[float]
    """Trials until a seed was near the surface's optimum."""
    seconds: float
    """Of a suggestion, median."""

    @property
    def near(self) -> float:
        """Share of seeds that are near the surface's optimum after `JUDGED` trials."""
        return sum(count <= JUDGED for count in self.trials) / len(self.trials)

    def rank(self) -> tuple[float, ...]:
        """Return what decides, smaller is better: seeds near, scores after `JUDGED`, trials."""
        best = self.best[JUDGED]
        return (-self.near, *middle_and_worst(best), *middle_and_worst(self.trials))

    def cells(self) -> list[str]:
        """Return the table's cells."""
        pairs = [middle_and_worst(self.best[count]) for count in AFTER]
        best = [" ".join(f"{x:.3f}".removeprefix("0") for x in pair) for pair in pairs]
        trials = " ".join(f"{count:g}" for count in middle_and_worst(self.trials))
        return [
            self.sampler,
            str(self.at_once),
            *(cell.replace("inf", "none") for cell in (*best, trials)),
            f"{self.near:.0%}",
            f"{self.seconds:.3f}",
        ]


def middle_and_worst(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the largest, rounded."""
    return round(median(values), 3), round(max(values), 3)


def rows_of(
    surface: Surface,
    samplers: Sequence[str],
    *,
    seeds: int,
    floor: float,
    console: Console,
) -> Iterator[Row]:
    """Yield a row for each sampler and number of trials at once."""
    optimum = min(surface.feasible(floor).values())
    subject = Subject(surface=surface, floor=floor)
    with build_progress(console) as bar:
        task = bar.add_task("replaying", total=len(samplers) * len(AT_ONCE) * seeds, note="")
        for name, at_once in product(samplers, AT_ONCE):
            replays = []
            for seed in range(seeds):
                replays.append(replay(subject, SAMPLERS[name](seed), at_once))
                bar.update(task, advance=1, note=f"{name}, {at_once} at once")
            yield Row(
                sampler=name,
                at_once=at_once,
                best={count: [r.best(count) for r in replays] for count in AFTER},
                trials=[r.trials_to(optimum + NEAR) for r in replays],
                seconds=median(second for r in replays for second in r.seconds),
            )


def check_replayable(surface: Surface, floor: float) -> None:
    """Check that a surface is whole, and has something to find, or raise an InputError."""
    missing = len(surface.settings()) - len(surface.points)
    if missing:
        raise InputError(f"{surface.name}: {missing} of its settings are not recorded.")
    if not surface.feasible(floor):
        count = len(surface.points)
        raise InputError(
            f"{surface.name}: none of {count} settings keeps --retain-floor {floor:g}."
        )


def facts_of(surface: Surface, floor: float) -> dict[str, Any]:
    """Return what is to be found on a surface."""
    best = optimum_of(surface, ROUGE, floor, {})
    assert best is not None  # noqa: S101  # checked before
    return {
        "points": len(surface.points),
        "failed": len(surface.points) - len(surface.done),
        "feasible": len(surface.feasible(floor)),
        "near": len(best.near),
        "optimum": {"parameters": surface.parameters(best.setting), **surface.points[best.setting]},
        "floor": floor,
    }


def facts_line(facts: Mapping[str, Any]) -> str:
    """Return a surface in words."""
    best = facts["optimum"]
    setting = ", ".join(f"{name} {value:g}" for name, value in best["parameters"].items())
    return (
        f"{facts['points']} settings, {facts['failed']} failed, {facts['feasible']} feasible "
        f"(retain >= {facts['floor']:g}); optimum forget {best['forget']:.3f} at retain "
        f"{best['retain']:.3f} ({setting}); {facts['near']} feasible settings within {NEAR} of it"
    )


def table_of(rows: Sequence[Row]) -> Table:
    """Return the rows as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in (
        "sampler",
        "at once",
        *(f"after {count}" for count in AFTER),
        "trials",
        "near",
        "s",
    ):
        table.add_column(header, justify="left" if header == "sampler" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    return table


def verdict(rows: Sequence[Row]) -> str:
    """Return which sampler wins, and whether it is the shipped default."""
    default, said, ways = SearchConfig().sampler, [], 0
    for at_once in AT_ONCE:
        group = [row for row in rows if row.at_once == at_once]
        least = min(row.rank() for row in group)
        first = [row.sampler for row in group if row.rank() == least]
        said.append(
            f"{', '.join(first)} {'tie' if len(first) > 1 else 'wins'} at {at_once} at once"
        )
        ways += default in first
    share = ("in neither", "in one of them", "in both")[ways]
    return f"{'; '.join(said)}; the shipped default, {default}, is first {share}"


def figures_of(surface: Surface, facts: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return a surface's figures; None where a seed found nothing."""
    plain = [{**dataclasses.asdict(row), "near": row.near} for row in rows]
    for row in plain:
        row["best"] = {count: _finite(scores) for count, scores in row["best"].items()}
        row["trials"] = _finite(row["trials"])
    return {"surface": dict(surface.about), "grid": dict(facts), "rows": plain}


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def bench(
    *,
    grid: Annotated[list[Path] | None, cyclopts.Parameter(consume_multiple=True)] = None,
    samplers: str = ",".join(SAMPLERS),
    seeds: PositiveInt = 20,
    retain_floor: float = RETAIN_FLOOR,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Replay samplers on recorded surfaces.

    Args:
        grid: Files. Default: those in docs/surfaces that are whole.
        samplers: With commas between.
        seeds: Replays of each.
        retain_floor: Least retain ROUGE-1.
        json_file: Write the figures.
    """
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    names, surfaces, problems = samplers.split(","), list[Surface](), Problems()
    for name in names:
        if name not in SAMPLERS:
            problems.add(f"--samplers {name}: there are {', '.join(SAMPLERS)}.")
    for file in grid or sorted(SURFACES.glob("*.json")):
        with problems.collect():
            surface = read_surface(file)
            if grid is None and len(surface.points) < len(surface.settings()):
                console.print(f"{surface.name}: is not whole, and is left out")
                continue
            check_replayable(surface, retain_floor)
            surfaces.append(surface)
    problems.raise_if_any()
    figures = []
    for surface in surfaces:
        facts = facts_of(surface, retain_floor)
        console.print(f"\n{surface.name}: {facts_line(facts)}")
        rows = list(rows_of(surface, names, seeds=seeds, floor=retain_floor, console=console))
        console.print(table_of(rows))
        console.print(verdict(rows))
        figures.append(figures_of(surface, facts, rows))
    console.print(f"\nafter: best feasible forget ROUGE-1, median and worst of {seeds} seeds")
    console.print(f"trials: until within {NEAR} of the optimum, median and worst seed")
    console.print(f"near: seeds that are there after {JUDGED}; s: seconds of a suggestion, median")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with reporting_errors(debug=False):
        cyclopts.run(bench)
