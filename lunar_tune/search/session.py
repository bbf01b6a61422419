"""A search under way: its records, its display, its ending."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.files import write_atomically
from lunar_tune.metrics.goal import goal_of
from lunar_tune.report.report import short_report
from lunar_tune.report.results import load_search
from lunar_tune.search.backends.interface import Backend, BackendLostError, Resources
from lunar_tune.search.descriptions import description, search_document
from lunar_tune.search.display.log_file import RECORD
from lunar_tune.search.display.search_progress import SearchDisplay
from lunar_tune.search.display.summary import (
    next_commands,
    print_result,
    print_vanilla,
    vanilla_problem,
)
from lunar_tune.search.loop import (
    MAX_FAILURES,
    Confirmation,
    Confirmed,
    Confirming,
    Event,
    SearchLoop,
    TrialEnded,
    Unconfirmed,
)
from lunar_tune.search.outputs import best_document, write_best, write_mirrors
from lunar_tune.search.plan import SearchPlan, resolved_values
from lunar_tune.search.samplers import open_study
from lunar_tune.study.answers import AnswerFiles
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import INTERRUPTED, StoredStudy, Study
from lunar_tune.tracking.sync import Tracker
from lunar_tune.trial.tasks import Outcome

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
    """The base model does not know the data, so nothing could be found."""


class SearchSession:
    """A search under way; it hears from its loop what happens.

    Args:
        plan: What is searched, checked and with a model that can be loaded.
        folder: Where everything is written.
        backend: Runs the tasks.
        resources: Of a trial.
        opened: Gives the way into MLflow, which may still be opening.
        console: Where to show what happens.
        given: Origin of options that were not left at their default.
        signature: Of what decides the trials, to be kept with the study.
        brief: Whether to leave out the commands that may come next.
    """

    study: Study
    vanilla: Mapping[str, float]

    def __init__(
        self,
        plan: SearchPlan,
        folder: Folder,
        backend: Backend,
        resources: Resources,
        opened: Callable[[], Tracker],
        *,
        console: Console,
        given: Mapping[str, str],
        signature: str | None = None,
        brief: bool = False,
    ) -> None:
        self.plan, self.folder, self._backend, self.resources = plan, folder, backend, resources
        self._opened, self._console, self._given = opened, console, given
        self._signature, self._brief = signature, brief
        self._goal = goal_of(plan.config)
        self._display = SearchDisplay(console)
        self._best: tuple[TrialRow, Mapping[str, float]] | None = None

    def run(self, arguments: Sequence[str]) -> int:
        """Run everything, then write and show what came out; return the exit code.

        Args:
            arguments: The run's options as given, for the commands that are shown at the end.

        Raises:
            LunarTuneError: The base model cannot be evaluated, or makes success impossible;
                the search's files cannot be written.
        """
        try:
            return self._run(arguments)
        except OSError as error:
            raise LunarTuneError(
                f"{error}. What was computed is kept: see to the disk, then go on with lunar-tune "
                f"search --resume {self.folder.path}"
            ) from error

    def _run(self, arguments: Sequence[str]) -> int:
        config = self.plan.config
        loop = SearchLoop(
            self._begin,
            self._hear,
            AnswerFiles(self.folder, text=config.text),
            goal=self._goal,
            num_trials=config.num_trials,
            n_retain=self.plan.spec.data.n_retain,
            confirm_once=config.holdout,
            time_budget=config.time_budget,
            layer_coefficient=self.plan.layer_coefficient,
        )
        code, ending = EXIT_INFEASIBLE, None
        if threading.current_thread() is threading.main_thread():
            # A machine that is taken away says so: the search ends as with an interruption.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with self._display:
                self._display.doing("evaluating the base model")
                self._backend.run(loop, self.plan.spec)
        except KeyboardInterrupt as error:
            lost = str(error) if isinstance(error, BackendLostError) else None
            if loop.study is None and lost is not None:
                raise LunarTuneError(f"{lost} before the first trial; start again.") from error
            if loop.study is None:
                raise
            RECORD.warning(lost or "interrupted")
            code, ending = EXIT_INTERRUPTED, "Interrupted."
            if lost is not None:
                code, ending = EXIT_LOST, f"{lost}; --resume goes on."
            self._end_running(INTERRUPTED)
        if loop.error is not None:
            raise loop.error
        if loop.gave_up and code not in {EXIT_INTERRUPTED, EXIT_LOST}:
            code, ending = EXIT_FAILURES, f"Stopped after {MAX_FAILURES} failed trials in a row."
        if ending is None and self._best is None and loop.unconfirmed is not None:
            ending = f"No full evaluation gave an answer ({loop.unconfirmed})."
        self._conclude(ending, arguments, killed=code in {EXIT_INTERRUPTED, EXIT_LOST})
        return EXIT_FOUND if self._best is not None and code == EXIT_INFEASIBLE else code

    def _begin(self, outcome: Outcome) -> Study:
        """Judge the base model; open the study and describe the search."""
        if outcome.result is None:
            raise AssertionError("a base model without a result begins no search")
        scores = outcome.result.evaluation.scores
        self._display.doing(None)
        print_vanilla(self._console, scores, outcome.plain_decoding)
        problem = vanilla_problem(scores, self._goal.floor, self.plan.spec)
        config = self.plan.config
        if problem is not None and not (config.force or config.resume):
            raise UnknowingModelError(problem)
        if problem is not None and config.force:
            self._console.print(f"[yellow]going on as told:[/yellow] {escape(problem)}")
        stored = StoredStudy.read(self.folder.journal)
        before = stored.notes if stored is not None else {}
        layer_prior = self._narrow(outcome.layer_prior, before)
        self._compare_vanilla(scores, before.get("vanilla", {}))
        self.vanilla, tracker = scores, self._opened()
        document, resolved = self._document(tracker.uri)
        # Before the study: whoever goes on with it finds what it was told.
        write_atomically(self.folder.config, document.encode())
        self.study = open_study(
            self.folder.journal,
            name=self.folder.name,
            space=self.plan.space,
            config=self.plan.config,
        )
        notes = {
            "mlflow": tracker.place(before.get("mlflow")),
            "description": description(self.plan, resolved["digests"], before.get("description")),
            "status": "KILLED",  # what is true of a search that could not say how it ended
            "goal": self._goal.text,
            "vanilla": dict(scores),
            "tags": self.plan.spec.tags,
            "signature": self._signature,
            "layer_prior": layer_prior,
            "facts": self._facts,
            "configuration": document,
            # What an earlier attempt has left, perhaps with fewer trials:
            "confirmed": None,
            "num_trials": None,
            "refused": None,
        }
        for key, value in notes.items():
            self.study.note(key, value)
        results = load_search(self.folder.path)
        tracker.search(results, note=short_report(results.report), status="RUNNING")
        self._display.follow(config.num_trials, self.study.ended, config.time_budget)
        return self.study

    def _compare_vanilla(self, scores: Mapping[str, float], before: Mapping[str, float]) -> None:
        """Look whether the base model is the one that an earlier process had.

        Raises:
            InputError: Its scores differ by more than rounding makes them.
        """
        names = [name for name in ("forget_rouge1", "retain_rouge1") if name in before]
        told = ", ".join(f"{name} {scores[name]:.3f} and was {before[name]:.3f}" for name in names)
        difference = max((abs(scores[name] - before[name]) for name in names), default=0.0)
        if difference > SAME_MODEL:
            raise InputError(
                f"the base model of {self.folder.name} is another one than when it began "
                f"({told}), so its trials would not compare. Give back the weights that it had "
                "(--model-path), or start a new search."
            )
        if difference:
            self._console.print(
                f"[yellow]the base model answers a little differently than when the search "
                f"began:[/yellow] {told}; another machine rounds differently",
                highlight=False,
            )

    def _hear(self, event: Event) -> None:
        """Show and keep what happens."""
        match event:
            case TrialEnded(row):
                self._display.ended(row)
                search = StoredSearch(folder=self.folder, study=self.study.stored, goal=self._goal)
                self._opened().search(search, status="RUNNING")
            case Confirming(row):
                asked = "held-out" if self.plan.config.holdout else "all"
                self._display.doing(f"confirming trial {row.number} on {asked} questions")
            case Unconfirmed(row, reason):
                self._display.doing(None)
                self._console.print(
                    f"trial {row.number} could not be evaluated in full ({escape(reason)}); the "
                    "next best is confirmed instead",
                    highlight=False,
                )
            case Confirmed(row, confirmation, holds):
                self._display.doing(None)
                self._keep_best(row, confirmation, holds=holds)

    def _keep_best(self, row: TrialRow, confirmation: Confirmation, *, holds: bool) -> None:
        """Keep the best setting, or say why it is not the best."""
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
            n_layers=self.plan.n_layers,
            vanilla=self.vanilla,
            goal=self._goal,
        )
        write_best(self.folder, document)

    @property
    def _facts(self) -> dict[str, str]:
        """What is done, as label and value."""
        return {key.strip(): value for key, value in self.plan.facts.items()}

    def _narrow(self, layer_prior: str | None, before: Mapping[str, Any]) -> str | None:
        """Take layers that were scored; a study that has begun keeps those that it began with."""
        if layer_prior is None:
            return None
        text = before.get("layer_prior") or layer_prior
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
        """Write what is made of the study, MLflow's runs among it, and show the result."""
        self.study.note("ending", ending)
        self.study.note("status", "KILLED" if killed else "FINISHED")
        results = load_search(self.folder.path)
        report = results.report
        write_mirrors(self.folder, report)
        if not self._opened().search(results, note=short_report(report)):
            self._console.print(
                "[yellow]MLflow does not have all of it:[/yellow] python -m lunar_tune.compare "
                f"{escape(str(self.folder.path))} writes the rest when it answers again",
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

    def _end_running(self, reason: str) -> None:
        """Fail what has no result."""
        for number in self.study.running():
            self.study.fail(number, reason, again=True)
