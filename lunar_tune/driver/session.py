"""A search under way: its records, its display, its ending."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape

from lunar_tune.driver.backends import Backend, BackendLostError, Resources
from lunar_tune.driver.loop import MAX_FAILURES, Confirmation, SearchLoop
from lunar_tune.driver.persistence import (
    search_document,
    signature_of,
    tracked_description,
    write_best,
    write_mirrors,
)
from lunar_tune.driver.plan import SearchPlan
from lunar_tune.driver.space import open_study
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.files import write_atomically
from lunar_tune.metrics.goal import goal_of
from lunar_tune.report.log_file import RECORD
from lunar_tune.report.progress import SearchDisplay
from lunar_tune.report.results import SearchResults, short_report
from lunar_tune.report.summary import (
    baseline_problem,
    next_commands,
    print_baseline,
    print_result,
)
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import INTERRUPTED, StoredStudy, Study
from lunar_tune.tracking.sync import Tracker
from lunar_tune.trial.tasks import Outcome

SAME_MODEL = 0.02
"""By how much a ROUGE score may differ between machines that compute with the same weights: the
conformance runs differ by up to 0.01 between number formats (docs/benchmarks.md)."""
EXIT_FOUND, EXIT_LOST, EXIT_INFEASIBLE, EXIT_FAILURES, EXIT_INTERRUPTED = 0, 1, 3, 4, 130


class UnknowingModelError(InputError):
    """The base model does not know the data, so nothing could be found."""


class SearchSession:
    """A search under way; it hears from its loop what happens.

    Args:
        plan: With a model that can be loaded.
        given: Origin of options that were not left at their default.
        arguments: Options that would give the search again, but for its seed, for the commands that
            are shown in the end; None shows none.
    """

    study: Study
    baseline: Mapping[str, float]

    def __init__(
        self,
        plan: SearchPlan,
        folder: Folder,
        backend: Backend,
        resources: Resources,
        tracker: Tracker,
        *,
        console: Console,
        given: Mapping[str, str],
        arguments: Sequence[str] | None,
    ) -> None:
        self.plan, self.folder, self.tracker, self.console = plan, folder, tracker, console
        self.arguments = arguments
        self._backend, self._resources, self._given = backend, resources, given
        self._signature = signature_of(plan)  # before its own layers narrow the space
        self._goal = goal_of(plan.config)
        self._display = SearchDisplay(console, self._goal)
        self._found = False
        self._unconfirmed: str | None = None

    def run(self) -> int:
        """Run everything, then write and show what came out; return the exit code.

        Raises:
            LunarTuneError: The base model cannot be evaluated, or makes success impossible;
                the search's files cannot be written.
        """
        try:
            code, ending = self._run_tasks()
            self._conclude(ending, killed=code in {EXIT_INTERRUPTED, EXIT_LOST})
        except OSError as error:
            raise LunarTuneError(
                f"{error}. What was computed is kept: see to the disk, then go on with lunar-tune "
                f"search --resume {self.folder.path}"
            ) from error
        return code

    def _run_tasks(self) -> tuple[int, str | None]:
        """Run all tasks; return the exit code, and how the search ended if not by itself."""
        config = self.plan.config
        loop = SearchLoop(
            self,
            self.folder,
            config,
            n_retain=self.plan.spec.data.n_retain,
            layer_coefficient=self.plan.layer_coefficient,
        )
        ended: tuple[int, str] | None = None
        try:
            with self._display:
                self._display.doing("evaluating the base model")
                self._backend.run(loop, self.plan.spec)
        except KeyboardInterrupt as error:
            lost = isinstance(error, BackendLostError)
            if loop.study is None and lost:
                raise LunarTuneError(f"{error} before the first trial; start again.") from error
            if loop.study is None:
                raise
            RECORD.warning(str(error) or "interrupted")
            for number in self.study.running():
                self.study.fail(number, INTERRUPTED, again=True)
            ended = EXIT_INTERRUPTED, "Interrupted."
            if lost:
                ended = EXIT_LOST, f"{error}; --resume goes on."
        if loop.error is not None:
            raise loop.error
        if ended is not None:
            return ended
        if loop.gave_up:
            return EXIT_FAILURES, f"Stopped after {MAX_FAILURES} failed trials in a row."
        if self._found:
            return EXIT_FOUND, None
        if self._unconfirmed is not None:
            return EXIT_INFEASIBLE, f"A full evaluation gave no answer ({self._unconfirmed})."
        return EXIT_INFEASIBLE, None

    def begin(self, outcome: Outcome) -> Study:
        """Judge the base model; open the study and describe the search."""
        if outcome.result is None:
            raise AssertionError("a base model without a result begins no search")
        config, scores = self.plan.config, outcome.result.evaluation.scores
        self._display.doing(None)
        print_baseline(self.console, scores, outcome.plain_decoding)
        problem = baseline_problem(scores, self._goal.floor, self.plan.spec)
        if problem is not None and not (config.force or config.resume):
            raise UnknowingModelError(problem)
        if problem is not None and config.force:
            self.console.print(f"[yellow]going on as told:[/yellow] {escape(problem)}")
        stored = StoredStudy.read(self.folder.journal)
        before = stored.notes if stored is not None else {}
        if outcome.layer_prior is not None:  # a search keeps the layers that it began with
            own = before.get("layer_prior") or outcome.layer_prior
            self.plan = self.plan.with_own_prior(own)
            self.console.print(f"layer {escape(str(self.plan.layers))}")
        self._compare_baseline(scores, before.get("baseline", {}))
        self.baseline, tracker, plan = scores, self.tracker, self.plan
        document = search_document(
            plan,
            name=self.folder.name,
            uri=tracker.uri,
            resources=self._resources,
            given=self._given,
            baseline=scores,
        )
        # Before the study: whoever goes on with it finds what it was told.
        write_atomically(self.folder.config, document.encode())
        self.study = open_study(
            self.folder.journal, name=self.folder.name, space=plan.space, config=config
        )
        notes = {
            "mlflow": tracker.place(before.get("mlflow")),
            "description": tracked_description(plan),
            "status": "KILLED",  # what is true of a search that could not say how it ended
            "goal": self._goal.text,
            "baseline": dict(scores),
            "tags": plan.spec.tags,
            "signature": self._signature,
            "layer_prior": plan.prior.model_dump_json() if plan.prior is not None else None,
            "facts": {label.strip(): value for label, value in plan.facts.items()},
            "configuration": document,
            # What an earlier attempt has left, perhaps with fewer trials:
            **dict.fromkeys(("confirmed", "num_trials", "refused")),
        }
        for key, value in notes.items():
            self.study.note(key, value)
        results = SearchResults.read(self.folder.path)
        tracker.search(results, note=short_report(results), status="RUNNING")
        self._display.follow(config.num_trials, self.study.ended, config.time_budget)
        return self.study

    def _compare_baseline(self, scores: Mapping[str, float], before: Mapping[str, float]) -> None:
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
            self.console.print(
                f"[yellow]the base model answers a little differently than when the search "
                f"began:[/yellow] {told}; another machine rounds differently"
            )

    def ended(self, row: TrialRow) -> None:
        """Show a trial that has ended, and write its run."""
        self._display.ended(row)
        search = StoredSearch(folder=self.folder, study=self.study.stored)
        self.tracker.search(search, status="RUNNING", trial=row.number)

    def confirming(self, row: TrialRow) -> None:
        """Show that a setting is about to be evaluated in full."""
        asked = "held-out" if self.plan.config.holdout else "all"
        self._display.doing(f"confirming trial {row.number} on {asked} questions")

    def unconfirmed(self, row: TrialRow, reason: str) -> None:
        """Say that a full evaluation gave no answer."""
        self._unconfirmed = reason
        self._display.doing(None)
        self.console.print(
            f"trial {row.number} could not be evaluated in full ({escape(reason)}); the next best "
            "is confirmed instead"
        )

    def confirmed(self, row: TrialRow, confirmation: Confirmation, *, holds: bool) -> None:
        """Keep the best setting, or say why it is not the best."""
        self._display.doing(None)
        if not holds:
            self.console.print(
                f"trial {row.number} misses a bound when evaluated in full; the next best is "
                "confirmed instead"
            )
            return
        self._found = True
        self.study.note("confirmed", dataclasses.asdict(confirmation))
        write_best(
            self.folder,
            row,
            confirmation,
            spec=self.plan.spec,
            n_layers=self.plan.n_layers,
            baseline=self.baseline,
            goal=self._goal,
        )

    def _conclude(self, ending: str | None, *, killed: bool) -> None:
        """Write what is made of the study, MLflow's runs among it, and show the result."""
        self.study.note("ending", ending)
        self.study.note("status", "KILLED" if killed else "FINISHED")
        results = SearchResults.read(self.folder.path)
        write_mirrors(self.folder, results)
        if not self.tracker.search(results, note=short_report(results)):
            self.console.print(
                "[yellow]MLflow does not have all of it:[/yellow] python -m lunar_tune.compare "
                f"{escape(str(self.folder.path))} writes the rest when it answers again",
                soft_wrap=True,
            )
        if ending is None:  # the last word: nothing of a search that has it is done again
            self.study.note("num_trials", self.plan.config.num_trials)
        commands = {}
        if self.arguments is not None:
            commands = next_commands(self.plan.config, self.folder.path, results, self.arguments)
        print_result(self.console, results, folder=self.folder.path, commands=commands)
