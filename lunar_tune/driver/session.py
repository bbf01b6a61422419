"""A search under way: its records, its display, its ending."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

from lunar_tune.display import warn
from lunar_tune.driver.backends import Backend, BackendLostError, Resources
from lunar_tune.driver.loop import MAX_FAILURES, NO_RESULT, SearchLoop, keep_answers
from lunar_tune.driver.persistence import (
    search_document,
    signature_of,
    tracked_description,
    write_best,
    write_mirrors,
)
from lunar_tune.driver.plan import SearchPlan
from lunar_tune.driver.samplers import open_study
from lunar_tune.errors import InputError, LunarTuneError, UnknowingModelError
from lunar_tune.files import write_atomically
from lunar_tune.metrics.goal import goal_of
from lunar_tune.models.fingerprint import Identity, differing
from lunar_tune.report.progress import RECORD, SearchDisplay
from lunar_tune.report.results import SearchResults, short_report
from lunar_tune.report.summary import (
    baseline_problem,
    next_commands,
    print_baseline,
    print_result,
)
from lunar_tune.signals import EXIT_INTERRUPTED
from lunar_tune.study.folder import Folder
from lunar_tune.study.new_questions import gap_of, note_of_kept_again
from lunar_tune.study.rows import TrialRow, best_first
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import INTERRUPTED, StoredStudy, Study
from lunar_tune.tracking.sync import Tracker
from lunar_tune.trial.layer_scores import LayerPrior
from lunar_tune.trial.references import judge_references
from lunar_tune.trial.tasks import Outcome

SAME_MODEL = 0.02
"""By how much a ROUGE score may differ between machines that compute with the same weights: the
conformance runs differ by up to 0.01 between number formats (docs/benchmarks.md)."""
EXIT_FOUND, EXIT_LOST, EXIT_INFEASIBLE, EXIT_FAILURES = 0, 1, 3, 4


@dataclass(eq=False, repr=False)
class SearchSession:
    """A search under way; it hears from its loop what happens."""

    plan: SearchPlan  # with a model that can be loaded
    folder: Folder
    backend: Backend
    resources: Resources
    tracker: Tracker
    console: Console
    given: Mapping[str, str]  # origins of options that were not left at their default
    arguments: Sequence[str] | None
    """What gives the search again, but for its seed, in commands to show; None shows none."""
    study: Study = field(init=False)

    def __post_init__(self) -> None:
        self._signature = signature_of(self.plan)  # before its own layers narrow the space
        self._goal = goal_of(self.plan.config)
        self._display = SearchDisplay(self.console, self._goal)
        self._unconfirmed: str | None = None

    def run(self) -> int:
        """Run everything or raise a LunarTuneError; write and show the results; return the code."""
        try:
            code, ending = self._run_tasks()
            self._conclude(ending, killed=code in {EXIT_INTERRUPTED, EXIT_LOST})
        except OSError as error:
            raise LunarTuneError(
                f"{error}. What was computed is kept: free the disk, then resume with lunar-tune "
                f"search {shlex.join(self.plan.config.resuming(self.folder.path))}"
            ) from error
        return code

    def _run_tasks(self) -> tuple[int, str | None]:
        """Run all tasks; return the exit code, and how the search ended if not by itself."""
        plan = self.plan
        n_retain, coefficient = plan.spec.data.n_retain, plan.layer_coefficient
        stored = StoredStudy.read(self.folder.journal)
        known = stored.notes.get("model"), stored.references
        loop = SearchLoop(self, self.folder, plan.config, n_retain, coefficient, *known)
        ended: tuple[int, str] | None = None
        try:
            with self._display:
                self._display.doing("evaluating the base model")
                self.backend(loop, plan.spec)
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
                ended = EXIT_LOST, f"{error}; resume the search with --resume."
        if loop.error is not None:
            raise loop.error
        if ended is not None:
            return ended
        if loop.gave_up:
            return EXIT_FAILURES, f"Stopped after {MAX_FAILURES} failed trials in a row."
        if loop.found:
            return EXIT_FOUND, None
        if self._unconfirmed is not None:
            return EXIT_INFEASIBLE, f"A full evaluation failed ({self._unconfirmed})."
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
            raise UnknowingModelError(f"{' '.join(problem)} --force skips this check.")
        if problem is not None and config.force:
            told = escape(problem[0])
            self.console.print(f"[yellow]going on because of --force:[/yellow] {told}")
        forced = config.force or config.resume is not None
        judge_references(outcome.references, config.reference_check, self.console, forced=forced)
        before = StoredStudy.read(self.folder.journal).notes
        if outcome.layer_prior is not None:  # a search keeps the layers that it began with
            own = before.get("layer_prior") or outcome.layer_prior
            self.plan = self.plan.with_prior(LayerPrior.model_validate_json(own))
            self.console.print(f"layer {escape(str(self.plan.layers))}")
        self._compare_baseline(scores, before.get("baseline", {}))
        self._compare_starts(outcome.model or {})
        tracker, plan = self.tracker, self.plan
        # What a worker found, wherever it runs.
        facts = plan.facts | {"number format": outcome.number_format or "not known"}
        references = outcome.references
        if references is not None:
            facts["reference prompts"] = references.summary(config.reference_check)
        document = search_document(
            plan,
            name=self.folder.name,
            uri=tracker.uri,
            resources=self.resources,
            given=self.given,
            baseline=scores,
        )
        # Before the study: whoever goes on with it finds what it was told.
        write_atomically(self.folder.config, document.encode())
        self.study = open_study(self.folder, plan.space, config, plan.found.numbered)
        # Not before: a resume that is refused leaves the answers that are there.
        keep_answers(self.study, self.folder.answers(None), outcome.result, text=config.text)
        notes = {
            "mlflow": tracker.place(before.get("mlflow")),
            "description": tracked_description(plan, references),
            "status": "KILLED",  # what is true of a search that could not say how it ended
            "goal": self._goal.text,
            "baseline": dict(scores),
            "model": before.get("model") or outcome.model,
            "tags": plan.spec.tags,
            "signature": self._signature,
            "layer_prior": plan.prior.model_dump_json() if plan.prior is not None else None,
            "facts": {label.strip(): value for label, value in facts.items()},
            "references": dataclasses.asdict(references) if references is not None else None,
            "configuration": document,
            # What an earlier attempt has left, perhaps with fewer trials:
            **dict.fromkeys(("confirmed", "new_questions", "num_trials", "outlook", "refused")),
        }
        for key, value in notes.items():
            self.study.note(key, value)
        results = SearchResults.read(self.folder.path)
        tracker.search(results, note=short_report(results), status="RUNNING")
        self._display.follow(config.num_trials, self.study.ended, config.time_budget)
        return self.study

    def _compare_baseline(self, scores: Mapping[str, float], before: Mapping[str, float]) -> None:
        """Raise an InputError if scores differ from an earlier process's by more than rounding."""
        names = [name for name in ("forget_rouge1", "retain_rouge1") if name in before]
        told = ", ".join(f"{name} is {scores[name]:.3f}, was {before[name]:.3f}" for name in names)
        difference = max((abs(scores[name] - before[name]) for name in names), default=0.0)
        if difference > SAME_MODEL:
            raise InputError(
                f"{self.folder.name}: the base model differs from that of the earlier trials "
                f"({told}), so new trials would not compare. Give the earlier weights with "
                "--model-path, or start a new search."
            )
        if difference:
            self.console.print(
                f"[yellow]the base model answers a little differently than when the search "
                f"began:[/yellow] {told}; another machine may round differently"
            )

    def _compare_starts(self, model: Identity) -> None:
        """Say which starting points come from a search of a model that has the same name alone."""
        config, name = self.plan.config, self.plan.spec.model.name
        for one in config.start_from if config.resume is None else ():
            with suppress(InputError):  # it is none of a search, or a file
                notes = StoredSearch.read(one, runs=config.output).study.notes
                changed = differing(model, notes.get("model") or {})
                if changed and notes["tags"]["model"] == name:
                    text = f"{one} searched another {name}: its {' and '.join(changed)} differ"
                    warn(self.console, text)

    def ended(self, row: TrialRow) -> None:
        """Show a trial that has ended, and write its run."""
        self._display.ended(row)
        self.tracker.search(self._stored(), status="RUNNING", trial=row.number)

    def _stored(self) -> StoredSearch:
        return StoredSearch(folder=self.folder, study=self.study.stored)

    def confirming(self, row: TrialRow) -> None:
        """Show that a setting is about to be evaluated in full."""
        asked = "held-out" if self.plan.config.holdout else "all"
        number_format = self._stored().number_format
        told = f"confirming trial {row.number} on {asked} questions in {number_format}"
        self._display.doing(told)

    def confirmed(self, row: TrialRow, outcome: Outcome, *, holds: bool) -> None:
        """Keep the best setting, or say why it is not the best."""
        self._display.doing(None)
        result, baseline = outcome.result, outcome.baseline
        if result is None or not holds:
            problem = "misses a constraint in the full evaluation"
            if result is None:
                self._unconfirmed = outcome.failure.reason if outcome.failure else NO_RESULT
                problem = f"could not be evaluated in full ({escape(self._unconfirmed)})"
            self.console.print(f"trial {row.number} {problem}; the next best is confirmed instead")
            return
        confirmed = {
            "number": row.number,
            "scores": dict(result.evaluation.scores),
            "max_new_tokens": result.max_new_tokens,
            "baseline": dict(baseline.evaluation.scores) if baseline is not None else None,
            "repeating": dict(result.evaluation.repeating),
            "whole_cost": result.evaluation.whole_cost,
        }
        self.study.note("confirmed", confirmed)
        write_best(self._stored(), self.plan)

    def generalising(self, row: TrialRow) -> None:
        """Show that further fits leave questions out."""
        self._display.doing(f"leaving retain questions out of further fits of trial {row.number}")

    def generalised(self, row: TrialRow, outcome: Outcome) -> None:
        """Note how likely the best keeps the bounds on new questions, or say why it is unknown."""
        self._display.doing(None)
        study, ranked, gap = self.study, [row, *best_first(self.study.rows())], None
        try:
            if outcome.failure is not None:
                raise InputError(outcome.failure.reason)
            if outcome.unseen:
                gap = gap_of(self._stored().answer_rows(row.number), outcome.unseen)
        except InputError as error:
            warn(self.console, f"how trial {row.number} does on new questions is unknown: {error}")
            return
        note = note_of_kept_again(study.distributions, study.told, ranked, self._goal, gap)
        study.note("new_questions", note)

    def _conclude(self, ending: str | None, *, killed: bool) -> None:
        """Write what is made of the study, MLflow's runs among it, and show the result."""
        self.study.note("ending", ending)
        self.study.note("status", "KILLED" if killed else "FINISHED")
        results = SearchResults.read(self.folder.path)
        write_mirrors(self.folder, results)
        if not self.tracker.search(results, note=short_report(results)):
            self.console.print(
                "[yellow]MLflow does not have the whole search:[/yellow] when it answers "
                "again, write the rest with python -m lunar_tune.compare "
                f"{escape(shlex.quote(str(self.folder.path)))}",
                soft_wrap=True,
            )
        if ending is None:  # the last word: nothing of a search that has it is done again
            self.study.note("num_trials", self.plan.config.num_trials)
        commands = {}
        if self.arguments is not None:
            commands = next_commands(self.plan.config, self.folder.path, results, self.arguments)
        print_result(self.console, results, folder=self.folder.path, commands=commands)
