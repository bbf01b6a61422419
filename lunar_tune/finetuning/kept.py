"""A fine-tuned model made once and used ever after.

folder = ensure_finetuned(job)     # trains the first time, nothing after that
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from lunar_tune.files import cache_dir, safe_name
from lunar_tune.finetuning.finetune_job import FinetuneJob
from lunar_tune.models.lineage import read_lineage

__all__ = ["ensure_finetuned", "kept_folder"]


def kept_folder(job: FinetuneJob) -> Path:
    """Return where a job's model is kept, whether or not it is there."""
    name = safe_name(f"{job.model.name}-{job.data_name}")
    return cache_dir() / "models" / f"finetuned-{name}-{job.key()}"


def ensure_finetuned(
    job: FinetuneJob,
    *,
    on_start: Callable[[int], None] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Path:
    """Return the folder of the fine-tuned checkpoint; make it if it is not there.

    Whether the model knows its data after all is in its lineage (`read_lineage`).

    Args:
        job: Model, data and settings.
        on_start: Called before the training with the epochs that an earlier attempt has done.
        on_epoch: Called after each epoch with the epochs done and the mean loss.

    Raises:
        InputError: The model cannot be loaded, or its folder cannot be written.
        DivergenceError: The training diverged.
    """
    folder = kept_folder(job)
    if _is_finished(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # it knows private data
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not _is_finished(folder):
            from lunar_tune.finetuning.finetune import finetune  # loads torch

            finetune(job, folder, on_start=on_start, on_epoch=on_epoch)
    return folder


def _is_finished(folder: Path) -> bool:
    """Say whether the model is there; its lineage is what is written last."""
    return read_lineage(folder) is not None
