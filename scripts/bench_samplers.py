"""How fast each sampler finds the best setting: replays on an exhaustively recorded grid.

Covers: one trial a grid point, recorded once into a file (saved point by point, an unfinished file
is gone on with); samplers replayed on it with many seeds, one trial at a time and four at a time,
starting points off. A replayed trial gets the scores of the grid point nearest to what was proposed
(logarithms where the space is logarithmic), and the constraint as a search sets it.
A sampler that returns to one grid point again and again learns nothing there, which a search, whose
scores change between grid points, need not suffer from.
Does not cover: scores between grid points, factual questions, Ray, the journal file (replays keep
their study in memory), two processes that record into one file. A recorded file is used as it is:
delete it when the trial's code or the model has changed.

    scripts/bench_samplers.py --json FILE
    scripts/bench_samplers.py --model FOLDER --data FILE --space tiny --grid FILE
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import cyclopts
import optuna
from cyclopts.types import PositiveInt
from cyclopts.validators import Number
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from rich.console import Console
from rich.table import Table

from lunar_tune.cli.main import reporting_errors
from lunar_tune.config.options import NONE, RETAIN_FLOOR, RunOptions, SearchConfig
from lunar_tune.display import build_progress
from lunar_tune.driver.space import SAMPLERS, Parameter, SearchSpace, numbers_in
from lunar_tune.driver.space_sources import load_space
from lunar_tune.errors import InputError, TrialError
from lunar_tune.files import cache_dir, safe_name
from lunar_tune.models.loading import load_config
from lunar_tune.trial.assemble import assemble, known_depth, materialise
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

AFTER = (10, 20, 30, 50)  # trials after which the best is looked at
JUDGED = 30  # of them; a search's default number of trials
AT_ONCE = (1, 4)
NEAR = 0.02  # from the grid's optimum; forget ROUGE-1
Point = tuple[int | float, ...]


class Axis(NamedTuple):
    """One parameter's values on the grid."""

    name: str
    values: tuple[int | float, ...]
    log: bool

    def nearest(self, value: float) -> int | float:
        """Return the grid's value next to a proposed one."""
        scale: Callable[[float], float] = math.log if self.log else float
        return min(self.values, key=lambda candidate: abs(scale(candidate) - scale(value)))


@dataclass
class Grid:
    """What one trial at each point scored; a view of a file."""

    file: Path
    surface: Mapping[str, str]
    """Model, data and method, as they were asked for."""
    axes: tuple[Axis, ...]
    points: dict[Point, dict[str, Any]] = field(default_factory=dict)
    """`forget` and `retain` ROUGE-1 and `seconds`, or the `failure`."""

    def missing(self) -> list[Point]:
        """Return the points that are not recorded yet."""
        return [p for p in product(*(axis.values for axis in self.axes)) if p not in self.points]

    def at(self, parameters: Mapping[str, float]) -> dict[str, Any]:
        """Return the record of the point nearest to a setting."""
        return self.points[tuple(axis.nearest(parameters[axis.name]) for axis in self.axes)]

    def parameters(self, point: Point) -> dict[str, int | float]:
        """Return a point as a setting."""
        return {axis.name: value for axis, value in zip(self.axes, point, strict=True)}

    def feasible(self, floor: float) -> dict[Point, float]:
        """Return the forget score of each point that keeps the floor."""
        done = {point: scores for point, scores in self.points.items() if "failure" not in scores}
        return {point: s["forget"] for point, s in done.items() if s["retain"] >= floor}

    def read(self) -> None:
        """Take the points of the file, if it exists.

        Raises:
            InputError: It was recorded for something else.
        """
        if not self.file.exists():
            return
        content = json.loads(self.file.read_text(encoding="utf-8"))
        expected = self._header()
        wrong = [
            f"{part}: {content.get(part)}, not {expected[part]}"
            for part in expected
            if content.get(part) != expected[part]
        ]
        if wrong:
            raise InputError(f"--grid {self.file} holds another grid. " + "; ".join(wrong))
        for record in content["points"]:
            parameters = record.pop("parameters")
            self.points[tuple(parameters[axis.name] for axis in self.axes)] = record

    def save(self) -> None:
        """Write the file, whole or not at all."""
        points = [{"parameters": self.parameters(p), **self.points[p]} for p in self.points]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_name(f"{self.file.name}.unfinished")
        text = json.dumps({**self._header(), "points": points}, indent=1)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self.file)

    def _header(self) -> dict[str, Any]:
        axes = {axis.name: list(axis.values) for axis in self.axes}
        return {"surface": dict(self.surface), "axes": axes}


def axis_of(name: str, kind: Parameter, steps: Mapping[str, int]) -> Axis:
    """Return the grid's values of a parameter: all that there are, or evenly spaced ones."""
    if isinstance(kind, FloatDistribution):
        count, low, high = steps[name], kind.low, kind.high
        shares = [index / (count - 1) for index in range(count)]
        if kind.log:
            spaced = [low * (high / low) ** share for share in shares]
        else:
            spaced = [low + (high - low) * share for share in shares]
        return Axis(name, tuple(float(f"{value:.6g}") for value in spaced), kind.log)
    if isinstance(kind, IntDistribution):
        return Axis(name, tuple(range(kind.low, kind.high + 1)), log=False)
    return Axis(name, numbers_in(kind), log=False)


