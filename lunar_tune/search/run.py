"""A whole search, from its configuration to its outputs and exit code.

Covers: the order of things: check, plan, preflight, trials, confirmation, outputs.
Does not cover: each of these; the modules beside this one do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from lunar_tune.data.records import records_digest
from lunar_tune.errors import InputError, Problems
from lunar_tune.models.loading import load_config
from lunar_tune.reporting.progress import build_progress, epochs_shown
from lunar_tune.reporting.report import Report
from lunar_tune.reporting.rows import TrialRow, best_first
from lunar_tune.search.cluster import Resources, call_on_worker, check_gpus, ray_session, share_out
from lunar_tune.search.config import SearchConfig, config_document
from lunar_tune.search.outputs import (
    Folder,
    best_document,
    check_output,
    make_folder,
    short_trials,
    write_best,
)
from lunar_tune.search.progress import SearchProgress
from lunar_tune.search.space import SearchSpace, load_space
from lunar_tune.search.study import Study
from lunar_tune.search.summary import (
    next_commands,
    plan_facts,
    print_plan,
    print_result,
    vanilla_problem,
)
from lunar_tune.search.tracking import SearchTracker, default_tracking_uri
from lunar_tune.trial.assemble import assemble, known_depth, materialise
from lunar_tune.trial.spec import TrialSpec

__all__ = [
    "EXIT_FAILURES",
    "EXIT_FOUND",
    "EXIT_INFEASIBLE",
    "EXIT_INTERRUPTED",
    "SearchPlan",
    "plan_search",
    "run_search",
]

EXIT_FOUND, EXIT_INFEASIBLE, EXIT_FAILURES, EXIT_INTERRUPTED = 0, 3, 4, 130
# Candidates whose full evaluation is tried before the search is called infeasible.
CONFIRMATIONS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """A checked search, ready to be run."""

    config: SearchConfig
    spec: TrialSpec
    space: SearchSpace
    facts: Mapping[str, str]
    """What is going to be done, to show."""


def plan_search(config: SearchConfig, problems: Problems | None = None) -> SearchPlan:
    """Check everything that needs no weights.

    Args:
        config: What is asked for.
        problems: What is known to be wrong already.

    Raises:
        InputError: Something is wrong; all of it is said at once.
    """
    problems = problems or Problems()
    spec = space = None
    with problems.collect():
        config.check()
    with problems.collect():
        check_gpus(config)
    with problems.collect():
        check_output(config.output, config.name)
    with problems.collect():
        spec = assemble(config.run)
        space = _space(config, spec)
    problems.raise_if_any()
    if spec is None or space is None:
        raise AssertionError("what is missing comes with a noted problem")
    return SearchPlan(config=config, spec=spec, space=space, facts=plan_facts(config, spec, space))


def _space(config: SearchConfig, spec: TrialSpec) -> SearchSpace:
    """Read the space that fits the model's depth."""
    depth = known_depth(config.run)
    return load_space(
        config.space,
        model_name=spec.model.name,
        method=spec.method.name,
        variant=spec.method.variant,
        parameters=spec.method.parameters,
        n_layers=depth if depth is not None else load_config(spec.model).num_hidden_layers,
    )


def run_search(
    plan: SearchPlan, console: Console, *, given: Mapping[str, str], arguments: Sequence[str]
) -> int:
    """Run a planned search and return its exit code.

    Args:
        plan: From `plan_search`.
        console: Where to show what happens.
        given: Origin of options that were not left at their default.
        arguments: The run's options as given, for the commands that are shown at the end.

    Raises:
        InputError: The untouched model makes success impossible, or something cannot be reached.
    """
    print_plan(console, plan.facts)
    plan = _with_model(plan, console)
    folder = make_folder(plan.config, plan.spec)
    with (
        _given_back_if_unused(folder),
        _tracking(plan.config, folder.name) as opened,
        ray_session(plan.config),
    ):
        resources = share_out(plan.config)
        plan = _on_device(plan, resources)
        with console.status("evaluating the unmodified model"):
            vanilla = _preflight(plan, resources, console)
        search = _Search(plan, folder, resources, opened(), vanilla)
        search.describe(given)
        return search.run(console, arguments)


