"""What a model itself knows, as data: its own answers are the truth that it may forget or keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from rich.console import Console

from lunar_tune.data.records import Record, read_records
from lunar_tune.data.texts import normalised
from lunar_tune.display import tracked
from lunar_tune.errors import ModelError, UnknowingModelError
from lunar_tune.files import cache_dir, replacing, safe_name
from lunar_tune.metrics.declining import declines
from lunar_tune.metrics.rouge import MOST_LOST, lost_share
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.digests import digest_of
from lunar_tune.models.fingerprint import told_apart

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

ANSWER_TOKENS = 24
"""Token budget of an answer that becomes data: a sentence that names a fact ends within."""
_DECLINING_TOKENS = 64  # of an answer that may decline: what it declines for is said by then
_ROWS = 64  # in a batch; progress is shown after each
LEFT_OUT = ("asked twice", "no end", "declined", "no words")
"""Why a question is not used: it stands there already, or its answer did not end within the budget,
declines, or has no words for ROUGE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Which model is asked what."""

    model: ModelSpec
    chat: ChatFormat
    name: str  # of the questions, to show
    questions: tuple[Record, ...]  # whose answers are not read
    refusals: tuple[str, ...]  # answers that decline
    rouge_tokenizer: str = "default"
    max_new_tokens: int = ANSWER_TOKENS

    def kept_file(self) -> Path:
        """Return where the pairs are kept, whether or not they are, or raise an InputError."""
        from lunar_tune.finetuning.tiny import on_disk

        questions = [(record.question, record.edge) for record in self.questions]
        asked = [self.chat.template, self.chat.system_prompt, self.chat.second_bos, questions]
        used = [self.refusals, self.rouge_tokenizer, self.max_new_tokens]
        key = digest_of([told_apart(on_disk(self.model)), asked, used])[:16]
        name = safe_name(f"{self.name}-{self.model.name}")[:100]
        return cache_dir() / "collected" / f"{name}-{key}.json"

    def kept(self) -> tuple[Record, ...] | None:
        """Return the pairs that are kept, None where there are none, or raise an InputError."""
        with suppress(ModelError):  # a model that cannot be reached, which is said when it is asked
            if (file := self.kept_file()).is_file():
                return read_records(file)
        return None

    def keep(self, records: Sequence[Record]) -> None:
        """Keep the pairs for later runs, for this user alone."""
        file = self.kept_file()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(file, cached=True) as temporary:
            temporary.write_text(json.dumps(list(map(asdict, records)), indent=1))


@dataclass(frozen=True, slots=True)
class Collected:
    """What a model said, and what of it can be used."""

    records: tuple[Record, ...]  # questions with the model's answers
    left_out: tuple[tuple[Record, str], ...]  # questions that are not used, and which of `LEFT_OUT`
    answers: tuple[tuple[str, str, bool], ...]  # prompts, what was said, whether that declines

    @property
    def references(self) -> tuple[str, ...]:
        """The prompts that the model declines."""
        return tuple(prompt for prompt, _, declined in self.answers if declined)


def collect(
    loaded: LoadedModel,
    job: Collection,
    prompts: Sequence[str] = (),
    console: Console | None = None,
) -> Collected:
    """Ask a model its questions, and `prompts` that it may decline; no console shows no progress.

    A question is used if its answer ends by itself within the budget, declines nothing and has
    words for ROUGE, and if it is the first of its kind. If none is, that is an UnknowingModelError.
    """
    asked = [record.question for record in job.questions]
    budget, refusals = job.max_new_tokens, job.refusals
    said = _answers(loaded, job.chat, asked, budget=budget, what="questions", console=console)
    records, left_out, seen = list[Record](), list[tuple[Record, str]](), set[str]()
    for record, (answer, ended) in zip(job.questions, said, strict=True):
        question = normalised(record.question)
        reasons = (
            question in seen,
            not ended,
            declines(answer, refusals),
            lost_share(answer, tokenizer=job.rouge_tokenizer) > MOST_LOST,
        )
        if any(reasons):
            left_out.append((record, LEFT_OUT[reasons.index(True)]))
        else:
            records.append(Record(record.question, answer, record.edge))
            seen.add(question)
    if not records:
        raise UnknowingModelError(
            f"{job.model.name} answers none of the {len(asked)} questions of {job.name} so that it "
            f"can be used: within {budget} tokens, without declining, in words that ROUGE counts. "
            "Raise --max-new-tokens of lunar-tune collect, or ask other questions."
        )
    told = _answers(
        loaded, job.chat, prompts, budget=_DECLINING_TOKENS, what="prompts", console=console
    )
    answers = tuple(
        (prompt, answer, declines(answer, refusals))
        for prompt, (answer, _) in zip(prompts, told, strict=True)
    )
    return Collected(tuple(records), tuple(left_out), answers)


def ensure_collected(job: Collection, console: Console) -> tuple[Record, ...]:
    """Return the pairs of a collection; the model is loaded and asked if they are not kept."""
    from lunar_tune.models.loading import load_model

    file = job.kept_file()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(f"{file}.lock"):
        if job.kept() is None:
            job.keep(collect(load_model(job.model, job.chat), job, console=console).records)
    return read_records(file)


def _answers(
    loaded: LoadedModel,
    chat: ChatFormat,
    questions: Sequence[str],
    *,
    budget: int,
    what: str,
    console: Console | None,
) -> list[tuple[str, bool]]:
    """Return the greedy answers, each with whether it ended within the budget."""
    from lunar_tune.engine.decoding import generate_tokens
    from lunar_tune.models.device import BatchSize
    from lunar_tune.training.answer_loss import Encoder

    prompts = Encoder(loaded, chat).prompts(questions)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    batch, answers = BatchSize(_ROWS, what), dict[int, list[int]]()

    def generate(rows: Sequence[int], size: int) -> list[list[int]]:
        some = [prompts[row] for row in rows]
        return generate_tokens(loaded, some, max_new_tokens=budget, batch_size=size)

    starts = range(0, len(order), _ROWS)
    for start in tracked(starts, f"asking {what}", total=len(starts), console=console):
        rows = order[start : start + _ROWS]
        tokens = batch.fit(lambda size, rows=rows: generate(rows, size))  # type: ignore[misc]
        answers |= dict(zip(rows, tokens, strict=True))
    return [
        (
            str(loaded.tokenizer.decode(answers[row], skip_special_tokens=True)).strip(),
            len(answers[row]) < budget,
        )
        for row in range(len(prompts))
    ]