def record(grid: Grid, spec: TrialSpec, console: Console) -> None:
    """Run a trial at each point that is missing, and save the file after each."""
    layers = next(axis.values for axis in grid.axes if axis.name == "layer")
    spec = materialise(spec, console)
    worker = Worker(dataclasses.replace(spec, layers=tuple(map(int, layers))))
    scores = worker.baseline().evaluation.scores  # its answers are the trials' drafts
    console.print(
        f"base model: forget {scores['forget_rouge1']:.3f}, retain {scores['retain_rouge1']:.3f}"
    )
    missing = grid.missing()
    with build_progress(console) as bar:
        task = bar.add_task("recording", total=len(grid.points) + len(missing), note="")
        bar.update(task, completed=len(grid.points))
        for point in missing:
            grid.points[point] = measured(worker, grid.parameters(point))
            grid.save()
            bar.advance(task)


def measured(worker: Worker, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's exact scores and seconds, or why it failed."""
    try:
        result = worker.run(parameters)
    except TrialError as error:
        return {"failure": str(error)}
    scores = result.evaluation.scores
    return {
        "forget": scores["forget_rouge1"],
        "retain": scores["retain_rouge1"],
        "seconds": round(result.seconds["trial"], 3),
    }


class Replay(NamedTuple):
    """One sampler with one seed on a grid."""

    told: list[float]
    """Forget score of each trial, infinite where it was not feasible."""
    seconds: list[float]
    """Of each suggestion."""

    def best(self, count: int) -> float:
        """Return the best feasible forget score of the first trials; infinite without one."""
        return min(self.told[:count])

    def trials_to(self, score: float) -> float:
        """Return after how many trials a score was reached; infinite if it was not."""
        return next((float(n) for n, told in enumerate(self.told, 1) if told <= score), math.inf)


def replay(
    grid: Grid, space: SearchSpace, sampler: optuna.samplers.BaseSampler, at_once: int, floor: float
) -> Replay:
    """Search the grid; `at_once` trials are asked for before any of them is told, in order."""
    study = optuna.create_study(sampler=sampler, direction="minimize")
    distributions: dict[str, BaseDistribution] = dict(space.parameters)
    told: list[float] = []
    seconds: list[float] = []
    while len(told) < AFTER[-1]:
        trials = []
        for _ in range(min(at_once, AFTER[-1] - len(told))):
            start = time.perf_counter()
            trials.append(study.ask(distributions))
            seconds.append(time.perf_counter() - start)
        told += [tell(study, trial, grid.at(trial.params), floor) for trial in trials]
    return Replay(told, seconds)


def tell(
    study: optuna.Study, trial: optuna.Trial, scores: Mapping[str, Any], floor: float
) -> float:
    """Tell a trial as a search does; return its forget score, infinite if it is not feasible."""
    if "failure" in scores:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return math.inf
    trial.set_constraint("retain_rouge1", floor - scores["retain"])
    study.tell(trial, scores["forget"])
    return float(scores["forget"]) if scores["retain"] >= floor else math.inf


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sampler over all seeds."""

    sampler: str
    at_once: int
    best: dict[int, list[float]]
    """Best feasible forget score of each seed, by number of trials."""
    trials: list[float]
    """Trials until a seed was near the grid's optimum."""
    seconds: float
    """Of a suggestion, median."""

    @property
    def near(self) -> float:
        """Share of seeds that are near the grid's optimum after `JUDGED` trials."""
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
    grid: Grid,
    space: SearchSpace,
    samplers: Sequence[str],
    *,
    seeds: int,
    floor: float,
    console: Console,
) -> Iterator[Row]:
    """Yield a row for each sampler and number of trials at once."""
    optimum = min(grid.feasible(floor).values())
    with build_progress(console) as bar:
        task = bar.add_task("replaying", total=len(samplers) * len(AT_ONCE) * seeds, note="")
        for name, at_once in product(samplers, AT_ONCE):
            replays = []
            for seed in range(seeds):
                replays.append(replay(grid, space, SAMPLERS[name](seed), at_once, floor))
                bar.update(task, advance=1, note=f"{name}, {at_once} at once")
            yield Row(
                sampler=name,
                at_once=at_once,
                best={count: [r.best(count) for r in replays] for count in AFTER},
                trials=[r.trials_to(optimum + NEAR) for r in replays],
                seconds=median(second for r in replays for second in r.seconds),
            )


def facts_of(grid: Grid, floor: float) -> dict[str, Any]:
    """Return what is to be found on the grid.

    Raises:
        InputError: Nothing on it keeps the floor.
    """
    feasible = grid.feasible(floor)
    if not feasible:
        raise InputError(f"--retain-floor {floor}: none of {len(grid.points)} points keeps it.")
    best = min(feasible, key=lambda point: feasible[point])
    return {
        "points": len(grid.points),
        "failed": sum("failure" in scores for scores in grid.points.values()),
        "feasible": len(feasible),
        "near": sum(score <= feasible[best] + NEAR for score in feasible.values()),
        "optimum": {"parameters": grid.parameters(best), **grid.points[best]},
        "floor": floor,
    }


