"""The command `lunar-tune describe`: a data card, before one unlearns on the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.cli.commands import Command, CommonOptions, counted, plain_table
from lunar_tune.config.fields import option, same_option, shared_options
from lunar_tune.config.options import DATA, TINY, Reused, RunOptions
from lunar_tune.data.data_card import Card, describe_prompts, describe_records
from lunar_tune.data.data_catalog import kind_of, pairs_kind, resolve_data
from lunar_tune.data.records import (
    Record,
    holds_prompts,
    read_prompts,
    read_questions,
    read_records,
)
from lunar_tune.data.splits import edges_of, read_groups
from lunar_tune.display import say
from lunar_tune.errors import InputError, ModelError, Problems
from lunar_tune.files import write_json
from lunar_tune.metrics.rouge import MOST_LOST, check_scorable, lost_letters, lost_share

if TYPE_CHECKING:
    from lunar_tune.models.chat_encoder import ChatEncoder

_DEFAULT_EDGE = "A_B"
_SHOWN_EDGES, _SHOWN_TEXTS = 12, 5


@dataclass(frozen=True, kw_only=True)
class DescribeOptions(CommonOptions):
    """What the command takes."""

    data: str = option(MISSING, group=DATA, positional=True)
    """A shipped or fetched name, or a file."""
    edge: str | None = same_option(RunOptions, "edge", common=True)
    forget_edge: tuple[str, ...] = same_option(RunOptions, "forget_edge")
    """Edges or groups that are to be forgotten. Default: A_B, if there is one."""
    model: str | None = same_option(RunOptions, "model", default=None)
    """Count the tokens of this model too, and show the first prompts; its tokenizer must be on this
    machine."""
    chat_template: str = same_option(RunOptions, "chat_template")
    system_prompt: str | None = same_option(RunOptions, "system_prompt")
    rouge_tokenizer: str = same_option(RunOptions, "rouge_tokenizer", common=True)
    json: Path | None = same_option(Reused, "json")
    """Write the whole card as JSON."""


@Command
def describe(options: DescribeOptions, problems: Problems) -> None:
    """Show what a data set holds and whether it is fit for unlearning.

    `lunar-tune describe mini`

    `lunar-tune describe my_pairs.json --forget-edge author_1`

    For each edge to forget it says how much of the edge the kept rows repeat: an answer that
    is also right elsewhere cannot be seen to be forgotten.
    """
    problems.raise_if_any()
    path = resolve_data(options.data, kind=kind_of(options.data) or "records")
    encoder = _encoder(options.model, options) if options.model is not None else None
    card, console = _card(path, options, encoder), options.console
    _show(console, path, card)
    if options.json is not None:
        write_json(options.json, {"path": str(path), "model": options.model, **card.document()})
        say(console, f"written to {options.json}")


def _card(path: Path, options: DescribeOptions, encoder: ChatEncoder | None) -> Card:
    notes: list[str] = []
    count = None if encoder is None else lambda text: len(encoder.text(text))
    if holds_prompts(path):
        if options.forget_edge:
            raise InputError(
                f"--forget-edge {','.join(options.forget_edge)}: {path.name} holds prompts, no "
                "edges."
            )
        prompts = read_prompts(path, on_note=notes.append)
        shown = _prompts(encoder, {"first": prompts[0]})
        card = describe_prompts(prompts, count_tokens=count)
        return replace(card, notes=tuple(notes), prompts=shown)
    if pairs_kind(options.data) == "questions":
        if options.model is None:
            return _questions(read_questions(path), options, path)
        from lunar_tune.trial.assemble import kept_answers

        shared = shared_options(options, RunOptions, without={"model"})
        records = kept_answers(replace(shared, model=options.model))
    else:
        records = read_records(path, default_edge=options.edge, on_note=notes.append)
    groups = read_groups(path)
    edges = edges_of(records)
    unseen, tokenizer = Problems(), options.rouge_tokenizer
    with unseen.collect():
        check_scorable({"true": records}, tokenizer=tokenizer)
    if not unseen.messages and (told := lost_letters(records, tokenizer)):
        unseen.add(told)
    default = (_DEFAULT_EDGE,) if _DEFAULT_EDGE in edges and len(edges) > 1 else ()
    card = describe_records(
        records,
        options.forget_edge or default,
        groups=groups,
        is_scorable=lambda answer: lost_share(answer, tokenizer=tokenizer) <= MOST_LOST,
        unseen=[text[:1].upper() + text[1:] for text in unseen.messages],
        count_tokens=count,
    )
    forgotten = set(card.forget.edge)
    firsts: dict[str, str] = {}
    for record in records:
        firsts.setdefault("forget" if record.edge in forgotten else "retain", record.question)
    return replace(card, notes=tuple(notes), prompts=_prompts(encoder, firsts))


def _questions(questions: Sequence[Record], options: DescribeOptions, path: Path) -> Card:
    """Return the card of questions without answers."""
    advice = "a model that was asked them shows its answers with --model"
    if options.forget_edge:
        raise InputError(
            f"--forget-edge {','.join(options.forget_edge)}: {path.name} holds questions alone; "
            f"{advice}."
        )
    card = describe_prompts([one.question for one in questions], count_tokens=None)
    return replace(card, notes=(f"questions without answers: {advice}",), edges=edges_of(questions))


def _prompts(encoder: ChatEncoder | None, questions: Mapping[str, str]) -> dict[str, str]:
    """Return what the model reads for a few questions, or why it can read none."""
    try:
        return {} if encoder is None else encoder.shown(questions)
    except ModelError as error:
        return {"no prompt": str(error)}


def _encoder(model: str, options: DescribeOptions) -> ChatEncoder:
    """Return what makes tokens of a model; it is looked for on this machine alone."""
    from lunar_tune.models.catalog import resolve_model
    from lunar_tune.models.chat import ChatFormat
    from lunar_tune.models.loading import encoder_on_disk

    chat = ChatFormat.from_option(options.chat_template, options.system_prompt)
    spec = resolve_model(model)
    if spec.source == TINY:
        raise ModelError(f"--model {model}: the tiny model is built on first use; give its folder.")
    if (encoder := encoder_on_disk(spec, chat)) is None:
        raise ModelError(
            f"--model {model}: its tokenizer is not on this machine. Download the model first, "
            "give its folder, or leave --model out."
        )
    return encoder


def _show(console: Console, path: Path, card: Card) -> None:
    say(console, str(path))
    what = f"{card.rows} {'pairs' if card.kind == 'records' else 'prompts'}"
    edges = f", {counted(len(card.edges), 'edge')}" if card.edges else ""
    say(console, f"{what}{edges}, SHA-256 of the content {card.digest[:16]}…")
    for note in card.notes:
        say(console, note)
    say(console, "")
    lengths = [
        (f"{row.Index} in {unit}", row.least, f"{row.median:g}", row.most)
        for unit, table in (("words", card.words), ("tokens", card.tokens))
        for row in table.itertuples()
    ]
    columns = ("length", "shortest", "median", "longest")
    console.print(plain_table(columns, lengths, left=("length",)))
    for label, text in card.prompts.items():
        say(console, f"{label}: {text}")
    if card.edges:
        shown = [f"{edge} {rows}" for edge, rows in list(card.edges.items())[:_SHOWN_EDGES]]
        more = len(card.edges) - _SHOWN_EDGES
        note = f" and {more} more edges (all of them with --json)" if more > 0 else ""
        say(console, f"\nrows by edge: {', '.join(shown)}{note}")
    for name, members in card.groups.items():
        ends = ", ".join(members) if len(members) <= 2 else f"{members[0]} … {members[-1]}"
        say(console, f"group {name}: {counted(len(members), 'edge')}, {ends}")
    if len(card.repeated_questions):
        say(console, f"asked more than once: {len(card.repeated_questions)}")
    for question in card.repeated_questions.head(_SHOWN_TEXTS).itertuples():
        answers = f", {counted(question.answers, 'answer')}" if card.edges else ""
        say(console, f"  {question.rows} times{answers}: {question.text}")
    if shared := len(card.shared_answers):
        count = f"{shared}, in {card.shared_answers.rows.sum()} of {card.rows} rows"
        say(console, f"answers of several edges: {count}")
    for answer in card.shared_answers.head(_SHOWN_TEXTS).itertuples():
        say(console, f"  {counted(len(answer.edges), 'edge')}: {answer.text}")
    if len(card.forget):
        say(console, "\nrows to forget, and how many of them the kept rows repeat")
        rows = [
            (edge, n, *(f"{count} ({100 * count / n:.0f} %)" for count in counts))
            for edge, n, *counts in card.forget.itertuples(index=False)
        ]
        names = ("edge", "rows", "same question", "near question", "same answer")
        console.print(plain_table(names, rows, folded=("edge",)))
    elif card.edges and card.kind == "records":
        say(console, f"no edge {_DEFAULT_EDGE}: name what is to be forgotten with --forget-edge")
    console.print()
    for finding in card.findings or ("Nothing that hinders unlearning was found.",):
        console.print(f"- {finding}", markup=False, highlight=False)