class _Search:
    """A search under way: what its stages share."""

    def __init__(
        self,
        plan: SearchPlan,
        folder: Folder,
        resources: Resources,
        tracker: SearchTracker,
        vanilla: Mapping[str, float],
    ) -> None:
        self.plan, self.folder, self.resources = plan, folder, resources
        self.tracker, self.vanilla = tracker, vanilla
        self.study = Study(folder.journal, name=folder.name, space=plan.space, config=plan.config)

    def describe(self, given: Mapping[str, str]) -> None:
        """Write the configuration, here and on the parent run."""
        config, spec, data = self.plan.config, self.plan.spec, self.plan.spec.data
        splits = {"forget": data.forget, "retain": data.retain, "factual": data.factual}
        digests = {name: records_digest(records) for name, records in splits.items()}
        document = config_document(
            config,
            given=given,
            derived={
                "name": self.folder.name,
                "tracking_uri": self.tracker.uri,
                "cpus_per_trial": self.resources.cpus,
                "gpus_per_trial": self.resources.gpus,
                "concurrency": self.resources.concurrency,
                "space": self.plan.space.origin,
                "data": data.name,
                "forget_edges": data.forget_edges,
            },
            resolved={
                "space": self.plan.space.to_dict(),
                "model_source": spec.model.checkpoint,
                "rows": {name: len(records) for name, records in splits.items()},
                "digests": digests,
                "vanilla": dict(self.vanilla),
            },
        )
        self.folder.config.write_text(document, encoding="utf-8")
        shown = {key.strip(): value for key, value in self.plan.facts.items()}
        self.tracker.describe(
            parameters={**shown, "retain_floor": config.retain_floor, "seed": config.run.seed},
            tags=self._tags(),
            texts={"config.yaml": document},
            data={name: (records, digests[name]) for name, records in splits.items()},
        )
        self.tracker.log_parent({f"vanilla_{name}": v for name, v in self.vanilla.items()})

    def run(self, console: Console, arguments: Sequence[str]) -> int:
        """Run the trials, confirm the best, write and show everything."""
        interrupted = gave_up = False
        best = confirmed = None
        try:
            gave_up = self._trials(console)
            with console.status("evaluating the best setting in full"):
                best, confirmed = self._confirm(console)
        except KeyboardInterrupt:
            interrupted = True
            self._end_running("interrupted")
        report = Report(
            title=f"{self.plan.spec.model.name}, {self.plan.spec.data.name}: "
            f"forget {', '.join(self.plan.spec.data.forget_edges)}",
            facts={key.strip(): value for key, value in self.plan.facts.items()},
            retain_floor=self.plan.config.retain_floor,
            vanilla=self.vanilla,
            rows=self.study.rows(),
            best=best,
            confirmed=confirmed,
        )
        self.tracker.log_files(self.folder.write_mirrors(report))
        commands = next_commands(self.plan.config, self.folder.path, best, arguments)
        print_result(console, report, folder=self.folder.path, commands=commands)
        self.tracker.close(status="KILLED" if interrupted else "FINISHED")
        if interrupted:
            return EXIT_INTERRUPTED
        if gave_up:
            return EXIT_FAILURES
        return EXIT_FOUND if best is not None else EXIT_INFEASIBLE

    def _trials(self, console: Console) -> bool:
        """Run all trials; return whether too many failed in a row."""
        from lunar_tune.search.tuning import tune_trials

        config = self.plan.config
        with SearchProgress(console, config.num_trials) as progress:

            def on_end(row: TrialRow) -> None:
                progress.ended(row)
                self._mirror(row)

            return tune_trials(
                self.study,
                self.plan.spec,
                self.folder.path,
                config=config,
                resources=self.resources,
                on_start=lambda row: self.tracker.start(
                    row, name=f"{self.plan.spec.method.name} {row.label}", tags=self._tags()
                ),
                on_end=on_end,
            )

    def _mirror(self, row: TrialRow) -> None:
        from lunar_tune.search.trainable import answers_path

        self.tracker.end(row, answers_path(self.folder.path, row.number))

    def _confirm(self, console: Console) -> tuple[TrialRow | None, Mapping[str, float] | None]:
        """Evaluate the best feasible trials in full until one keeps the floor."""
        from lunar_tune.search.trainable import confirm

        floor = self.plan.config.retain_floor
        candidates = best_first(self.study.rows())[:CONFIRMATIONS]
        if not candidates:
            return None, None
        confirmations = call_on_worker(
            confirm,
            self.resources,
            self.plan.spec,
            [(row.number, row.parameters) for row in candidates],
            floor,
        )
        for number in short_trials(confirmations, floor):
            console.print(
                f"trial {number} loses the retain floor when evaluated in full; the next best is "
                "confirmed instead"
            )
        last = confirmations[-1] if confirmations else None
        if last is None or last.result.evaluation.scores["retain_rouge1"] < floor:
            return None, None
        best = next(row for row in candidates if row.number == last.number)
        document = best_document(best, last, spec=self.plan.spec, vanilla=self.vanilla, floor=floor)
        write_best(self.folder, document)
        scores = last.result.evaluation.scores
        self.tracker.log_parent({f"best_{name}": value for name, value in scores.items()})
        self.tracker.log_files([self.folder.best])
        return best, scores

    def _end_running(self, reason: str) -> None:
        """Fail what has no result, and mirror that and what was about to be mirrored."""
        for number in self.study.running():
            self.study.fail(number, reason)
        for number in self.tracker.running():
            self._mirror(self.study.row(number))

    def _tags(self) -> dict[str, str]:
        spec = self.plan.spec
        return {
            "model": spec.model.name,
            "data": spec.data.name,
            "forget_edge": ",".join(spec.data.forget_edges),
            "method": spec.method.name,
            "solver": spec.method.variant,
        }


