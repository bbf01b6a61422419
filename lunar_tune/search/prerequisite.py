"""What a search may need before its first trial: a model that is fine-tuned on the data.

Also how a fine-tuning is shown while it goes on, and its run in MLflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from lunar_tune.config.run_options import TINY
from lunar_tune.finetuning.finetune import Finetuned, ensure_finetuned, kept_folder
from lunar_tune.finetuning.finetune_job import FinetuneJob, settings_for
from lunar_tune.models.catalog import CATALOG
from lunar_tune.models.device import give_back
from lunar_tune.models.lineage import read_lineage
from lunar_tune.report.progress_bars import build_progress
from lunar_tune.search.display.log_file import tell
from lunar_tune.search.plan import SearchPlan
from lunar_tune.tracking.runs import Columns, RunContent
from lunar_tune.tracking.sync import Tracker
from lunar_tune.trial.assemble import assemble_finetuning

__all__ = [
    "finetune_first",
    "finetuning_content",
    "finetuning_fact",
    "finetuning_job",
    "finetuning_tables",
    "shown_training",
]

# What `tiny` knows because it was built with it.
KNOWN_TO_TINY = {"mini", "factual"}
# Operations a second in training, for a rough forecast: a GPU of 2023 at a tenth of its best, and
# two CPU cores (measured: 8 million parameters, 1.1 million tokens, 327 s).
SPEED = {"cuda": 1e14, "cpu": 1.5e11}
TOKENS_PER_WORD, TEMPLATE_TOKENS = 1.5, 30  # of question and answer; of a chat template's turn
OnStart = Callable[[int], None]
"""Called before the training with the epochs that an earlier attempt has done."""
OnEpoch = Callable[[int, float], None]
"""Called after each epoch with the epochs done and the mean loss."""


def _may_finetune(plan: SearchPlan) -> bool:
    """Say whether a search may fine-tune its model.

    Not a `--model-path`, where a wrong template can look like ignorance; not on a cluster, whose
    nodes share no cache.
    """
    config, spec = plan.config, plan.spec
    knows = spec.model.name == TINY and spec.data.name in KNOWN_TO_TINY
    return (
        config.finetune == "auto"
        and spec.model.name in CATALOG
        and spec.model.weights is None
        and config.address is None
        and not knows
    )


def finetuning_fact(plan: SearchPlan) -> dict[str, str]:
    """Return what the plan says of a fine-tuning that may come first."""
    if not _may_finetune(plan):
        return {}
    spec, data = plan.spec, plan.spec.data
    settings = settings_for(spec.model.name)
    records = {*data.fit_forget, *data.fit_retain}
    words = sum(len(r.question.split()) + len(r.answer.split()) for r in records)
    tokens = (TOKENS_PER_WORD * words + TEMPLATE_TOKENS * len(records)) * settings.epochs
    parameters = CATALOG[spec.model.name].billions * 1e9
    gpu = spec.model.device != "cpu" and torch.cuda.is_available()
    minutes = 6 * parameters * tokens / SPEED["cuda" if gpu else "cpu"] / 60
    shown = f"{max(1, round(minutes))} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    return {
        "fine-tuning": "first, if the model does not know the data: "
        f"{settings.trained}, {settings.epochs} epochs of {len(records)} pairs, roughly {shown}; "
        "kept for all later searches (--finetune never leaves it out)"
    }


def finetuning_job(plan: SearchPlan) -> FinetuneJob | None:
    """Return the fine-tuning that a search may do, or that an earlier one has done."""
    if not _may_finetune(plan):
        return None
    options = dataclasses.replace(plan.config, seed=0)  # one model serves every seed
    job = assemble_finetuning(options, settings_for(plan.spec.model.name))
    return dataclasses.replace(job, model=plan.spec.model)


def finetune_first(job: FinetuneJob, console: Console, tracker: Tracker) -> None:
    """Fine-tune, show it, and keep a run of it in MLflow.

    Raises:
        DivergenceError: The training diverged.
    """
    folder = kept_folder(job)
    started = datetime.now()
    with shown_training(job, console, kept_in=folder) as (on_start, on_epoch, losses):
        ensure_finetuned(job, on_start=on_start, on_epoch=on_epoch)
    give_back()  # the workers are about to use the same GPU
    lineage = read_lineage(folder)
    if lineage is None:
        raise AssertionError("a finished fine-tuning has a lineage")
    known = lineage.knowledge
    if losses:  # else another process has trained it, and has the run
        tracker.write(
            finetuning_content(job, folder.name, started=started, losses=losses, known=known)
        )
    console.print(
        f"fine-tuned: ROUGE-1 {known['rouge1']:.3f} on {lineage.data}, declines "
        f"{known['refused']:.0%} of questions about invented things; kept in {folder}",
        soft_wrap=True,
    )


@contextmanager
def shown_training(
    job: FinetuneJob, console: Console, *, kept_in: Path
) -> Iterator[tuple[OnStart, OnEpoch, dict[int, float]]]:
    """Give what a training calls as it goes on, and the losses that it has told so far."""
    epochs, losses = job.settings.epochs, dict[int, float]()
    with build_progress(console) as bar:

        def on_start(done: int) -> None:
            if done:
                console.print(f"going on after epoch {done}, which was kept in {kept_in}")
            bar.add_task("fine-tuning", total=epochs, completed=done, note="")

        def on_epoch(done: int, loss: float) -> None:
            losses[done] = loss
            bar.update(bar.task_ids[0], completed=done, note=f"loss {loss:.4f}")
            tell(console, f"epoch {done}/{epochs}  loss {loss:.4f}")

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
    """Return the MLflow run of a fine-tuning that has just ended.

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
        metrics={
            **{key: known[key] for key in ("rouge1", "refused")},
            "loss": sorted(losses.items()),
        },
        data={"learned": (document["data_digest"], len(job.records))},
        tables=tables or {},
    )


def finetuning_tables(done: Finetuned, *, text: bool) -> dict[str, Columns]:
    """Return what a model knows as tables: by edge, and by question with `text` or without."""
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
