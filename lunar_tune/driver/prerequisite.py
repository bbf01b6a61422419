"""A fine-tuning that is shown and tracked; a search may need one before its first trial."""

from __future__ import annotations

import dataclasses
import functools
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.config.options import TINY
from lunar_tune.display import build_progress, say
from lunar_tune.driver.plan import SearchPlan, collection_of
from lunar_tune.finetuning.finetune_job import FinetuneJob
from lunar_tune.models.catalog import CATALOG, read_lineage
from lunar_tune.models.device import give_back
from lunar_tune.report.progress import tell
from lunar_tune.tracking.runs import RunContent
from lunar_tune.tracking.sync import Tracker
from lunar_tune.trial.assemble import assemble_finetuning, materialise
from lunar_tune.trial.collecting import ensure_collected

if TYPE_CHECKING:
    from lunar_tune.finetuning.finetune import Finetuned

# What `tiny` knows because it was built with it.
KNOWN_TO_TINY = {"mini", "factual"}
# Operations a second in training, for a rough forecast: a GPU of 2023 at a tenth of its best, and
# two CPU cores (measured: 8 million parameters, 1.1 million tokens, 327 s).
SPEED = {"cuda": 1e14, "cpu": 1.5e11}
TOKENS_PER_WORD, TEMPLATE_TOKENS = 1.5, 30  # of question and answer; of a chat template's turn


def finetuning_job(plan: SearchPlan) -> FinetuneJob | None:
    """Return the fine-tuning that a search may do, or that an earlier one has done.

    There is none where the model is asked what it knows, none for a `--model-path`, where a wrong
    template can look like ignorance, none on a cluster, whose nodes share no cache, and none where
    ignorance ends no search.
    """
    config, spec = plan.config, plan.spec
    if (
        config.finetune != "auto"
        or config.force
        or spec.data.own_answers
        or spec.model.name not in CATALOG
        or spec.model.weights is not None
        or config.address is not None
        or (spec.model.name == TINY and spec.data.name in KNOWN_TO_TINY)
    ):
        return None
    job = assemble_finetuning(dataclasses.replace(config, seed=0))  # one model serves every seed
    return dataclasses.replace(job, model=spec.model)


def finetuning_fact(plan: SearchPlan) -> dict[str, str]:
    """Return what the plan says of a fine-tuning that may come first."""
    job = finetuning_job(plan)
    if job is None:
        return {}
    import torch

    settings, records = job.settings, job.records
    words = sum(len(r.question.split()) + len(r.answer.split()) for r in records)
    tokens = (TOKENS_PER_WORD * words + TEMPLATE_TOKENS * len(records)) * settings.epochs
    operations = 6e9 * CATALOG[job.model.name].billions * tokens
    gpu = job.model.device != "cpu" and torch.cuda.is_available()
    minutes = operations / SPEED["cuda" if gpu else "cpu"] / 60
    shown = f"{max(1, round(minutes))} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    return {
        "fine-tuning": "first, if the model does not know the data: "
        f"{settings.trained}, {settings.epochs} epochs of {len(records)} pairs, roughly {shown}; "
        "kept for all later searches (to skip it: --finetune never)"
    }


def finetune_first(job: FinetuneJob, console: Console, tracker: Tracker, *, text: bool) -> None:
    """Fine-tune a search's model unless another process has done so; see `finetune_tracked`."""
    from lunar_tune.finetuning.finetune import ensure_finetuned

    train = functools.partial(finetune_tracked, console=console, tracker=tracker, text=text)
    folder = ensure_finetuned(job, train)
    give_back()  # the workers are about to use the same GPU
    if (lineage := read_lineage(folder)) is None:
        raise AssertionError("a finished fine-tuning has a lineage")
    known = lineage.knowledge
    say(
        console,
        f"fine-tuned: ROUGE-1 {known['rouge1']:.3f} on {lineage.data}, declines "
        f"{known['refused']:.0%} of questions about invented things; kept in {folder}",
    )


def ask_first(plan: SearchPlan, console: Console) -> None:
    """Ask a search's model what it knows, unless it has been asked; see `ensure_collected`."""
    job = materialise(collection_of(plan.config), console)
    if job.kept() is not None:  # another search has asked meanwhile, or a cell of the same table
        return
    say(console, f"asking {job.model.name} {len(job.questions)} questions of {job.name}")
    records = ensure_collected(job, console).records
    give_back()  # the workers are about to use the same GPU
    say(console, f"{len(records)} of its answers can be used; kept in {job.kept_file()}")


def finetune_tracked(
    job: FinetuneJob, folder: Path, *, console: Console, tracker: Tracker, text: bool
) -> Finetuned:
    """Fine-tune as `finetune` does, which says what it raises; show it, and keep a run in MLflow.

    Of what the model answers the run has the texts only if `text` is set.
    """
    from lunar_tune.finetuning.finetune import finetune

    started, epochs = datetime.now(), job.settings.epochs
    with build_progress(console) as bar:

        def on_start(done: int) -> None:
            if done:
                say(console, f"resuming after epoch {done}, which was kept in {folder}")
            bar.add_task("fine-tuning", total=epochs, completed=done, note="")

        def on_epoch(done: int, loss: float) -> None:
            bar.update(bar.task_ids[0], completed=done, note=f"loss {loss:.4f}")
            tell(console, f"epoch {done}/{epochs}  loss {loss:.4f}")

        done = finetune(job, folder, on_start=on_start, on_epoch=on_epoch)
    document, answers = job.document(), done.answers if text else done.answers[["edge", "rouge1"]]
    content = RunContent(
        name=f"finetune {folder.resolve().name}",
        status="FINISHED",
        started=started,
        ended=datetime.now(),
        parameters=document,
        tags={"command": "finetune", "model": job.model.name, "data": job.data_name},
        metrics={
            "rouge1": done.rouge1,
            "refused": done.refused,
            "loss": list(enumerate(done.losses, 1)),
        },
        data={"learned": (document["data_digest"], len(job.records))},
        tables={
            "rouge1_by_edge.json": done.by_edge.reset_index().to_dict("split", index=False),
            "answers.json": answers.to_dict("split", index=False),
        },
    )
    tracker.write(content)
    return done
