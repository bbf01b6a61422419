"""What unlearning does to a real language model, on data that it knows: the yardstick of defaults.

Covers: `trial`, one setting of each solver by the page of `lunar_tune.reference` and by the engine,
in float32 and in bfloat16: seconds, rows whose answers differ, scores; `record`, the surface of a
solver over blocks, coefficients and rates, gone on with where it was left, by any number of
processes; `findings`, what recorded surfaces say of the default search space and of each parameter;
`defaults`, what a search without options finds on them in how many seeds.
Does not cover: whole searches (`bench_search`), other samplers and numbers of trials on the
surfaces (`bench_samplers`), what answers of 512 tokens cost (`bench_trial`).

    scripts/bench_real.py trial --json FILE
    scripts/bench_real.py record --solver closed_form --save docs/surfaces/NAME.json
    scripts/bench_real.py findings docs/surfaces/*.json
    scripts/bench_real.py defaults docs/surfaces/NAME.json
"""

from __future__ import annotations

import dataclasses
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import bench_samplers as replaying
import cyclopts
from cyclopts import Parameter
from cyclopts.types import PositiveInt
from recorder import record as record_answers
from recorder import recorded
from rich.console import Console
from rich.table import Table
from surfaces import DECLINING, NEAR, ROUGE, Setting, Surface, findings_of, read_surface

from lunar_tune.cli.main import reporting_errors
from lunar_tune.config.options import RETAIN_FLOOR, RunOptions, SearchConfig, read_assignments
from lunar_tune.driver.space import SearchSpace, bounds_of
from lunar_tune.driver.space_sources import load_space
from lunar_tune.errors import InputError
from lunar_tune.files import cache_dir, safe_name, write_json
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.models.device import limit_threads
from lunar_tune.models.loading import load_config, load_model
from lunar_tune.study.rows import LAYER
from lunar_tune.trial.assemble import answered, assemble, configured, materialise
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import TrialResult, Worker

MODEL = "smollm2-135m"
SETTINGS = (
    "layer=12,coefficient=3,learning_rate=0.01",
    "layer=17,coefficient=2.07,ridge=0.01",
)
OWN = {"learning_rate": "adamw", "ridge": "closed_form"}
PAGE, FULL, HALF = "page, float32", "engine, float32", "engine, bfloat16"
CLOSE = 0.05  # to a surface's optimum: what a search is to find
SHOWN = 10  # rows that differ; all of them are in the figures
BEFORE = 1.2  # a warm trial follows one with so many times its coefficient
GRIDS: Mapping[str, Mapping[str, Setting]] = {  # the first values are recorded first
    "closed_form": {"coefficient": (2.3, 1.2, 1.7, 3.0, 0.8, 4.0), "ridge": (0.01,)},
    "adamw": {"coefficient": (2.3, 1.2, 1.7, 4.0), "learning_rate": (0.01, 0.003, 0.001)},
}
BLOCKS_APART = {"closed_form": 1, "adamw": 2}

app = cyclopts.App(help=__doc__)
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """Model and data, as in a search."""

    model: str = MODEL
    """Name, hub id or folder."""
    data: str | None = None
    """Default: the model's own."""
    forget_edge: tuple[str, ...] = ()
    """Default: the data's own."""
    reference_prompts: str | None = None
    """Prompts that the model declines. Default: as in a search."""
    threads: PositiveInt = 1
    """Of torch."""

    def spec(self, solver: str, **further: Any) -> TrialSpec:
        """Return what a worker needs."""
        limit_threads(self.threads)
        if self.reference_prompts is not None:
            further["reference_prompts"] = self.reference_prompts
        options = RunOptions(
            model=self.model,
            data=self.data,
            forget_edge=self.forget_edge,
            factual_data="none",
            solver=solver,
            dtype="float32",
            max_new_tokens=None,
            **further,
        )
        return materialise(answered(options, assemble(options)), console)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One setting, run in one way."""

    way: str
    seconds: float
    cpu_seconds: float
    result: TrialResult
    base: TrialResult | None = None
    """The base model's evaluation, once per worker; the page has none."""
    first: float | None = None
    """Seconds of a worker's first trial, with its captures."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Scores by name."""
        return self.result.evaluation.scores


