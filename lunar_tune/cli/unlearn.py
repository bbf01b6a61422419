"""The command `python -m lunar_tune.unlearn`: one run, without Ray."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lunar_tune.cli.options.given import GivenOptions, merge_options, with_run_options
from lunar_tune.cli.running import DebugOption, QuietOption, reporting_errors, say
from lunar_tune.config.flags import flag_of
from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError, Problems
from lunar_tune.metrics.names import METRICS
from lunar_tune.paths import check_writable_file
from lunar_tune.report.progress_bars import build_progress, epochs_shown
from lunar_tune.study.rows import score_cells

if TYPE_CHECKING:
    from lunar_tune.trial.single import SingleRun

_RUN = "Setting and results"


@with_run_options
def unlearn(
    *,
    ctx: typer.Context,  # noqa: ARG001 taken by the decorator
    given: GivenOptions,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Decoder block to edit, or several.", metavar="L[,L…]", rich_help_panel=_RUN
        ),
    ] = None,
    coefficient: Annotated[
        str | None,
        typer.Option(
            help="How far to move along the unlearning vector, for each layer or one for all.",
            metavar="C[,C…]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Of the first epoch; not for closed_form.", rich_help_panel=_RUN),
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(help="Strength of closed_form's ridge.", rich_help_panel=_RUN)
    ] = None,
    published_config: Annotated[
        Path | None,
        typer.Option(
            help="A forget.yaml of the published code; options given beside it win.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    vanilla: Annotated[
        bool, typer.Option(help="Evaluate the unmodified model as well.", rich_help_panel=_RUN)
    ] = True,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the scores as JSON.", rich_help_panel=_RUN),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Write questions and answers as Parquet.", rich_help_panel=_RUN),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Save the unlearned model as a Hugging Face checkpoint in this folder.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Unlearn once, with one setting, and say what was forgotten and what was kept.

    `python -m lunar_tune.unlearn --model tiny --layer 1 --coefficient 2 --learning-rate 0.003`

    `python -m lunar_tune.unlearn --model tiny --method npo --learning-rate 0.001`

    Users of the published code keep their file:
    `python -m lunar_tune.unlearn --published-config config/forget.yaml`

    The same from Python: `lunar_tune.unlearn_once(layer=1, coefficient=2.0, learning_rate=0.003)`
    """
    with reporting_errors(debug=debug):
        console = Console(quiet=quiet, emoji=False)
        base, save_to = RunOptions(), None
        setting: dict[str, Any] = {}
        if published_config is not None:
            base, setting, save_to = _published(published_config, console)
        problems = Problems()
        options = merge_options(base, given, problems)
        if options.lunar.solver != base.lunar.solver or options.method != base.method:
            setting.pop("learning_rate", None)  # the file's, for the solver that was not chosen
        setting |= _setting(layer, coefficient, learning_rate, ridge, problems)
        named = {
            "layer": layer,
            "coefficient": coefficient,
            "learning_rate": learning_rate,
            "ridge": ridge,
        }
        given_names = {name for name, value in named.items() if value is not None} | set(setting)
        with problems.collect():
            _check_names(options, given_names, problems)
        for flag, file in (("--json", json_file), ("--answers", answers)):
            with problems.collect():
                check_writable_file(file, flag)
        if problems.messages:
            from lunar_tune.trial.assemble import assemble

            with problems.collect():
                assemble(options)  # to say all that is wrong
        problems.raise_if_any()
        _run(
            options,
            setting,
            console,
            vanilla=vanilla,
            json_file=json_file,
            answers=answers,
            save_to=save or save_to,
        )


