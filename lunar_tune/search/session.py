"""A search under way: its trials, its confirmation, its records.

Covers: describing the search here and in MLflow, running and mirroring trials, confirming the best
feasible ones in full until one keeps the floor, ending cleanly after an interruption.
Does not cover: what comes before the first trial (`run`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from lunar_tune.data.records import records_digest
from lunar_tune.errors import LunarTuneError
from lunar_tune.reporting.report import Report
from lunar_tune.reporting.rows import RUNNING, TrialRow, best_first
from lunar_tune.search.cluster import Resources, call_on_worker
from lunar_tune.search.config import config_document
from lunar_tune.search.outputs import Folder, best_document, short_trials, write_best
from lunar_tune.search.plan import SearchPlan
from lunar_tune.search.progress import SearchProgress
from lunar_tune.search.study import Study
from lunar_tune.search.summary import next_commands, print_result
from lunar_tune.search.tracking import SearchTracker, without_password

__all__ = [
    "EXIT_FAILURES",
    "EXIT_FOUND",
    "EXIT_INFEASIBLE",
    "EXIT_INTERRUPTED",
    "SearchSession",
]

EXIT_FOUND, EXIT_INFEASIBLE, EXIT_FAILURES, EXIT_INTERRUPTED = 0, 3, 4, 130
# Candidates whose full evaluation is tried before the search is called infeasible.
CONFIRMATIONS = 5


class SearchSession:
    """A search under way: what its stages share.

    Args:
        plan: What is searched, checked and with a model that can be loaded.
        folder: Where everything is written.
        resources: Of a trial.
        tracker: The MLflow mirror, open.
        vanilla: The unmodified model's scores.
    """

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
            dataclasses.replace(config, tracking_uri=without_password(config.tracking_uri)),
            given=given,
            derived={
                "name": self.folder.name,
                "tracking_uri": without_password(self.tracker.uri),
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
        code, ending, problem = EXIT_INFEASIBLE, None, None
        best = confirmed = None
        try:
            if self._trials(console):
                failures = self.plan.config.max_failures
                code, ending = EXIT_FAILURES, f"Stopped after {failures} failed trials in a row."
            with console.status("evaluating the best setting in full"):
                best, confirmed = self._confirm(console)
        except KeyboardInterrupt:
            code, ending = EXIT_INTERRUPTED, "Interrupted."
            self._end_running("interrupted")
        except LunarTuneError as error:
            problem, ending = error, f"The confirmation failed ({error})."
        report = Report(
            title=f"{self.plan.spec.model.name}, {self.plan.spec.data.name}: "
            f"forget {', '.join(self.plan.spec.data.forget_edges)}",
            facts={key.strip(): value for key, value in self.plan.facts.items()},
            retain_floor=self.plan.config.retain_floor,
            vanilla=self.vanilla,
            rows=self.study.rows(),
            best=best,
            confirmed=confirmed,
            ending=ending,
        )
        files = self.folder.write_mirrors(report)
        self._close_mirror(files, status="KILLED" if code == EXIT_INTERRUPTED else "FINISHED")
        commands = next_commands(self.plan.config, self.folder.path, best, arguments)
        print_result(console, report, folder=self.folder.path, commands=commands)
        if problem is not None:
            raise problem
        return EXIT_FOUND if best is not None and code == EXIT_INFEASIBLE else code

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
                on_start=self._mirror_start,
                on_end=on_end,
            )

    def _mirror_start(self, row: TrialRow) -> None:
        """Open a trial's run; a mirror that fails is caught up with at the end."""
        with self.tracker.tolerating():
            name = f"{self.plan.spec.method.name} {row.label}"
            self.tracker.start(row, name=name, tags=self._tags())

    def _mirror(self, row: TrialRow) -> None:
        from lunar_tune.search.trainable import answers_path

        if row.number not in self.tracker.running():
            self._mirror_start(row)
        with self.tracker.tolerating():
            self.tracker.end(row, answers_path(self.folder.path, row.number))

    def _close_mirror(self, files: Sequence[Path], *, status: str) -> None:
        """Mirror what could not be mirrored so far, and close the search's run."""
        for row in self.study.rows():
            if row.state != RUNNING and row.number not in self.tracker.mirrored:
                self._mirror(row)
        with self.tracker.tolerating():
            self.tracker.log_files(files)
            self.tracker.close(status=status)

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
        with self.tracker.tolerating():
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
