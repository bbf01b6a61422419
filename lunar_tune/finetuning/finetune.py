"""Fine-tuning: a model learns data that it is to forget part of, and is asked what it knows."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from lunar_tune.data.records import Record
from lunar_tune.data.splits import generate_unverifiable
from lunar_tune.engine.decoding import answer_texts, token_budget
from lunar_tune.files import cache_dir, safe_name
from lunar_tune.finetuning.finetune_job import UNSEEN, FinetuneJob
from lunar_tune.metrics.declining import declines
from lunar_tune.metrics.rouge import rouge_recall
from lunar_tune.models.catalog import Lineage, read_lineage
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.device import limit_threads
from lunar_tune.models.fingerprint import fingerprint
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.training import TrainingSettings
from lunar_tune.training.adapting import Fit, trainable
from lunar_tune.training.answer_loss import Encoder, Pair, answer_states
from lunar_tune.training.checkpoints import TrainingFolder, package_versions, save_checkpoint
from lunar_tune.training.gradient_loop import LoopState, train_epochs

if TYPE_CHECKING:
    import pandas as pd

# Parameters below which one CPU thread trains faster than several, whose operations are too short
# to share: `tiny` (3 million) took 93 s with one and, while others computed, over 300 s with two.
_SMALL_MODEL = 5_000_000
_WARMUP_SHARE = 0.05  # one epoch of twenty; TOFU (arXiv 2401.06121) takes one
_UNANSWERABLE = 50


@dataclass(frozen=True, slots=True)
class Finetuned:
    """A finished fine-tuning: how it went, and what the model knows after it."""

    losses: tuple[float, ...]  # mean loss of each epoch
    answers: pd.DataFrame
    """A row for each question of the data, in its order: edge, question, truth, answer, rouge1."""
    refused: float  # share of prompts about invented things, none trained on, that are declined

    @property
    def rouge1(self) -> float:
        """Mean ROUGE-1 recall over all questions."""
        return fmean(self.answers["rouge1"])

    @property
    def by_edge(self) -> pd.DataFrame:
        """Number of questions and mean ROUGE-1 by edge, in the order of the data."""
        scores = self.answers.groupby("edge", sort=False)["rouge1"]
        return scores.agg(questions="size", rouge1="mean")


def kept_folder(job: FinetuneJob) -> Path:
    """Return where a job's model is kept, whether or not it is there."""
    name = safe_name(f"{job.model.name}-{job.data_name}")
    return cache_dir() / "models" / f"finetuned-{name}-{job.key()}"


def ensure_finetuned(job: FinetuneJob, train: Callable[[FinetuneJob, Path], object]) -> Path:
    """Return the folder of the fine-tuned checkpoint; `train` makes it if it is not there."""
    folder = kept_folder(job)
    if read_lineage(folder) is not None:  # what is written last
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # it knows private data
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if read_lineage(folder) is None:
            train(job, folder)
    return folder


def finetune(
    job: FinetuneJob,
    folder: Path,
    *,
    on_start: Callable[[int], None] = lambda _: None,
    on_epoch: Callable[[int, float], None] = lambda _done, _loss: None,
) -> Finetuned:
    """Fine-tune a model and write it into a folder, or raise an InputError or a DivergenceError.

    A folder in which the same job was begun is gone on with from its last kept epoch; on a CPU
    the result is then bit for bit the one of an uninterrupted run. `on_start` is called with the
    epochs that are done already, `on_epoch` after each with their number and the mean loss.
    """
    document = job.document()
    state = TrainingFolder(folder, document)
    with state.locked():
        begun = state.read()
        loaded = load_model(job.trained_model, job.chat)
        if loaded.device.type == "cpu" and loaded.model.num_parameters() < _SMALL_MODEL:
            limit_threads(1)
        begun_with = fingerprint(loaded)
        on_start(len(begun.losses) if begun is not None else 0)
        losses = _train(loaded, job, begun, state.keep, on_epoch)
        staged = state.path / "checkpoint"
        shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed while it wrote
        texts = [text for record in job.records for text in (record.question, record.answer)]
        save_checkpoint(loaded, staged, texts=texts)
        for file in sorted(staged.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)  # that last: without it there is no model
        done = Finetuned(tuple(losses), *check_knowledge(loaded, job))
        _lineage(document, begun_with, done).write(folder)
        shutil.rmtree(state.path)
    return done


