"""The same questions to the unmodified and to the unlearned model, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.engine.decoding import generate_tokens
from lunar_tune.errors import InputError
from lunar_tune.trial.worker import Worker

if TYPE_CHECKING:
    from lunar_tune.methods.contract import Fit
    from lunar_tune.trial.spec import DataSets, TrialSpec

__all__ = ["ASKED_TOKENS", "Asker", "SideBySide", "asking", "check_asked_tokens", "check_questions"]

ASKED_TOKENS = 128
"""Token budget of an answer unless another is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """One question and what both models say."""

    question: str
    unmodified: str
    """As decoded, without special tokens."""
    unlearned: str
    truth: str | None
    """The true answer; None for a question that is not in the data."""
    set_name: str | None
    """forget, retain or factual; None for a question that is not in the data."""


@contextmanager
def asking(
    spec: TrialSpec,
    parameters: Mapping[str, Any],
    *,
    epochs: int | None = None,
    max_new_tokens: int = ASKED_TOKENS,
    cache_root: Path | None = None,
) -> Iterator[Asker]:
    """Inside, both models answer questions; the model is loaded and fitted once.

    Args:
        spec: What the trial shared with others; its model can be loaded.
        parameters: The trial's.
        epochs: After which the trial's fit ended; None goes to its end.
        max_new_tokens: Token budget of an answer.
        cache_root: Folder of activations on disk; None is the user's cache.

    Raises:
        InputError: Something that was asked for cannot be done.
        TrialError: The fit failed, for example by divergence.
    """
    check_asked_tokens(max_new_tokens)
    worker = Worker(dataclasses.replace(spec, metrics=()), cache_root=cache_root)
    with worker.preparation.unlearning(parameters, seed=spec.seed) as fit:
        for done in fit:
            if done == epochs:
                break
        fit.finished()
        yield Asker(worker, fit, max_new_tokens)


def check_asked_tokens(max_new_tokens: int) -> None:
    """Refuse a token budget in which nothing can be said.

    Raises:
        InputError: It is not positive.
    """
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: at least 1.")


def check_questions(questions: Sequence[str]) -> None:
    """Refuse questions in which nothing is asked.

    Raises:
        InputError: One is empty.
    """
    if not all(question.strip() for question in questions):
        raise InputError("a question is empty.")


class Asker:
    """Asks both models.

    Args:
        worker: With the model.
        fit: Which has unlearned it.
        max_new_tokens: Token budget of an answer.
    """

    def __init__(self, worker: Worker, fit: Fit, max_new_tokens: int) -> None:
        self._worker, self._fit, self._max_new_tokens = worker, fit, max_new_tokens
        self._known = _known(worker.spec.data)

    def ask(self, questions: Sequence[str]) -> list[SideBySide]:
        """Return both models' greedy answers, in the search's chat format and in one batch each.

        Raises:
            InputError: A question is empty.
        """
        check_questions(questions)
        with self._fit.unmodified():
            before = self._answers(questions)
        after = self._answers(questions)
        nothing = (None, None)
        return [
            SideBySide(question=q, unmodified=b, unlearned=a, truth=truth, set_name=name)
            for q, b, a, (truth, name) in (
                (q, b, a, self._known.get(q, nothing))
                for q, b, a in zip(questions, before, after, strict=True)
            )
        ]

    def _answers(self, questions: Sequence[str]) -> list[str]:
        """Return the answers of the model as it is now."""
        loaded = self._worker.loaded
        prompts = self._worker.encoder.prompts(questions)
        rows = generate_tokens(loaded, prompts, max_new_tokens=self._max_new_tokens)
        return [str(loaded.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def _known(data: DataSets) -> dict[str, tuple[str, str]]:
    """Return the true answer and the set of each question of the data."""
    held = data.held_out
    sets = {
        "factual": (*data.factual, *(held.factual if held is not None else ())),
        "retain": (*data.fit_retain, *data.retain, *(held.retain if held is not None else ())),
        "forget": (*data.fit_forget, *data.forget),
    }
    return {r.question: (r.answer, name) for name, records in sets.items() for r in records}
