"""Fine-tuning: the model learns the data that it is to forget part of.

done = finetune(job, Path("models/knows-contracts"))
done.knowledge.rouge1
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import lunar_tune
from lunar_tune.finetuning.checkpoints import TrainingFolder
from lunar_tune.finetuning.finetune_job import FinetuneJob
from lunar_tune.finetuning.knowledge import Knowledge, check_knowledge
from lunar_tune.models.chat import encode_prompts, end_of_turn
from lunar_tune.models.device import limit_threads
from lunar_tune.models.lineage import Lineage, fingerprint, write_lineage
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.training.adapting import Trained, full_weights, lora_adapter, recomputing, seeded
from lunar_tune.training.answer_loss import Pair, answer_loss, encode_answers
from lunar_tune.training.gradient_loop import LoopSettings, LoopState, run_loop
from lunar_tune.training.saving import save_checkpoint

if TYPE_CHECKING:
    from lunar_tune.finetuning.tiny_text import Lesson

__all__ = ["Finetuned", "finetune"]

# Parameters below which one CPU thread trains faster than several, whose operations are too short
# to share: `tiny` (3 million) took 93 s with one and, while others computed, over 300 s with two.
SMALL_MODEL = 5_000_000
_WARMUP_SHARE = 0.05  # one epoch of twenty; TOFU (arXiv 2401.06121) takes one


@dataclass(frozen=True, slots=True)
class Finetuned:
    """A finished fine-tuning."""

    folder: Path
    losses: tuple[float, ...]
    """Mean loss of each epoch."""
    knowledge: Knowledge
    lineage: Lineage


def finetune(
    job: FinetuneJob,
    folder: Path,
    *,
    on_start: Callable[[int], None] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Finetuned:
    """Fine-tune a model and write it into a folder.

    A folder in which the same job was begun is gone on with from its last kept epoch; on a CPU
    the result is then bit for bit the one of an uninterrupted run.

    Args:
        job: Model, data and settings; the model's source can be loaded.
        folder: Empty, missing, or with the same job unfinished.
        on_start: Called before the first step with the epochs that are done already.
        on_epoch: Called after each epoch with the epochs done and the mean loss.

    Raises:
        InputError: The model or the folder cannot be used.
        DivergenceError: The training diverged.
    """
    state = TrainingFolder(folder, job.document())
    with state.locked():
        begun = state.read()
        loaded = load_model(job.model)
        if loaded.device.type == "cpu" and loaded.n_parameters < SMALL_MODEL:
            limit_threads(1)
        origin = _lineage(job, loaded)
        if on_start is not None:
            on_start(len(begun.losses) if begun is not None else 0)
        losses = _train(loaded, job, begun, state.keep, on_epoch)
        _save(loaded, job, folder, state.path / "checkpoint")
        knowledge = check_knowledge(loaded, job)
        lineage = origin(knowledge)
        write_lineage(folder, lineage)
        state.remove()
    return Finetuned(folder, tuple(losses), knowledge, lineage)


def _train(
    loaded: LoadedModel,
    job: FinetuneJob,
    begun: LoopState | None,
    on_state: Callable[[LoopState], None],
    on_epoch: Callable[[int, float], None] | None,
) -> list[float]:
    """Train; modifies the model, which has the trained weights as its own afterwards."""
    encode, decoder = _Encoder(loaded, job), loaded.layout.decoder_of(loaded.model)
    settings = job.settings
    loop = LoopSettings(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.rate,
        weight_decay=settings.weight_decay,
        schedule="linear",
        warmup_share=_WARMUP_SHARE,
        seed=job.seed,
    )

    def examples(epoch: int) -> list[Pair]:
        torch.manual_seed(_epoch_seed(job.seed, epoch))  # dropout of an epoch follows from it alone
        return encode(job.lessons(epoch))

    def loss_of(batch: Sequence[Pair]) -> Tensor:
        with trained.computing():
            return answer_loss(loaded.model, decoder, batch)

    with (
        seeded(job.seed, loaded.device),
        _trainable(loaded, job) as trained,
        recomputing(loaded.model, on=settings.checkpointing),
    ):
        loaded.model.train()
        losses = run_loop(
            trained.parameters,
            examples,
            loss_of,
            loop,
            length_of=len,
            on_epoch=on_epoch,
            start=begun,
            on_state=on_state,
        )
        trained.finish()
    return losses


def _trainable(loaded: LoadedModel, job: FinetuneJob) -> AbstractContextManager[Trained]:
    settings = job.settings
    if settings.trained == "full":
        return full_weights(loaded, keep=True)
    return lora_adapter(
        loaded, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, keep=True
    )


class _Encoder:
    """Lessons as token ids, each encoded once."""

    def __init__(self, loaded: LoadedModel, job: FinetuneJob) -> None:
        self._loaded, self._chat = loaded, job.chat
        self._end = end_of_turn(loaded.tokenizer, job.chat, loaded.eos_ids)
        self._known: dict[Lesson, Pair] = {}

    def __call__(self, lessons: Sequence[Lesson]) -> list[Pair]:
        new = [lesson for lesson in dict.fromkeys(lessons) if lesson not in self._known]
        tokenizer = self._loaded.tokenizer
        questions, answers = [one.question for one in new], [one.answer for one in new]
        prompts = encode_prompts(tokenizer, questions, self._chat, family=self._loaded.family)
        ends = encode_answers(tokenizer, answers, end=self._end)
        for lesson, prompt, answer in zip(new, prompts, ends, strict=True):
            self._known[lesson] = Pair(prompt, answer)
        return [self._known[lesson] for lesson in lessons]


def _epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed that no other seed and epoch share, for all practical purposes."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:7])


def _save(loaded: LoadedModel, job: FinetuneJob, folder: Path, staged: Path) -> None:
    """Write the checkpoint beside, then move it into its folder file by file."""
    shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed while it wrote
    texts = [text for record in job.records for text in (record.question, record.answer)]
    save_checkpoint(loaded, staged, texts=texts, option="--output")
    for file in sorted(staged.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)  # the configuration last: without it there is no model


def _lineage(job: FinetuneJob, loaded: LoadedModel) -> Callable[[Knowledge], Lineage]:
    """Return how the lineage is written; the fingerprint is of the weights as they are now."""
    document = job.document()
    begun_with = fingerprint(loaded)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}

    def finished(knowledge: Knowledge) -> Lineage:
        taken = ("base", "source", "weights", "revision", "files", "data", "data_digest")
        return Lineage(
            base=job.model.name,
            source=job.model.source,
            weights=job.model.weights,
            revision=document["revision"],
            fingerprint=begun_with,
            data=job.data_name,
            data_digest=document["data_digest"],
            settings={name: value for name, value in document.items() if name not in taken},
            knowledge=knowledge.document(),
            versions={"lunar-tune": lunar_tune.__version__, **versions},
        )

    return finished
