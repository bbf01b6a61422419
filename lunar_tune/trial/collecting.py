"""What a model itself knows, as data: its own answers are the truth that it may forget or keep."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from rich.console import Console

from lunar_tune.config.fields import options_again, options_of
from lunar_tune.config.options import COLLECTED_TOKENS, OWN_QUESTIONS, ModelOptions, RunOptions
from lunar_tune.data.records import Record, read_records
from lunar_tune.data.texts import normalised
from lunar_tune.display import say
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

_ASKED_WITH = (
    *("*config.json", "tokenizer*", "special_tokens_map*", "vocab*", "merges*"),
    *("chat_template*", "*.jinja"),
)
"""What in a model's folder its answers depend on beside its weights."""
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
    max_new_tokens: int = COLLECTED_TOKENS

    def kept_file(self) -> Path:
        """Return where the pairs are kept, whether or not they are, or raise an InputError."""
        from lunar_tune.finetuning.tiny import on_disk

        questions = [(record.question, record.edge) for record in self.questions]
        asked = [self.chat.template, self.chat.system_prompt, self.chat.second_bos, questions]
        used = [self.refusals, self.rouge_tokenizer, self.max_new_tokens]
        key = digest_of([told_apart(on_disk(self.model), *_ASKED_WITH), asked, used])[:16]
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
    left_out: tuple[tuple[Record, str], ...] = ()
    """Questions that are not used, and which of `LEFT_OUT`; of kept pairs that is not known."""


def asking_options(options: ModelOptions) -> tuple[str, ...]:
    """Return the options, to show, with which a model is asked and its answers are read."""
    return options_again(options, {*options_of(ModelOptions), "refusals", "rouge_tokenizer"})


def ask_command(options: RunOptions, *further: str) -> str:
    """Return the command that asks a model for its answers to a question set, which is the data."""
    asked = () if options.data in (None, OWN_QUESTIONS) else ("--questions", str(options.data))
    return shlex.join(
        ["python", "-m", "lunar_tune.collect", *asking_options(options), *asked, *further]
    )


def collect(loaded: LoadedModel, job: Collection, console: Console | None = None) -> Collected:
    """Ask a model its questions; no console shows no progress.

    A question is used if its answer ends by itself within the budget, declines nothing and has
    words for ROUGE, and if it is the first of its kind. If none is, that is an UnknowingModelError.
    """
    from lunar_tune.engine.decoding import answer_texts
    from lunar_tune.training.answer_loss import Encoder

    asked = [record.question for record in job.questions]
    budget, refusals = job.max_new_tokens, job.refusals
    prompts = Encoder(loaded, job.chat).prompts(asked)
    said = answer_texts(loaded, prompts, max_new_tokens=budget, what="questions", console=console)
    records, left_out, seen = list[Record](), list[tuple[Record, str]](), set[str]()
    for record, (text, ended) in zip(job.questions, said, strict=True):
        answer = text.strip()
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
    return Collected(tuple(records), tuple(left_out))


def ensure_collected(
    job: Collection, console: Console, loaded: LoadedModel | None = None
) -> Collected:
    """Return the pairs of a collection; the model, loaded if need be, is asked if none are kept."""
    from lunar_tune.models.loading import load_model

    file = job.kept_file()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(f"{file}.lock"):
        if (kept := job.kept()) is not None:
            say(console, f"kept answers are used; remove {file} to ask again")
            return Collected(kept)
        found = collect(loaded or load_model(job.model, job.chat), job, console)
        job.keep(found.records)
        return found
