"""The MLflow run of a fine-tuning.

Covers: what is trained, the loss of each epoch, what the model knows in the end.
Does not cover: the store and the run itself (`tracked_run`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.finetuning.finetune_job import FinetuneJob
from lunar_tune.report.progress_bars import build_progress
from lunar_tune.search.display.log_file import RECORD
from lunar_tune.tracking.store import default_tracking_uri
from lunar_tune.tracking.tracked_run import EXPERIMENT, TrackedRun

if TYPE_CHECKING:
    from lunar_tune.finetuning.finetune import Finetuned

__all__ = ["TrackedFinetuning"]

OnStart = Callable[[int], None]
"""Called before the training with the epochs that an earlier attempt has done."""
OnEpoch = Callable[[int, float], None]
"""Called after each epoch with the epochs done and the mean loss."""


class TrackedFinetuning:
    """The MLflow run of a fine-tuning; there is none before the training begins.

    Args:
        job: What is trained.
        output: Folder of the checkpoint; a default store is beside it.
        uri: Tracking URI; None takes the default store.
        experiment: MLflow experiment of the run.
    """

    def __init__(
        self, job: FinetuneJob, output: Path, uri: str | None, experiment: str = EXPERIMENT
    ) -> None:
        self._job, self._output, self._uri, self._experiment = job, output, uri, experiment
        self._logged: set[int] = set()
        self._is_opened = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, there is a run that says what is done; it is closed as it ended."""
        folder, name = self._output.resolve().parent, self._output.resolve().name
        uri = self._uri or default_tracking_uri(folder)
        self._run = TrackedRun(
            uri, output=folder, name=f"finetune {name}", experiment=self._experiment
        )
        self._is_opened = True
        status = "FAILED"
        try:
            self._describe()
            yield
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            with self._run.tolerating():
                self._run.close(status=status)

    @contextmanager
    def followed(self, console: Console, *, kept_in: Path) -> Iterator[tuple[OnStart, OnEpoch]]:
        """Give what a training calls as it goes on: it is shown, and recorded once it begins.

        Args:
            console: Where to show progress.
            kept_in: Folder in which an unfinished training is kept, to show.
        """
        with ExitStack() as stack:
            bar = stack.enter_context(build_progress(console))
            epochs = self._job.settings.epochs

            def on_start(done: int) -> None:
                if done:
                    console.print(f"going on after epoch {done}, which was kept in {kept_in}")
                stack.enter_context(self.opened())
                bar.add_task("fine-tuning", total=epochs, completed=done, note="")

            def on_epoch(done: int, loss: float) -> None:
                bar.update(bar.task_ids[0], completed=done, note=f"loss {loss:.4f}")
                line = f"epoch {done}/{epochs}  loss {loss:.4f}"
                if console.is_terminal:
                    RECORD.info("%s", line)
                else:
                    console.print(line, highlight=False)
                self.epoch(done, loss)

            yield on_start, on_epoch

    def _describe(self) -> None:
        job, document = self._job, self._job.document()
        with self._run.tolerating():
            self._run.describe(
                parameters=document,
                tags={"command": "finetune", "model": job.model.name, "data": job.data_name},
                texts={},
                data={"learned": (job.records, document["data_digest"])},
            )

    def epoch(self, done: int, loss: float) -> None:
        """Record an epoch's loss."""
        self._logged.add(done)
        with self._run.tolerating():
            self._run.log_metrics({"loss": loss}, step=done)

    def known(self, knowledge: Mapping[str, float]) -> None:
        """Record what the model knows; nothing where no run was opened."""
        if self._is_opened:
            with self._run.tolerating():
                names = ("rouge1", "refused")
                self._run.log_metrics({name: float(knowledge[name]) for name in names})

    def finished(self, result: Finetuned, *, text: bool = True) -> None:
        """Record what the model knows, and the losses of an earlier attempt's epochs.

        Args:
            result: What came out.
            text: Whether questions and answers may be kept.
        """
        knowledge = result.knowledge
        edges = knowledge.by_edge
        for epoch, loss in enumerate(result.losses, 1):
            if epoch not in self._logged:
                self.epoch(epoch, loss)
        self.known({"rouge1": knowledge.rouge1, "refused": knowledge.refused})
        with self._run.tolerating():
            self._run.log_table(
                {
                    "edge": list(edges),
                    "questions": [count for _, count in edges.values()],
                    "rouge1": [score for score, _ in edges.values()],
                },
                "rouge1_by_edge.json",
            )
            texts = {
                "question": [row.record.question for row in knowledge.rows],
                "truth": [row.record.answer for row in knowledge.rows],
                "answer": [row.answer for row in knowledge.rows],
            }
            self._run.log_table(
                {
                    "edge": [row.record.edge for row in knowledge.rows],
                    **(texts if text else {}),
                    "rouge1": [row.rouge1 for row in knowledge.rows],
                },
                "answers.json",
            )
