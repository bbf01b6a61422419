"""A fine-tuning as the screen shows it while it goes on, and as MLflow's run when it is over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.finetuning.finetune_job import FinetuneJob
from lunar_tune.report.progress_bars import build_progress
from lunar_tune.search.display.log_file import RECORD
from lunar_tune.tracking.runs import Columns, RunContent

if TYPE_CHECKING:
    from lunar_tune.finetuning.finetune import Finetuned

__all__ = ["finetuning_content", "finetuning_tables", "shown_training"]

OnStart = Callable[[int], None]
"""Called before the training with the epochs that an earlier attempt has done."""
OnEpoch = Callable[[int, float], None]
"""Called after each epoch with the epochs done and the mean loss."""


@contextmanager
def shown_training(
    job: FinetuneJob, console: Console, *, kept_in: Path
) -> Iterator[tuple[OnStart, OnEpoch, dict[int, float]]]:
    """Give what a training calls as it goes on, and the losses that it has told so far.

    Args:
        job: What is trained.
        console: Where to show progress.
        kept_in: Folder in which an unfinished training is kept, to show.
    """
    epochs, losses = job.settings.epochs, dict[int, float]()
    with build_progress(console) as bar:

        def on_start(done: int) -> None:
            if done:
                console.print(f"going on after epoch {done}, which was kept in {kept_in}")
            bar.add_task("fine-tuning", total=epochs, completed=done, note="")

        def on_epoch(done: int, loss: float) -> None:
            losses[done] = loss
            bar.update(bar.task_ids[0], completed=done, note=f"loss {loss:.4f}")
            line = f"epoch {done}/{epochs}  loss {loss:.4f}"
            if console.is_terminal:
                RECORD.info("%s", line)
            else:
                console.print(line, highlight=False)

        yield on_start, on_epoch, losses


def finetuning_content(
    job: FinetuneJob,
    name: str,
    *,
    started: datetime,
    losses: Mapping[int, float],
    known: Mapping[str, float],
    tables: Mapping[str, Columns] | None = None,
) -> RunContent:
    """Return the MLflow run of a fine-tuning.

    Args:
        job: What was trained.
        name: Of the checkpoint.
        started: When, in local time.
        losses: By epoch.
        known: What the model knows: `rouge1` and `refused`.
        tables: To be kept with the run, by place.
    """
    document = job.document()
    return RunContent(
        name=f"finetune {name}",
        status="FINISHED",
        started=started,
        ended=datetime.now(),
        parameters=document,
        tags={"command": "finetune", "model": job.model.name, "data": job.data_name},
        numbers={key: known[key] for key in ("rouge1", "refused")},
        curves={"loss": sorted(losses.items())},
        data={"learned": (document["data_digest"], len(job.records))},
        tables={at: ("", functools.partial(dict, table)) for at, table in (tables or {}).items()},
    )


def finetuning_tables(done: Finetuned, *, text: bool) -> dict[str, Columns]:
    """Return what a model knows as tables: by edge, and by question.

    Args:
        done: What came out.
        text: Whether questions and answers may be kept.
    """
    edges, rows = done.knowledge.by_edge, done.knowledge.rows
    texts = {
        "question": [row.record.question for row in rows],
        "truth": [row.record.answer for row in rows],
        "answer": [row.answer for row in rows],
    }
    return {
        "rouge1_by_edge.json": {
            "edge": list(edges),
            "questions": [count for _, count in edges.values()],
            "rouge1": [score for score, _ in edges.values()],
        },
        "answers.json": {
            "edge": [row.record.edge for row in rows],
            **(texts if text else {}),
            "rouge1": [row.rouge1 for row in rows],
        },
    }