@app.command
def trial(
    subject: Subject | None = None,
    *,
    settings: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = SETTINGS,
    ways: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (PAGE, FULL, HALF),
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Run a setting of each solver by the page and by the engine, in two number formats.

    Args:
        subject: Model and data.
        settings: Each NAME=VALUE with commas between; learning_rate or ridge tells the solver.
        ways: To leave some out; the engine in float32 is what the others are held against.
        json_file: Write the figures.
    """
    subject = subject or Subject()
    if unknown := [way for way in ways if way not in (PAGE, FULL, HALF)]:
        raise InputError(f"--ways {unknown[0]!r}: there are {PAGE!r}, {FULL!r}, {HALF!r}.")
    figures = []
    for text in settings:
        setting = read_assignments(tuple(text.split(",")))
        runs = list(runs_of(subject, setting, ways))
        console.print(f"\n{text}", table_of(runs), sep="\n")
        figures.append({"setting": setting, "runs": [plain(run, runs) for run in runs]})
        for run in runs:
            print_differences(run, runs)
    machine = {"processor": processor(), "threads": subject.threads, "date": time.strftime("%F")}
    if json_file is not None:
        write_json(json_file, {"machine": machine, "model": subject.model, "trials": figures})


def runs_of(subject: Subject, setting: Mapping[str, Any], ways: Sequence[str]) -> Iterator[Run]:
    """Run a setting in each way."""
    own = [OWN[name] for name in setting if name in OWN]
    if len(own) != 1:
        raise InputError(f"--settings {dict(setting)}: one of {', '.join(OWN)} is needed.")
    for way in (FULL, HALF, PAGE):
        if way not in ways:
            continue
        spec = subject.spec(own[0], engine="reference" if way == PAGE else "fast")
        # In either format the questions and true answers of float32: each knows other ones.
        model = dataclasses.replace(spec.model, dtype="bfloat16" if way == HALF else "float32")
        spec = dataclasses.replace(spec, layers=(setting[LAYER],), model=model)
        console.print(f"{way}: {dict(setting)}")
        with tempfile.TemporaryDirectory() as folder:
            worker = Worker(spec, load_model(spec.model, spec.chat), cache_root=Path(folder))
            limit_threads(subject.threads)
            base = first = None
            if way != PAGE:
                base = worker.baseline()
                before = {**setting, "coefficient": BEFORE * setting["coefficient"]}
                first = worker.run(before, bounded=False).seconds["trial"]
            start = time.process_time()
            result = worker.run(setting, bounded=False)
            yield Run(
                way=way,
                seconds=result.seconds["trial"],
                cpu_seconds=time.process_time() - start,
                result=result,
                base=base,
                first=first,
            )


def differing(run: Run, other: Run, *, base: bool = False) -> list[tuple[AnswerRow, AnswerRow]]:
    """Return the rows to which two ways have other answers, of the unlearned or the base model."""
    one, two = (each.base if base else each.result for each in (run, other))
    if one is None or two is None:
        return []
    pairs = zip(one.evaluation.rows, two.evaluation.rows, strict=True)
    return [(mine, theirs) for mine, theirs in pairs if mine.answer != theirs.answer]


def table_of(runs: Sequence[Run]) -> Table:
    """Return seconds, scores and the rows that differ from the engine's in float32."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    headers = ("way", "s", "CPU s", "first, s", "base, s", "forget", "retain", "rows that differ")
    for header in headers:
        table.add_column(header, justify="left" if header == "way" else "right", no_wrap=True)
    for run in runs:
        other = next((one for one in runs if one.way == FULL), run)
        base = run.base.seconds["trial"] if run.base else None
        numbers = (run.seconds, run.cpu_seconds, run.first, base)
        table.add_row(
            run.way,
            *("-" if number is None else f"{number:.1f}" for number in numbers),
            *(f"{run.scores[name]:.3f}" for name in ("forget_rouge1", "retain_rouge1")),
            f"{len(differing(run, other))} of {len(run.result.evaluation.rows)}",
        )
    return table


def plain(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """Return a run's figures; ratios and differences are with the engine in float32."""
    other = next((one for one in runs if one.way == FULL), run)
    return {
        "way": run.way,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "stages": dict(run.result.seconds),
        "first": run.first,
        "base_model": run.base.seconds["trial"] if run.base else None,
        "ratio": run.seconds / other.seconds,
        "cpu_ratio": run.cpu_seconds / other.cpu_seconds,
        "max_new_tokens": run.result.max_new_tokens,
        "scores": dict(run.scores),
        "rows": len(run.result.evaluation.rows),
        "base_rows_that_differ": len(differing(run, other, base=True)),
        "rows_that_differ": [
            {
                "set": mine.set_name,
                "row": mine.row,
                "question": mine.question,
                run.way: mine.answer,
                other.way: theirs.answer,
            }
            for mine, theirs in differing(run, other)
        ],
    }


def print_differences(run: Run, runs: Sequence[Run]) -> None:
    """Print a way's ratio to the engine in float32, and the first answers that differ."""
    other = next((one for one in runs if one.way == FULL), run)
    if run is other:
        return
    rows = differing(run, other)
    console.print(
        f"\n{run.way}: {run.seconds / other.seconds:.2f} times the seconds of {other.way}, "
        f"{run.cpu_seconds / other.cpu_seconds:.2f} times its CPU; base model: "
        f"{len(differing(run, other, base=True))} rows differ; unlearned: {len(rows)}"
    )
    for mine, theirs in rows[:SHOWN]:
        console.print(f"  {mine.set_name} {mine.row} {mine.question}", markup=False)
        console.print(f"    {run.way}: {mine.answer!r}", markup=False)
        console.print(f"    {other.way}: {theirs.answer!r}", markup=False)


def processor() -> str:
    """Return the processor's name where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@app.command
def record(
    subject: Subject | None = None,
    *,
    solver: str = "closed_form",
    values: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    answers: Path | None = None,
    save: Path | None = None,
    rescore: bool = False,
) -> None:
    """Record the surface of a solver; started again, or several times, it goes on.

    Args:
        subject: Model and data.
        solver: closed_form or adamw.
        values: Of a parameter: NAME=VALUE,VALUE. Default: see the page.
        answers: Folder of the answers. Default: in the user's cache.
        save: Write the surface, without the answers.
        rescore: Score the answers that are there, and record none.
    """
    subject = subject or Subject()
    if solver not in GRIDS:
        raise InputError(f"--solver {solver}: there are {', '.join(GRIDS)}.")
    name = safe_name(f"{Path(subject.model).name}-{solver}")
    folder = answers or cache_dir() / "surfaces" / name
    if not rescore:
        spec = subject.spec(solver)
        given = dict(axis_of(text) for text in values)
        n_layers = load_config(spec.model).num_hidden_layers
        blocks = tuple(range(BLOCKS_APART[solver] - 1, n_layers, BLOCKS_APART[solver]))
        folder.mkdir(parents=True, exist_ok=True)
        record_answers(spec, {LAYER: blocks, **GRIDS[solver], **given}, folder, console)
    surface = recorded(folder)
    console.print(f"{len(surface.points)} of {len(surface.settings())} settings in {folder}")
    if save is not None:
        surface.save(save)


def axis_of(text: str) -> tuple[str, Setting]:
    """Return `NAME=VALUE,VALUE` as a parameter and its values, or raise an InputError."""
    name, _, values = text.partition("=")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError as error:
        raise InputError(f"--values {text}: write NAME=VALUE,VALUE with numbers.") from error
    return name, tuple(int(number) if name == LAYER else number for number in numbers)


@app.command
def findings(
    *files: Path,
    retain_floor: float = RETAIN_FLOOR,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Say what surfaces say: optima, what the default space holds of them, what each axis does.

    Args:
        files: Recorded surfaces.
        retain_floor: Least retain ROUGE-1.
        json_file: Write the figures.
    """
    documents = []
    for surface in [read_surface(file) for file in files]:
        kinds = default_space(surface).parameters
        space = {name: bounds_of(kind) for name, kind in kinds.items()}
        found = findings_of(surface, space, retain_floor)
        print_findings(found)
        documents.append(found)
    if json_file is not None:
        write_json(json_file, documents)


def default_space(surface: Surface) -> SearchSpace:
    """Return the shipped default space for a surface's model and solver."""
    method, _ = configured(RunOptions(solver=surface.about["solver"]))
    return load_space(None, method, model_name="", n_layers=surface.blocks)


def print_findings(found: Mapping[str, Any]) -> None:
    """Print what a surface says."""
    console.print(
        f"\n{found['surface']}: {found['settings']} of {found['grid']} settings, {found['failed']} "
        f"failed, {found['feasible']:.0%} of the others feasible (retain >= {found['floor']:g})"
    )
    for goal, best in found["goals"].items():
        if best is None:
            console.print(f"  {goal}: nothing is feasible, or it was not recorded")
            continue
        console.print(f"  {goal}: {in_words(best['optimum'])}")
        console.print(
            f"    {len(best['near'])} settings within {NEAR} of it, {best['near_in_space']} "
            f"of them in the default space, whose best is {in_words(best['best_in_space'])}"
        )
        for one in best["near"]:
            console.print(f"      {in_words(one)}")
    for name, axis in found["axes"].items():
        best = (
            f"{value:g} {'-' if score is None else f'{score:.3f}'}"
            for value, score in axis["best"].items()
        )
        console.print(
            f"  {name}, the others held: forget goes by {axis['forget']:.3f}, retain by "
            f"{axis['retain']:.3f}; best feasible forget with each value: {', '.join(best)}"
        )


@app.command
def defaults(
    *files: Path,
    seeds: PositiveInt = 50,
    num_trials: PositiveInt = SearchConfig.num_trials,
    retain_floor: float = RETAIN_FLOOR,
) -> None:
    """Search surfaces as a search does: default space, sampler, trials; with its starts or without.

    What is between the settings of a surface counts as its neighbours say.

    Args:
        files: Recorded surfaces.
        seeds: Searches of each.
        num_trials: Trials of a search.
        retain_floor: Least retain ROUGE-1.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    headers = (
        "surface",
        "goal",
        "starts",
        "optimum",
        "median",
        "worst",
        f"within {CLOSE}",
        "found",
    )
    for header in headers:
        table.add_column(header, justify="left" if header in headers[:3] else "right")
    for surface in [read_surface(file) for file in files]:
        replaying.check_replayable(surface, retain_floor)
        space = default_space(surface)
        for goal, starts in product((ROUGE, DECLINING), (space.starting_points, ())):
            subject = replaying.Subject(
                surface=surface,
                floor=retain_floor,
                goal=goal,
                count=num_trials,
                space=space.parameters,
                starts=starts,
            )
            name, optimum = SearchConfig.sampler, surface.least(retain_floor, goal)
            best = [min(replaying.replay(subject, name, seed, 1)) for seed in range(seeds)]
            table.add_row(
                surface.name,
                goal,
                str(len(starts)),
                *(f"{score:.3f}" for score in (optimum, median(best), max(best))),
                f"{sum(score <= optimum + CLOSE for score in best) / seeds:.0%}",
                f"{sum(map(math.isfinite, best)) / seeds:.0%}",
            )
    console.print(table)


def in_words(point: Mapping[str, Any] | None) -> str:
    """Return a setting with its scores."""
    if point is None:
        return "nothing"
    setting = ", ".join(f"{name} {value:g}" for name, value in point["parameters"].items())
    refused = ""
    if "forget_refused" in point:
        refused = (
            f", whole {point['forget_whole']:.3f}: {point['forget_refused']:.0%} decline, "
            f"{point['forget_degenerate']:.0%} degenerate"
        )
    return (
        f"{setting} (depth {point['depth']:.2f}): forget {point['forget']:.3f}, retain "
        f"{point['retain']:.3f}{refused}"
    )


if __name__ == "__main__":
    with reporting_errors(debug=False):
        app()