def _run(
    options: RunOptions,
    setting: Mapping[str, Any],
    console: Console,
    *,
    vanilla: bool,
    json_file: Path | None,
    answers: Path | None,
    save_to: Path | None,
) -> None:
    from lunar_tune.files import write_atomically
    from lunar_tune.study.tables import write_answers
    from lunar_tune.trial.single import unlearn_once

    with build_progress(console) as bar:
        run = unlearn_once(
            options,
            vanilla=vanilla,
            save_to=save_to,
            on_progress=epochs_shown(bar, "building the tiny model (once)"),
            **setting,
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "forget", "retain", "factual", "deviation score"):
        table.add_column(column, justify="left" if column == "" else "right")
    if run.vanilla is not None:
        table.add_row("unmodified", *score_cells(run.vanilla.evaluation.scores))
    table.add_row("unlearned", *score_cells(run.scores))
    table.add_row("rows", *(str(run.scores.get(f"{s}_rows", "-")) for s in _SETS))
    console.print("ROUGE-1 recall of the answers")
    console.print(table)
    if run.spec.metrics:
        console.print(_further_scores(run))
    seconds = run.result.seconds
    console.print(
        f"fit {seconds['fit']:.1f} s, evaluation {seconds['evaluate']:.1f} s, "
        f"up to {run.result.max_new_tokens} tokens an answer",
        highlight=False,
    )
    if json_file is not None:
        write_atomically(json_file, (json.dumps(run.document(), indent=1) + "\n").encode())
    if answers is not None:
        losses = run.result.fit.losses if run.result.fit is not None else ()
        write_answers(answers, run.result.evaluation.rows, losses, text=run.spec.text)
    for what, where in (("scores", json_file), ("answers", answers), ("model", save_to)):
        if where is not None:
            say(console, f"{what} written to {where}")


_SETS = ("forget", "retain", "factual")


def _further_scores(run: SingleRun) -> Table:
    """Return the scores that were asked for beside ROUGE-1 as a table."""
    before = run.vanilla.evaluation.scores if run.vanilla is not None else {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "unmodified", "unlearned", "better"):
        table.add_column(column, justify="right" if column.startswith("un") else "left")
    for name in run.spec.metrics:
        values = (f"{s[name]:.4g}" if name in s else "-" for s in (before, run.scores))
        table.add_row(name, *values, "lower" if METRICS[name].lower_is_better else "higher")
    return table


def _setting(
    layer: str | None,
    coefficient: str | None,
    learning_rate: float | None,
    ridge: float | None,
    problems: Problems,
) -> dict[str, Any]:
    """Return what was given of the setting; a list where there are commas."""
    setting: dict[str, Any] = {}
    if layer is not None:
        with problems.collect():
            setting["layer"] = _numbers("--layer", layer, int)
    if coefficient is not None:
        with problems.collect():
            setting["coefficient"] = _numbers("--coefficient", coefficient, float)
    if learning_rate is not None:
        setting["learning_rate"] = learning_rate
    if ridge is not None:
        setting["ridge"] = ridge
    return setting


def _check_names(options: RunOptions, given: Collection[str], problems: Problems) -> None:
    """Note which of the method's parameters are missing, and what it has no use for."""
    from lunar_tune.trial.assemble import method_of

    method = method_of(options)
    for name in method.parameters:
        if name not in given:
            problems.add(f"{flag_of(name)} is needed.")
    for name in sorted(set(given) - {*method.parameters, *method.optional_parameters}):
        problems.add(
            f"{flag_of(name)} has no meaning with --method {method.name} ({method.variant})."
        )


def _numbers(flag: str, text: str, kind: type[int] | type[float]) -> Any:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{flag} {text}: {what}, with commas between.") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _published(path: Path, console: Console) -> tuple[RunOptions, dict[str, Any], Path | None]:
    """Read a published configuration and say what was made of each key."""
    from lunar_tune.trial.published.configuration import read_published_config

    published = read_published_config(path)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "value", "became"):
        table.add_column(column, overflow="fold")
    for note in published.notes:
        table.add_row(escape(note.key), escape(note.value), escape(note.became))
    console.print(table)
    return published.options, dict(published.parameters), published.save_to
