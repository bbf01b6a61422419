"""What a search needs before its first trial: a model that knows the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime

import torch
from rich.console import Console

from lunar_tune.config.run_options import TINY
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.finetuning.finetune_job import FinetuneJob
from lunar_tune.finetuning.finetune_settings import settings_for
from lunar_tune.finetuning.kept import ensure_finetuned, kept_folder
from lunar_tune.models.catalog import CATALOG
from lunar_tune.models.device import give_back
from lunar_tune.models.lineage import read_lineage
from lunar_tune.search.finetuning_run import finetuning_content, shown_training
from lunar_tune.search.plan import SearchPlan
from lunar_tune.tracking.tracker import Tracker
from lunar_tune.trial.learning import assemble_finetuning
from lunar_tune.trial.spec import TrialSpec

__all__ = ["Prerequisite", "finetuning_fact"]

# What `tiny` knows because it was built with it.
KNOWN_TO_TINY = {"mini", "factual"}
# Operations a second in training, for a rough forecast: a GPU of 2023 at a tenth of its best, and
# two CPU cores (measured: 8 million parameters, 1.1 million tokens, 327 s).
SPEED = {"cuda": 1e14, "cpu": 1.5e11}
TOKENS_PER_WORD, TEMPLATE_TOKENS = 1.5, 30  # of question and answer; of a chat template's turn


def may_finetune(config: SearchConfig, spec: TrialSpec) -> bool:
    """Say whether a search may fine-tune its model.

    Not a `--model-path`, where a wrong template can look like ignorance; not on a cluster, whose
    nodes share no cache.
    """
    knows = spec.model.name == TINY and spec.data.name in KNOWN_TO_TINY
    return (
        config.finetune == "auto"
        and spec.model.name in CATALOG
        and spec.model.weights is None
        and config.address is None
        and not knows
    )


def finetuning_fact(config: SearchConfig, spec: TrialSpec) -> dict[str, str]:
    """Return what the plan says of a fine-tuning that may come first."""
    if not may_finetune(config, spec):
        return {}
    settings, data = settings_for(spec.model.name), spec.data
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


@dataclass(frozen=True, slots=True)
class Prerequisite:
    """A fine-tuning that a search may do, or that an earlier one has done."""

    job: FinetuneJob

    @classmethod
    def of(cls, plan: SearchPlan) -> Prerequisite | None:
        """Return a search's prerequisite; None where it may not fine-tune.

        Args:
            plan: Whose model can be loaded.
        """
        if not may_finetune(plan.config, plan.spec):
            return None
        # One model serves every seed.
        options = dataclasses.replace(plan.config, seed=0)
        job = assemble_finetuning(options, settings_for(plan.spec.model.name))
        return cls(dataclasses.replace(job, model=plan.spec.model))

    @property
    def is_kept(self) -> bool:
        """Whether an earlier search has done it."""
        return read_lineage(kept_folder(self.job)) is not None

    def applied(self, plan: SearchPlan) -> SearchPlan:
        """Return the plan with the fine-tuned weights."""
        model = dataclasses.replace(plan.spec.model, weights=str(kept_folder(self.job)))
        return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, model=model))

    def fulfil(self, console: Console, tracker: Tracker) -> None:
        """Fine-tune, show it, and keep a run of it in MLflow.

        Args:
            console: Where to show progress.
            tracker: Of the search's store.

        Raises:
            DivergenceError: The training diverged.
        """
        folder = kept_folder(self.job)
        started = datetime.now()
        with shown_training(self.job, console, kept_in=folder) as (on_start, on_epoch, losses):
            ensure_finetuned(self.job, on_start=on_start, on_epoch=on_epoch)
        give_back()  # the workers are about to use the same GPU
        lineage = read_lineage(folder)
        if lineage is None:
            raise AssertionError("a finished fine-tuning has a lineage")
        if losses:  # else another process has trained it, and has the run
            content = finetuning_content(
                self.job, folder.name, started=started, losses=losses, known=lineage.knowledge
            )
            tracker.write(content)
        console.print(
            f"fine-tuned: ROUGE-1 {lineage.knowledge['rouge1']:.3f} on {lineage.data}, declines "
            f"{lineage.knowledge['refused']:.0%} of questions about invented things; kept in "
            f"{folder}",
            highlight=False,
            soft_wrap=True,
        )