def facts_line(facts: Mapping[str, Any]) -> str:
    """Return the grid in words."""
    best = facts["optimum"]
    setting = ", ".join(f"{name} {value:g}" for name, value in best["parameters"].items())
    return (
        f"{facts['points']} points, {facts['failed']} failed, {facts['feasible']} feasible (retain "
        f">= {facts['floor']:g}); optimum forget {best['forget']:.3f} at retain "
        f"{best['retain']:.3f} ({setting}); {facts['near']} feasible points within {NEAR} of it"
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


def figures_of(surface: Mapping[str, str], facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return all figures as JSON; null where a seed found nothing."""
    plain = [{**dataclasses.asdict(row), "near": row.near} for row in rows]
    for row in plain:
        row["best"] = {count: _finite(scores) for count, scores in row["best"].items()}
        row["trials"] = _finite(row["trials"])
    return json.dumps({"surface": dict(surface), "grid": dict(facts), "rows": plain}, indent=1)


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def bench(
    *,
    model: str = "tiny",
    data: str | None = None,
    forget_edge: str = "A_B",
    reference_prompts: str = "unverifiable",
    space: str | None = None,
    solver: str = "adamw",
    samplers: str = ",".join(SAMPLERS),
    seeds: PositiveInt = 20,
    coefficients: Annotated[int, cyclopts.Parameter(validator=Number(gte=2))] = 11,
    learning_rates: Annotated[int, cyclopts.Parameter(validator=Number(gte=2))] = 9,
    retain_floor: float = RETAIN_FLOOR,
    grid_file: Annotated[Path | None, cyclopts.Parameter(name="--grid")] = None,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Replay samplers on a grid, which is recorded first if there is none.

    Args:
        model: A name or a folder.
        data: Default: the model's own.
        forget_edge: Edge to forget.
        reference_prompts: Prompts that the model declines.
        space: Search space; default: the model's.
        solver: adamw, closed_form or lora.
        samplers: With commas between.
        seeds: Replays of each.
        coefficients: Grid values.
        learning_rates: Grid values, also of ridge.
        retain_floor: Least retain ROUGE-1.
        grid_file: Recorded grid.
        json_file: Write the figures.
    """
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    names = samplers.split(",")
    if unknown := [name for name in names if name not in SAMPLERS]:
        raise InputError(f"--samplers {','.join(unknown)}: there are {', '.join(SAMPLERS)}.")
    options = RunOptions(
        model=model,
        data=data,
        forget_edge=(forget_edge,),
        factual_data=NONE,
        reference_prompts=reference_prompts,
        solver=solver,
        max_new_tokens=None,  # as a search's trials
    )
    spec = assemble(options)
    spec = dataclasses.replace(spec, early_exit=True)
    searched = space_of(options, spec, space)
    steps = {"coefficient": coefficients, "learning_rate": learning_rates, "ridge": learning_rates}
    grid = grid_of(options, spec, searched, steps, grid_file)
    grid.read()
    if grid.missing():
        record(grid, spec, console)
    facts = facts_of(grid, retain_floor)
    console.print(f"{', '.join(grid.surface.values())}: {facts_line(facts)}")
    rows = list(rows_of(grid, searched, names, seeds=seeds, floor=retain_floor, console=console))
    console.print(table_of(rows))
    console.print(f"after: best feasible forget ROUGE-1, median and worst of {seeds} seeds")
    console.print(f"trials: until within {NEAR} of the optimum, median and worst seed")
    console.print(f"near: seeds that are there after {JUDGED}; s: seconds of a suggestion, median")
    console.print(verdict(rows))
    if json_file is not None:
        json_file.write_text(figures_of(grid.surface, facts, rows) + "\n", encoding="utf-8")


def space_of(options: RunOptions, spec: TrialSpec, space: str | None) -> SearchSpace:
    """Return what a search with these options would search."""
    n_layers = known_depth(options) or load_config(spec.model).num_hidden_layers
    return load_space(space, spec.method, model_name=spec.model.name, n_layers=n_layers)


def grid_of(
    options: RunOptions,
    spec: TrialSpec,
    space: SearchSpace,
    steps: Mapping[str, int],
    file: Path | None,
) -> Grid:
    """Return the grid over a space, empty; its file is in the user's cache if none is named."""
    axes = tuple(axis_of(name, kind, steps) for name, kind in space.parameters.items())
    surface = {
        "model": options.model,
        "data": options.data or spec.data.name,
        "forget_edge": ",".join(options.forget_edge),
        "reference_prompts": options.reference_prompts,
        "solver": spec.method.variant,
    }
    name = safe_name("-".join([*surface.values(), *(str(len(axis.values)) for axis in axes)]))
    return Grid(file or cache_dir() / "grids" / f"{name}.json", surface, axes)


if __name__ == "__main__":
    with reporting_errors(debug=False):
        cyclopts.run(bench)