def _train(
    loaded: LoadedModel,
    job: FinetuneJob,
    begun: LoopState | None,
    on_state: Callable[[LoopState], None],
    on_epoch: Callable[[int, float], None],
) -> list[float]:
    """Train; modifies the model, which has the trained weights as its own afterwards."""
    settings = job.settings

    def lessons(epoch: int) -> list[Record]:
        # Dropout of an epoch follows from seed and epoch alone, which share it with no others.
        digest = hashlib.sha256(f"{job.seed}/{epoch}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7]))
        return job.lessons(epoch)

    losses = list(begun.losses) if begun is not None else []
    with trainable(loaded, settings, seed=job.seed, keep=True) as fit:
        for loss in learned(
            loaded,
            fit,
            job.chat,
            lessons,
            settings,
            learning_rate=settings.rate,
            seed=job.seed,
            warmup_share=_WARMUP_SHARE,
            start=begun,
            on_state=on_state,
        ):
            losses.append(loss)
            on_epoch(len(losses), loss)
        fit.finish()
    return losses


def learned(
    loaded: LoadedModel,
    fit: Fit,
    chat: ChatFormat,
    lessons: Callable[[int], Sequence[Record]],
    settings: TrainingSettings,
    **options: Any,
) -> Iterator[float]:
    """Train on the answers of an epoch's lessons, with the options of `train_epochs`."""
    encoder, decoder = Encoder(loaded, chat), loaded.layout.decoder_of(loaded.model)

    def loss_of(batch: Sequence[Pair]) -> Tensor:
        with fit.computing():  # a long answer counts for as many tokens as it has
            return -answer_states(loaded.model, decoder, batch).tokens.mean()

    def examples(epoch: int) -> Sequence[Pair]:
        return encoder.pairs(lessons(epoch))

    return train_epochs(loaded.model, examples, loss_of, settings, length_of=len, **options)


def check_knowledge(loaded: LoadedModel, job: FinetuneJob) -> tuple[pd.DataFrame, float]:
    """Ask a model everything that it was to learn, and what it cannot know; see `Finetuned`."""
    import pandas as pd

    truths = [record.answer for record in job.records]
    questions = [record.question for record in job.records]
    encoder = Encoder(loaded, job.chat)
    budget = token_budget(None, encoder.texts(truths))

    def answers_to(texts: Sequence[str]) -> list[str]:
        prompts = encoder.prompts(texts)
        said = answer_texts(loaded, prompts, max_new_tokens=budget, what="what it was taught")
        return [answer for answer, _ in said]

    known = answers_to(questions)
    declined = answers_to(generate_unverifiable(_UNANSWERABLE, seed=UNSEEN))
    answers = pd.DataFrame(job.records).rename(columns={"answer": "truth"})
    answers["answer"] = known
    answers["rouge1"] = [
        rouge_recall(truth, answer, job.rouge_tokenizer).rouge1
        for truth, answer in zip(truths, known, strict=True)
    ]
    return answers[["edge", "question", "truth", "answer", "rouge1"]], fmean(
        declines(answer, job.refusals) for answer in declined
    )


def _lineage(document: Mapping[str, Any], begun_with: str, done: Finetuned) -> Lineage:
    named = ("base", "source", "weights", "revision", "data", "data_digest")
    return Lineage(
        **{name: document[name] for name in named},
        fingerprint=begun_with,
        settings={name: value for name, value in document.items() if name not in (*named, "files")},
        knowledge={
            "rouge1": done.rouge1,
            "rouge1_by_edge": done.by_edge["rouge1"].to_dict(),
            "rows": len(done.answers),
            "refused": done.refused,
            "refused_rows": _UNANSWERABLE,
        },
        versions=package_versions(),
    )
