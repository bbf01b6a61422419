"""A search under way: its records, its display, its ending.

Covers: judging the unmodified model, opening the study, showing progress, keeping the confirmed
best, ending cleanly after an interruption.
Does not cover: which task comes next (`loop`), what comes before the first one (`run`), MLflow
(`mirroring`).
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.files import write_atomically
from lunar_tune.metrics.goal import goal_of
from lunar_tune.report.results import load_search
from lunar_tune.search.backends.ray.cluster import Resources, leave_ray
from lunar_tune.search.backends.ray.ray_watch import RayLostError, watched
from lunar_tune.search.backends.ray.watchdog import crash_reason
from lunar_tune.search.descriptions import (
    search_document,
)
from lunar_tune.search.display.log_file import RECORD
from lunar_tune.search.display.search_progress import SearchDisplay
from lunar_tune.search.display.summary import (
    next_commands,
    print_result,
    print_vanilla,
    vanilla_problem,
)
from lunar_tune.search.loop import Confirmation, Course
from lunar_tune.search.mirroring import SearchMirror
from lunar_tune.search.outputs import best_document, write_best, write_mirrors
from lunar_tune.search.plan import SearchPlan, resolved_values
from lunar_tune.search.samplers import open_study
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.study import INTERRUPTED, StoredStudy, Study
from lunar_tune.tracking.trial_runs import SearchTracker

__all__ = [
    "EXIT_FAILURES",
    "EXIT_FOUND",
    "EXIT_INFEASIBLE",
    "EXIT_INTERRUPTED",
    "SearchSession",
    "UnknowingModelError",
]

SAME_MODEL = 0.02
"""By how much a ROUGE score may differ between machines that compute with the same weights: the
conformance runs differ by up to 0.01 between number formats (docs/benchmarks.md)."""
EXIT_FOUND, EXIT_LOST, EXIT_INFEASIBLE, EXIT_FAILURES, EXIT_INTERRUPTED = 0, 1, 3, 4, 130


class UnknowingModelError(InputError):
    """The unmodified model does not know the data, so nothing could be found."""


class SearchSession:
    """A search under way; it hears from its course what happens.

    Args:
        plan: What is searched, checked and with a model that can be loaded.
        folder: Where everything is written.
        resources: Of a trial.
        opened: Gives the MLflow mirror, which may still be opening.
        console: Where to show what happens.
        given: Origin of options that were not left at their default.
        signature: Of what decides the trials, to be kept with the study.
        brief: Whether to leave out the commands that may come next.
    """

    mirror: SearchMirror
    study: Study
    vanilla: Mapping[str, float]

    def __init__(
        self,
        plan: SearchPlan,
        folder: Folder,
        resources: Resources,
        opened: Callable[[], SearchTracker],
        *,
        console: Console,
        given: Mapping[str, str],
        signature: str | None = None,
        brief: bool = False,
    ) -> None:
        self.plan, self.folder, self.resources = plan, folder, resources
        self._opened, self._console, self._given = opened, console, given
        self._signature, self._brief = signature, brief
        self._display = SearchDisplay(console)
        self._best: tuple[TrialRow, Mapping[str, float]] | None = None

    def run(self, arguments: Sequence[str]) -> int:
        """Run everything, then write and show what came out; return the exit code.

        Args:
            arguments: The run's options as given, for the commands that are shown at the end.

        Raises:
            LunarTuneError: The unmodified model cannot be evaluated, or makes success impossible;
                the search's files cannot be written.
        """
        try:
            return self._run(arguments)
        except OSError as error:
            raise LunarTuneError(
                f"{error}. What was computed is kept: see to the disk, then go on with python -m "
                f"lunar_tune.search --resume {self.folder.path}"
            ) from error

    def _run(self, arguments: Sequence[str]) -> int:
        from lunar_tune.search.backends.ray.tuning import run_course

        config = self.plan.config
        course = Course(
            self,
            num_trials=config.num_trials,
            goal=goal_of(config),
            confirm_once=config.run.holdout,
            time_budget=config.time_budget,
            max_failures=config.max_failures,
            layer_coefficient=self.plan.layer_coefficient,
            crash_reason=functools.partial(crash_reason, self.folder),
        )
        code, ending = EXIT_INFEASIBLE, None
        if threading.current_thread() is threading.main_thread():
            # A machine that is taken away says so: the search ends as with an interruption.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with self._display, watched(self._last_word):
                self._display.doing("evaluating the unmodified model")
                run_course(
                    course,
                    self.plan.spec,
                    self.folder.path,
                    self.resources,
                    scheduler=config.scheduler,
                    timeout=config.trial_timeout,
                )
        except KeyboardInterrupt as error:
            lost = str(error) if isinstance(error, RayLostError) else None
            leave_ray()
            if course.study is None and lost is not None:
                raise LunarTuneError(f"{lost} before the first trial; start again.") from error
            if course.study is None:
                raise
            RECORD.warning(lost or "interrupted")
            code, ending = EXIT_INTERRUPTED, "Interrupted."
            if lost is not None:
                code, ending = EXIT_LOST, f"{lost}; --resume goes on."
            self._end_running(INTERRUPTED)
        if course.error is not None:
            raise course.error
        if course.gave_up and code not in {EXIT_INTERRUPTED, EXIT_LOST}:
            failures = config.max_failures
            code, ending = EXIT_FAILURES, f"Stopped after {failures} failed trials in a row."
        if ending is None and self._best is None and course.unconfirmed is not None:
            ending = f"No full evaluation gave an answer ({course.unconfirmed})."
        self._conclude(ending, arguments, killed=code in {EXIT_INTERRUPTED, EXIT_LOST})
        return EXIT_FOUND if self._best is not None and code == EXIT_INFEASIBLE else code

    def on_vanilla(
        self, scores: Mapping[str, float], note: str | None, layer_prior: str | None
    ) -> Study:
        """Judge the unmodified model; open the study and describe the search."""
        self._display.doing(None)
        print_vanilla(self._console, scores, note)
        problem = vanilla_problem(scores, goal_of(self.plan.config).floor, self.plan.spec)
        if problem is not None and not self.plan.config.force:
            raise UnknowingModelError(problem)
        if problem is not None:
            self._console.print(f"[yellow]going on as told:[/yellow] {escape(problem)}")
        layer_prior = self._narrow(layer_prior)
        self._compare_vanilla(scores)
        self.vanilla, tracker = scores, self._opened()
        if self.plan.config.system_metrics:
            tracker.monitor()
        document, resolved = self._document(tracker.uri)
        # Before the study: whoever goes on with it finds what it was told.
        write_atomically(self.folder.config, document.encode())
        self.study = open_study(
            self.folder.journal,
            name=self.folder.name,
            space=self.plan.space,
            config=self.plan.config,
        )
        goal = goal_of(self.plan.config)
        notes = {
            "goal": goal.text,
            "vanilla": dict(scores),
            "tags": self.plan.spec.tags,
            "signature": self._signature,
            "layer_prior": layer_prior,
            "facts": self._facts,
            "mlflow": tracker.address,
            "configuration": document,
            # What an earlier attempt has left, perhaps with fewer trials:
            "confirmed": None,
            "num_trials": None,
            "refused": None,
        }
        for key, value in notes.items():
            self.study.note(key, value)
        self.mirror = SearchMirror(tracker, self.plan, self.folder, self.study)
        self.mirror.describe(document, resolved, scores)
        config = self.plan.config
        self._display.follow(config.num_trials, self.study.ended, config.time_budget)
        return self.study

    def _compare_vanilla(self, scores: Mapping[str, float]) -> None:
        """Look whether the unmodified model is the one that an earlier process had.

        Raises:
            InputError: Its scores differ by more than rounding makes them.
        """
        stored = StoredStudy.read(self.folder.journal)
        before = stored.notes.get("vanilla", {}) if stored is not None else {}
        names = [name for name in ("forget_rouge1", "retain_rouge1") if name in before]
        told = ", ".join(f"{name} {scores[name]:.3f} and was {before[name]:.3f}" for name in names)
        difference = max((abs(scores[name] - before[name]) for name in names), default=0.0)
        if difference > SAME_MODEL:
            raise InputError(
                f"the unmodified model of {self.folder.name} is another one than when it began "
                f"({told}), so its trials would not compare. Give back the weights that it had "
                "(--model-path), or start a new search."
            )
        if difference:
            self._console.print(
                f"[yellow]the unmodified model answers a little differently than when the search "
                f"began:[/yellow] {told}; another machine rounds differently",
                highlight=False,
            )

    def on_start(self, row: TrialRow) -> None:
        """Mirror that a trial begins."""
        self.mirror.start(row)

    def on_end(self, row: TrialRow) -> None:
        """Show and mirror a trial that has ended."""
        self._display.ended(row)
        self.mirror.end(row)

    def on_confirming(self, row: TrialRow) -> None:
        """Show that a setting is evaluated in full."""
        asked = "held-out" if self.plan.config.run.holdout else "all"
        self._display.doing(f"confirming trial {row.number} on {asked} questions")

    def on_confirmed(self, row: TrialRow, confirmation: Confirmation, *, holds: bool) -> None:
        """Keep the best setting, or say why it is not the best."""
        self._display.doing(None)
        if not holds:
            self._console.print(
                f"trial {row.number} misses a bound when evaluated in full; the next best is "
                "confirmed instead"
            )
            return
        self._best = row, confirmation.scores
        self.study.note("confirmed", dataclasses.asdict(confirmation))
        document = best_document(
            row,
            confirmation,
            spec=self.plan.spec,
            vanilla=self.vanilla,
            goal=goal_of(self.plan.config),
        )
        write_best(self.folder, document)
        self.mirror.found(row, confirmation.scores, feasible=document["feasible"])

    def on_unconfirmed(self, row: TrialRow, reason: str) -> None:
        """Say that a setting could not be evaluated in full."""
        self._display.doing(None)
        self._console.print(
            f"trial {row.number} could not be evaluated in full ({escape(reason)}); the next best "
            "is confirmed instead",
            highlight=False,
        )

    @property
    def _facts(self) -> dict[str, str]:
        """What is done, as label and value."""
        return {key.strip(): value for key, value in self.plan.facts.items()}

    def _narrow(self, layer_prior: str | None) -> str | None:
        """Take layers that were scored; a study that has begun keeps those that it began with."""
        stored = StoredStudy.read(self.folder.journal) if layer_prior is not None else None
        kept = stored.notes.get("layer_prior") if stored is not None else None
        if (text := kept or layer_prior) is not None:
            self.plan = self.plan.with_own_prior(text)
            self._console.print(f"layer {escape(str(self.plan.layers))}", highlight=False)
        return text

    def _document(self, uri: str) -> tuple[str, Mapping[str, Any]]:
        """Return the configuration, and what it says beside options."""
        resolved = resolved_values(self.plan, self.vanilla)
        document = search_document(
            self.plan,
            name=self.folder.name,
            uri=uri,
            resources=self.resources,
            given=self._given,
            resolved=resolved,
        )
        return document, resolved

    def _conclude(self, ending: str | None, arguments: Sequence[str], *, killed: bool) -> None:
        """Write the mirrors, close MLflow's run and show the result."""
        self.study.note("ending", ending)
        report = load_search(self.folder.path).report
        files = write_mirrors(self.folder, report)
        with self._display:
            mirrored = self.mirror.finish(
                report,
                files,
                status="KILLED" if killed else "FINISHED",
                waiting=lambda: self._display.doing("waiting for MLflow"),
            )
        self.study.note("mirrored", mirrored)
        if not mirrored:
            self._console.print(
                "[yellow]MLflow does not have all of it:[/yellow] python -m lunar_tune.search "
                f"--resume {escape(str(self.folder.path))} writes the rest when it answers again",
                highlight=False,
                soft_wrap=True,
            )
        if ending is None:  # the last word: nothing of a search that has it is done again
            self.study.note("num_trials", self.plan.config.num_trials)
        commands = (
            {}
            if self._brief
            else next_commands(self.plan.config, self.folder.path, report, arguments)
        )
        print_result(self._console, report, folder=self.folder.path, commands=commands)

    def _last_word(self, lost: str) -> None:
        """Say how to go on, where nothing else can be done any more."""
        text = (
            f"{lost}. What was computed is kept: go on with python -m lunar_tune.search --resume "
            f"{self.folder.path}"
        )
        RECORD.error(text)
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()

    def _end_running(self, reason: str) -> None:
        """Fail what has no result, and mirror that and what was about to be mirrored."""
        for number in self.study.running():
            self.study.fail(number, reason, again=True)
        self.mirror.end_open()