def _with_model(plan: SearchPlan, console: Console) -> SearchPlan:
    """Build `tiny` if it is asked for and not there yet."""
    with build_progress(console) as bar:
        spec = materialise(plan.spec, epochs_shown(bar, "building the tiny model (once)"))
    return dataclasses.replace(plan, spec=spec)


def _on_device(plan: SearchPlan, resources: Resources) -> SearchPlan:
    """Keep trials that were given no GPU off the GPUs, which Ray leaves visible to them."""
    if resources.gpus or plan.spec.model.device != "auto":
        return plan
    model = dataclasses.replace(plan.spec.model, device="cpu")
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, model=model))


def _preflight(plan: SearchPlan, resources: Resources, console: Console) -> Mapping[str, float]:
    """Evaluate the unmodified model; refuse to go on where that is bound to fail."""
    from lunar_tune.search.trainable import preflight

    scores = call_on_worker(preflight, resources, plan.spec).evaluation.scores
    factual = f", factual {scores['factual_rouge1']:.3f}" if "factual_rouge1" in scores else ""
    console.print(
        f"unmodified model: forget ROUGE-1 {scores['forget_rouge1']:.3f}, "
        f"retain {scores['retain_rouge1']:.3f}{factual}",
        highlight=False,
    )
    problem = vanilla_problem(scores, plan.config.retain_floor, plan.spec)
    if problem is not None and not plan.config.force:
        raise InputError(problem)
    if problem is not None:
        console.print(f"[yellow]going on as told:[/yellow] {escape(problem)}")
    return scores


@contextlib.contextmanager
def _given_back_if_unused(folder: Folder) -> Iterator[None]:
    """Remove the folder if the search ends before it wrote anything, so that its name is free."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.path.rmdir()
        raise


@contextlib.contextmanager
def _tracking(config: SearchConfig, name: str) -> Iterator[Callable[[], SearchTracker]]:
    """Open the tracker while Ray starts; close its runs when something else ends the search."""
    uri = config.tracking_uri or default_tracking_uri(config.output)
    with ThreadPoolExecutor(1) as background:
        opening = background.submit(SearchTracker, uri, output=config.output, name=name)
        if config.tracking_uri is not None:
            opening.result()  # an address may be wrong: that is said before Ray starts
        try:
            yield opening.result
        except BaseException as error:
            if opening.exception() is None:
                interrupted = isinstance(error, KeyboardInterrupt)
                opening.result().close(status="KILLED" if interrupted else "FAILED")
            raise
