"""How fast each sampler finds the best setting: replays on recorded surfaces.

Covers: any number of files (`surfaces`, recorded by `bench_real`; by default those in
docs/surfaces), from the files alone; samplers replayed on each with many seeds, one, two and four
trials at a time, without starting points, over the ranges of the file's axes. A replayed trial gets
the scores that lie between its neighbours, and the constraint as a search sets it. The regret is
the best feasible forget ROUGE-1 so far less the optimum, which is looked for between settings, too.
A trial costs 1, whatever its seconds. With --stops, one at a time: when a search ends by itself
for the first line of its goal, whether what it says is true, and what it missed.
Does not cover: Ray, the journal file (replays keep their study in memory).

    scripts/bench_samplers.py --json FILE            # what FILE has already is not run again
    scripts/bench_samplers.py --grid FILE FILE --samplers gp,random
    scripts/bench_samplers.py --stops --samplers frontier
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import cyclopts
import numpy as np
import optuna
from cyclopts.types import PositiveInt
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from rich.console import Console
from rich.table import Table
from scipy.stats import norm
from surfaces import FAILURE, LOGARITHMIC, NEAR, ROUGE, Surface, judged, optimum_of, read_surface

from lunar_tune.cli.main import reporting_errors
from lunar_tune.config.options import RETAIN_FLOOR, SearchConfig
from lunar_tune.display import build_progress
from lunar_tune.driver.samplers import SAMPLERS, STARTUP_TRIALS, sampler_at
from lunar_tune.driver.space import middle_of, nearest_of
from lunar_tune.driver.stopping import GAIN, Outlook
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import write_json
from lunar_tune.metrics.goal import Goal
from lunar_tune.study.new_questions import kept_again
from lunar_tune.study.rows import LAYER
from lunar_tune.study.study import EARLIER, Told

SURFACES = Path(__file__).resolve().parents[1] / "docs" / "surfaces"
COSTS = (5, 8, 12, 20, 30)  # in trials, after which the best is looked at
AT_ONCE = (1, 2, 4)
MANY = 100  # trials, after which a suggestion is timed
AFTER, NEARLY = (3, 12), 0.05  # trials of a search that starts from another, and its regret
NOISE, SHARED = 0.02, (0.0, 0.5, 1.0)  # of retain scores, and how much all settings share of it
MOST = 60  # trials of a search that ends by itself


def _botorch(seed: int) -> optuna.samplers.BaseSampler:
    from optuna_integration import BoTorchSampler

    made: optuna.samplers.BaseSampler = BoTorchSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
    return made


class AxSampler(optuna.samplers.BaseSampler):
    """Ax's own choice of a BoTorch model, with outcome constraints, after as many random trials."""

    def __init__(self, seed: int) -> None:
        from ax.api.client import Client

        self._client = Client(random_seed=seed)
        self._random = optuna.samplers.RandomSampler(seed)

    def infer_relative_search_space(
        self, study: optuna.Study, _: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters of earlier trials, as soon as there are enough."""
        told = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        return {} if len(told) < STARTUP_TRIALS else dict(told[0].distributions)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Tell Ax every trial, running ones without scores, and ask it for one."""
        from ax.api.configs import RangeParameterConfig

        searched = {name: kind for name, kind in search_space.items() if not kind.single()}
        if not searched:
            return {}
        kinds: list[Any] = [
            RangeParameterConfig(
                name=name,
                bounds=(kind.low, kind.high),
                parameter_type="int" if isinstance(kind, IntDistribution) else "float",
                scaling="log" if kind.log else "linear",
            )
            for name, kind in searched.items()
            if isinstance(kind, IntDistribution | FloatDistribution)
        ]
        client = self._client
        client.configure_experiment(parameters=kinds)
        client.configure_optimization(objective="-forget", outcome_constraints=["missed <= 0"])
        client.configure_generation_strategy(
            method="fast", initialization_budget=0, initialize_with_center=False
        )
        for one in study.get_trials(deepcopy=False):
            if one.number == trial.number or not searched.keys() <= one.params.keys():
                continue
            number = client.attach_trial({name: one.params[name] for name in searched})
            if one.state == optuna.trial.TrialState.COMPLETE and one.value is not None:
                missed = max(one.constraints.values())
                client.complete_trial(number, raw_data={"forget": one.value, "missed": missed})
        (found,) = client.get_next_trials(max_trials=1).values()
        return dict(found)

    def sample_independent(self, *about: Any) -> Any:
        """Return a random value."""
        return self._random.sample_independent(*about)


RIVALS: Mapping[str, tuple[str, Callable[[int], optuna.samplers.BaseSampler]]] = {
    "botorch": ("optuna-integration botorch", _botorch),
    "ax": ("ax-platform", AxSampler),
}
"""Samplers that the project does not ship: what to install, and how to make one of a seed."""


def maker_of(name: str) -> Callable[[int], optuna.samplers.BaseSampler]:
    """Return what makes a sampler of a seed, or raise an InputError."""
    if name not in RIVALS:
        return SAMPLERS[name]
    packages, make = RIVALS[name]
    try:
        make(0)
    except ImportError as error:
        raise InputError(f"--samplers {name}: needs {packages} ({error}).") from error
    return make


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


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is searched in a replay, and for what."""

    surface: Surface
    floor: float
    goal: str = ROUGE
    count: int = COSTS[-1]
    """Trials."""
    space: Mapping[str, BaseDistribution] | None = None
    """Default: what `distributions_of` says of the surface."""
    starts: Sequence[Mapping[str, Any]] = ()
    """Settings that are tried first."""
    earlier: Sequence[Told] = ()
    """What searches of other surfaces were told."""

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What a sampler may propose."""
        return dict(self.space or distributions_of(self.surface))


def replay(subject: Subject, name: str, seed: int, at_once: int) -> list[float]:
    """Search a surface; return each trial's objective, infinite where it was not feasible."""
    return [objective for _, objective in settings_of(subject, name, seed, at_once)]


def settings_of(
    subject: Subject, name: str, seed: int, at_once: int
) -> list[tuple[Mapping[str, Any], float]]:
    """Search a surface; return each trial's setting and objective as `replay` does.

    `at_once` trials are asked for before any of them is told, in order.
    """
    study, make = study_of(subject), maker_of(name)
    told: list[tuple[Mapping[str, Any], float]] = []
    while len(told) < subject.count:
        trials = []
        for begun in range(len(told), min(len(told) + at_once, subject.count)):
            study.sampler = sampler_at(make, seed, begun)
            trials.append(study.ask(subject.distributions))
        for trial in trials:
            scores = subject.surface.at(trial.params)
            told.append((trial.params, tell(study, trial, scores, subject)))
    return told


def study_of(subject: Subject) -> optuna.Study:
    """Return a study that begins as a search does."""
    study = optuna.create_study(direction="minimize")
    study.set_user_attr(EARLIER, [dataclasses.asdict(one) for one in subject.earlier])
    for start in subject.starts:
        study.enqueue_trial(dict(start))
    return study


def tell(
    study: optuna.Study, trial: optuna.Trial, scores: Mapping[str, Any], subject: Subject
) -> float:
    """Tell a trial as a search does; return its objective, infinite if it is not feasible."""
    if FAILURE in scores:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return math.inf
    objective, missed = judged(scores, subject.floor, subject.goal)
    for name, amount in missed.items():
        trial.set_constraint(name, amount)
    study.tell(trial, objective)
    return float(objective) if max(missed.values()) <= 0 else math.inf


def seconds_of(subject: Subject, name: str) -> float:
    """Return the seconds of a suggestion after `MANY` trials that were drawn at random."""
    study = optuna.create_study(sampler=SAMPLERS["random"](0), direction="minimize")
    for _ in range(MANY):
        trial = study.ask(subject.distributions)
        tell(study, trial, subject.surface.at(trial.params), subject)
    taken = []
    for _ in range(3):
        study.sampler = sampler_at(maker_of(name), 0, MANY)
        start = time.perf_counter()
        study.ask(subject.distributions)
        taken.append(time.perf_counter() - start)
    return median(taken)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sampler over all seeds."""

    sampler: str
    at_once: int
    regret: Mapping[str, Mapping[str, float | None]]
    """By cost: median and 95th percentile (None where nothing feasible was found), shares of seeds
    within `NEAR` of the optimum and without anything feasible."""
    suggestion_s: float
    """Seconds of a suggestion after `MANY` trials."""

    def cells(self) -> list[str]:
        """Return the table's cells."""

        def shown(number: float | None) -> str:
            return "none" if number is None else f"{number:.3f}".removeprefix("0")

        regrets = (
            f"{shown(one['median'])} {shown(one['p95'])} {one['near']:4.0%}"
            for one in self.regret.values()
        )
        return [self.sampler, str(self.at_once), *regrets, f"{self.suggestion_s:.2f}"]


def row_of(
    sampler: str, at_once: int, replays: Sequence[Sequence[float]], optimum: float, seconds: float
) -> Row:
    """Return what one sampler's seeds found, by cost."""
    regret = {}
    for cost in COSTS:
        regrets = np.array([min(told[:cost]) - optimum for told in replays])
        # The next higher seed: half of what is infinite is no number.
        middle, high = np.quantile(regrets, (0.5, 0.95), method="higher")
        regret[str(cost)] = {
            "median": _finite(middle),
            "p95": _finite(high),
            "near": float(np.mean(regrets <= NEAR)),
            "none": float(np.mean(np.isinf(regrets))),
        }
    return Row(sampler=sampler, at_once=at_once, regret=regret, suggestion_s=seconds)


def _finite(number: float) -> float | None:
    return round(float(number), 4) if math.isfinite(number) else None


def rows_of(
    subject: Subject,
    samplers: Sequence[str],
    *,
    at_once: Sequence[int],
    seeds: int,
    processes: int,
    known: Sequence[Row],
    console: Console,
) -> Iterator[Row]:
    """Yield a row for each sampler and number of trials at once; what is known is not run."""
    optimum = subject.surface.least(subject.floor, subject.goal)
    rows = {(row.sampler, row.at_once): row for row in known}
    ways = [*product(samplers, at_once)]
    # Of a process that knows nothing of this one's threads.
    context = multiprocessing.get_context("spawn")
    with build_progress(console) as bar, ProcessPoolExecutor(processes, context) as pool:
        task = bar.add_task("replaying", total=len(ways) * seeds, note="")
        for name, count in ways:
            if (name, count) in rows:
                yield rows[name, count]
                continue
            replays = []
            ask = partial(replay_alone, subject, name, count)
            for told in pool.map(ask, range(seeds)):
                replays.append(told)
                bar.update(task, advance=1, note=f"{name}, {count} at once")
            seconds = pool.submit(seconds_of, subject, name).result()
            yield row_of(name, count, replays, optimum, seconds)


def replay_alone(subject: Subject, name: str, at_once: int, seed: int) -> list[float]:
    """Replay in a process that is one of several."""
    import torch

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return replay(subject, name, seed, at_once)


def ended_alone(subject: Subject, name: str, seed: int) -> tuple[int, float]:
    """Search until it is enough; return the trials, and the least feasible objective."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    goal = Goal.read("forget_rouge1", [f"retain_rouge1>={subject.floor}"])
    space = subject.distributions
    outlook = Outlook(goal=goal, space=space, seed=seed, earlier=subject.earlier)
    study, make, told = study_of(subject), maker_of(name), list[float]()
    with threadpool_limits(1):
        while len(told) < MOST and not outlook.is_enough(Told.of(study)):
            study.sampler = sampler_at(make, seed, len(told))
            trial = study.ask(space)
            told.append(tell(study, trial, subject.surface.at(trial.params), subject))
    return len(told), min(told)


def print_stops(
    subject: Subject, samplers: Sequence[str], *, seeds: int, processes: int, console: Console
) -> None:
    """Show when searches end, and whether it is true that nothing more was to gain."""
    optimum = subject.surface.least(subject.floor, subject.goal)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("sampler", "trials, median, least, most", "by itself", "true", "regret"):
        table.add_column(header)
    context = multiprocessing.get_context("spawn")
    with build_progress(console) as bar, ProcessPoolExecutor(processes, context) as pool:
        task = bar.add_task("replaying", total=len(samplers) * seeds, note="")
        for name in samplers:
            found = []
            for one in pool.map(partial(ended_alone, subject, name), range(seeds)):
                found.append(one)
                bar.update(task, advance=1, note=name)
            counts = np.array([count for count, _ in found])
            regrets = np.array([least for _, least in found])[counts < MOST] - optimum
            table.add_row(
                name,
                f"{np.median(counts):.0f}, {counts.min()}, {counts.max()}",
                f"{len(regrets) / seeds:.0%}",
                *_ended(regrets),
            )
    console.print(table)


def told_elsewhere(sources: Sequence[Subject], target: Subject, name: str, seed: int) -> list[Told]:
    """Return what searches of the usual number of trials are told on other surfaces.

    In the parameters of the target: one that a surface does not have is in the middle.
    """
    kinds = target.distributions
    usual = {one: middle_of(kind) for one, kind in kinds.items()}  # type: ignore[arg-type]
    told = []
    for number, source in enumerate(sources, 1):
        for setting, _ in settings_of(source, name, seed, 1):
            value, missed = judged(source.surface.at(setting), source.floor, source.goal)
            shared = {one: setting[one] for one in kinds if one in setting}
            told.append(Told(usual | shared, float(value), missed, search=number))
    return told


def started(
    sources: Sequence[Subject], subject: Subject, name: str, seed: int
) -> tuple[list[float], list[float], tuple[int, float]]:
    """Search a surface from what was found on others, and from nothing; and until it is enough."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    earlier = told_elsewhere(sources, subject, name, seed)
    kinds: Mapping[str, Any] = subject.distributions
    best: dict[int, Told] = {}
    for one in sorted(earlier, key=lambda one: one.value):
        if one.is_feasible:
            best.setdefault(one.search, one)
    starts = [
        {name: nearest_of(kinds[name], value) for name, value in best[search].parameters.items()}
        for search in sorted(best)
    ]
    warm = dataclasses.replace(subject, starts=starts, earlier=earlier, count=AFTER[-1])
    cold = dataclasses.replace(subject, count=AFTER[-1])
    return replay(warm, name, seed, 1), replay(cold, name, seed, 1), ended_alone(warm, name, seed)


def print_starts(
    surfaces: Sequence[Surface], floor: float, name: str, *, seeds: int, processes: int
) -> Table:
    """Return a table of searches that start from those of other surfaces of the same model."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    compared = (f"{how} {n}" for n in AFTER for how in ("from", "cold"))
    for header in ("surface", "from", *compared, "ends after", "regret"):
        table.add_column(header)
    context = multiprocessing.get_context("spawn")
    usual = SearchConfig.num_trials
    with ProcessPoolExecutor(processes, context) as pool:
        for one in surfaces:
            others = [
                other
                for other in surfaces
                if other is not one and other.about["model"] == one.about["model"]
            ]
            alone = [[other] for other in others]
            for chosen in [*alone, *([others] if len(others) > 1 else ())]:
                sources = [Subject(surface=each, floor=floor, count=usual) for each in chosen]
                ask = partial(started, sources, Subject(surface=one, floor=floor), name)
                *searched, ended = zip(*pool.map(ask, range(seeds)), strict=True)
                found, cells = np.array(searched) - one.least(floor), []
                for after in AFTER:
                    for regrets in found[:, :, :after].min(axis=2):
                        middle = np.quantile(regrets, 0.5, method="higher")
                        cells.append(f"{middle:.3f} {np.mean(regrets <= NEARLY):4.0%}")
                counts, least = np.array(ended).T
                cells += [f"{np.median(counts):.0f}", f"{least.max() - one.least(floor):.4f}"]
                table.add_row(one.name, ", ".join(each.name for each in chosen) or "-", *cells)
    return table


def kept_on_new(
    subject: Subject, name: str, shared: float, seed: int
) -> tuple[float, float] | None:
    """Return how likely it is said that the best keeps the floor on new questions, and is.

    Retain scores of the questions that it is judged on scatter by `NOISE` around the surface's, of
    the variance a part `shared` by all settings; those of as many new questions, too.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    random = np.random.default_rng(seed)
    common = random.normal(0, NOISE * shared**0.5)
    study, make, true = optuna.create_study(), maker_of(name), dict[int, float]()
    for number in range(SearchConfig.num_trials):
        study.sampler = sampler_at(make, seed, number)
        trial = study.ask(subject.distributions)
        scores = dict(subject.surface.at(trial.params))
        true[number] = scores["retain"]
        own = random.normal(0, NOISE * (1 - shared) ** 0.5)
        tell(study, trial, scores | {"retain": scores["retain"] + common + own}, subject)
    told = [
        dataclasses.replace(one, bound_errors=dict.fromkeys(one.missed, NOISE))
        for one in Told.of(study)
    ]
    feasible = [(one.value, place) for place, one in enumerate(told) if one.is_feasible]
    if not feasible:
        return None
    best = min(feasible)[1]
    said = kept_again(subject.distributions, told)
    # The questions that it was judged on are no part of the new ones.
    kept = float(norm.sf(subject.floor, true[best], NOISE))
    return (said[best], kept) if said is not None else None


def print_kept(subjects: Sequence[Subject], name: str, *, seeds: int, processes: int) -> Table:
    """Return a table of what is said and what is true, means over the seeds."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("surface", *(f"{shared:.0%} shared: said, kept" for shared in SHARED)):
        table.add_column(header)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        for subject in subjects:
            cells = []
            for shared in SHARED:
                ask = partial(kept_on_new, subject, name, shared)
                found = np.array([one for one in pool.map(ask, range(seeds)) if one is not None])
                said, kept = found.mean(axis=0)
                cells.append(f"{said:.2f}, {kept:.2f}")
            table.add_row(subject.surface.name, *cells)
    return table


def _ended(regrets: NDArray[np.float64]) -> tuple[str, str]:
    if not len(regrets):
        return "none", "none"
    # To the second decimal, as it is said; then strictly.
    true = np.mean(regrets.round(2) <= GAIN), np.mean(regrets <= GAIN)
    spread = f"median {np.median(regrets):.3f}, most {regrets.max():.4f}"
    return "{:.0%}, strictly {:.0%}".format(*true), spread


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
        "best": {"parameters": surface.parameters(best.setting), **surface.points[best.setting]},
        "optimum": surface.least(floor),
        "floor": floor,
    }


def facts_line(facts: Mapping[str, Any]) -> str:
    """Return a surface in words."""
    best = facts["best"]
    setting = ", ".join(f"{name} {value:g}" for name, value in best["parameters"].items())
    return (
        f"{facts['points']} settings, {facts['failed']} failed, {facts['feasible']} feasible "
        f"(retain >= {facts['floor']:g}); best: forget {best['forget']:.3f} at retain "
        f"{best['retain']:.3f} ({setting}); {facts['near']} feasible settings within {NEAR} of it; "
        f"optimum, also between settings: {facts['optimum']:.3f}"
    )


def table_of(rows: Sequence[Row]) -> Table:
    """Return the rows as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("sampler", "at once", *(f"cost {cost}" for cost in COSTS), "s"):
        table.add_column(header, justify="left" if header == "sampler" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    return table


def bench(
    *,
    grid: Annotated[list[Path] | None, cyclopts.Parameter(consume_multiple=True)] = None,
    samplers: str = ",".join(SAMPLERS),
    at_once: str = ",".join(map(str, AT_ONCE)),
    seeds: PositiveInt = 50,
    retain_floor: float = RETAIN_FLOOR,
    processes: PositiveInt = 2,
    stops: bool = False,
    starts: bool = False,
    kept: bool = False,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Replay samplers on recorded surfaces.

    Args:
        grid: Files. Default: those in docs/surfaces that are whole.
        samplers: With commas between.
        at_once: Trials that are proposed before one of them is told, likewise.
        seeds: Replays of each.
        retain_floor: Least retain ROUGE-1.
        processes: That replay at the same time.
        stops: Show when searches end by themselves instead.
        kept: Show how often the best keeps the floor on new questions, and what is said, instead.
        starts: Show what starting from searches of the other surfaces of a model is worth instead.
        json_file: Write the figures; those that it has of the same surface are kept.
    """
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    names, surfaces, problems = samplers.split(","), list[Surface](), Problems()
    for name in names:
        if name not in SAMPLERS and name not in RIVALS:
            problems.add(f"--samplers {name}: there are {', '.join([*SAMPLERS, *RIVALS])}.")
        else:
            problems.attempt(partial(maker_of, name))
    for file in grid or sorted(SURFACES.glob("*.json")):
        with problems.collect():
            surface = read_surface(file)
            if grid is None and len(surface.points) < len(surface.settings()):
                console.print(f"{surface.name}: is not whole, and is left out")
                continue
            check_replayable(surface, retain_floor)
            surfaces.append(surface)
    problems.raise_if_any()
    if starts:
        table = print_starts(surfaces, retain_floor, names[0], seeds=seeds, processes=processes)
        console.print(table)
        console.print(f"median regret after so many trials, and share of at most {NEARLY}")
        console.print("from the others, when it ends by itself: median of the trials, most regret")
        return
    if kept:
        subjects = [Subject(surface=one, floor=retain_floor) for one in surfaces]
        console.print(print_kept(subjects, names[0], seeds=seeds, processes=processes))
        console.print(f"retain with a standard error of {NOISE}, part of it shared by all settings")
        return
    figures = _read(json_file) if json_file is not None and json_file.exists() else {}
    for surface in surfaces:
        facts = {**facts_of(surface, retain_floor), "seeds": seeds, "about": dict(surface.about)}
        console.print(f"\n{surface.name}: {facts_line(facts)}")
        subject = Subject(surface=surface, floor=retain_floor)
        if stops:
            print_stops(subject, names, seeds=seeds, processes=processes, console=console)
            continue
        before = figures.get(surface.name, {})
        known = [Row(**row) for row in before.get("rows", ()) if before["facts"] == facts]
        rows = rows_of(
            subject,
            names,
            at_once=[*map(int, at_once.split(","))],
            seeds=seeds,
            processes=processes,
            known=known,
            console=console,
        )
        shown = []
        for row in rows:
            shown.append(row)
            others = [one for one in known if (one.sampler, one.at_once) not in _ways(shown)]
            plain = [dataclasses.asdict(one) for one in (*others, *shown)]
            figures[surface.name] = {"facts": facts, "rows": plain}
            if json_file is not None:
                write_json(json_file, figures)
        console.print(table_of(shown))
    if stops:
        return
    console.print(
        f"\ncost 12: after 12 trials, regret in forget ROUGE-1, median and 95th percentile of "
        f"{seeds} seeds, and the share within {NEAR}; none: nothing feasible was found"
    )
    console.print(f"s: seconds of a suggestion after {MANY} trials")


def _read(file: Path) -> dict[str, Any]:
    """Return the figures of an earlier run, or raise an InputError."""
    try:
        figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = {
            name: (one["facts"], [Row(**row) for row in one["rows"]])
            for name, one in figures.items()
        }
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(
            f"--json {file}: exists, and has no figures of this command ({error}). Name another."
        ) from error
    return figures


def _ways(rows: Sequence[Row]) -> set[tuple[str, int]]:
    return {(row.sampler, row.at_once) for row in rows}


if __name__ == "__main__":
    with reporting_errors(debug=False):
        cyclopts.run(bench)
