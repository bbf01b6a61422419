"""Which reference prompts the base model declines: a direction is made of those, or is noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lunar_tune.config.options import DECLINED
from lunar_tune.display import encodable, printable
from lunar_tune.errors import InputError
from lunar_tune.metrics.declining import declines
from lunar_tune.yaml_files import describe_mistakes

if TYPE_CHECKING:
    from rich.console import Console

    from lunar_tune.training.answer_loss import Encoder

LEAST_DECLINED = 10
"""Prompts below which an unlearning vector depends on which they are: of ten, drawn at random from
59, each of 200 draws had a cosine of at least .96 with that of all, of four .83
(docs/benchmarks.md)."""
ANSWER_TOKENS = 48
"""Tokens of an answer by which it shows whether it declines: 32 decide as 64 do, 24 do not."""
SHOWN = 3  # answers that are kept and shown
_LONGEST = 100  # characters of an answer that is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """What the base model does with the reference prompts; plain, as a study's note keeps it."""

    asked: int
    declined: tuple[int, ...]  # row numbers of the prompts that it declines
    declining: tuple[tuple[str, str], ...] = ()  # a few of those prompts, each with its answer
    answering: tuple[tuple[str, str], ...] = ()  # of the others; none if texts are not to be shown

    @classmethod
    def read(cls, note: Any) -> References:
        """Return what a study's note says, or raise an InputError if it is none."""
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_python(note)
        except ValidationError as error:
            raise InputError(
                f"the study's note of reference prompts: {describe_mistakes(error)}. Restore the "
                "search's folder from a copy."
            ) from error

    def chosen(self, prompts: Sequence[str], check: str) -> tuple[str, ...]:
        """Return the prompts of which a direction is made."""
        kept = {*self.declined} if check == DECLINED else range(len(prompts))
        return tuple(prompt for row, prompt in enumerate(prompts) if row in kept)

    def summary(self, check: str) -> str:
        """Say how many are declined and what becomes of them."""
        used = "and used" if check == DECLINED else "and all are used"
        return f"{len(self.declined)} of {self.asked} are declined {used}"

    def lines(self, check: str) -> list[str]:
        """Return what to show: the share, what speaks against it, and a few answers."""
        shown = [f"reference prompts: {self.summary(check)}"]
        if len(self.declined) < LEAST_DECLINED:
            shown[0] += f"; a direction needs {LEAST_DECLINED} that are declined to be sure of"
        kinds = {"declined": self.declining[: SHOWN - 1], "answered": self.answering[:1]}
        return shown + [f"  {kind}: {_said(one)}" for kind, some in kinds.items() for one in some]

    def show(self, console: Console, check: str) -> None:
        """Print them, each in one line of the console's width."""
        for line in self.lines(check):
            shown = encodable(line, console)
            console.print(shown, markup=False, no_wrap=True, overflow="ellipsis")

    def problem(self, check: str) -> str | None:
        """Say why too few are declined and what to do, if it is so; a small file may be all."""
        if check != DECLINED or len(self.declined) >= min(LEAST_DECLINED, self.asked):
            return None
        count = len(self.declined) or "none"
        told = f" It answers, for example: {'; '.join(map(_said, self.answering))}."
        return (
            f"{count} of {self.asked} reference prompts are declined by the base model, and "
            f"{LEAST_DECLINED} are needed: a direction from prompts that it answers is noise."
            f"{told if self.answering else ''} Give prompts that it declines with "
            "--reference-prompts (private, or a file; lunar-tune collect shows which it declines), "
            "with --refusals a file of what it says when it declines in another language, or use "
            "all as they are with --reference-check report."
        )


def judge_references(
    found: References | None,
    check: str,
    console: Console | None = None,
    *,
    forced: bool | None = None,
) -> None:
    """Show what was found, if it was asked; too few that are declined are an InputError.

    Whoever is `forced` goes on if there is one at all; None is who cannot be.
    """
    if found is None:
        return
    if console is not None:
        found.show(console, check)
    problem = found.problem(check)
    if problem is not None and not (forced and found.declined):
        further = " --force skips this check." if found.declined and forced is not None else ""
        raise InputError(f"{problem}{further}")


def ask_references(
    encoder: Encoder,
    prompts: Sequence[str],
    refusals: Sequence[str],
    *,
    text: bool = True,
    console: Console | None = None,
) -> References:
    """Ask the base model; without `text` no answer is kept, no console shows no progress."""
    from lunar_tune.engine.decoding import answer_texts

    said = answer_texts(
        encoder.loaded,
        encoder.prompts(prompts),
        max_new_tokens=ANSWER_TOKENS,
        what="reference prompts",
        console=console,
    )
    answers = [answer for answer, _ in said]
    declined = tuple(row for row, answer in enumerate(answers) if declines(answer, refusals))
    rows = [row for row in range(len(answers)) if row not in declined]
    declining, answering = (
        tuple((prompts[row], answers[row]) for row in some[: SHOWN if text else 0])
        for some in (declined, rows)
    )
    return References(
        asked=len(prompts), declined=declined, declining=declining, answering=answering
    )


def _said(example: Sequence[str]) -> str:
    """Return a prompt and its answer in one line."""
    prompt, answer = map(printable, example)
    cut = f"{answer[:_LONGEST]}…" if len(answer) > _LONGEST else answer
    return f"{prompt} -> {cut or '(nothing)'}"
