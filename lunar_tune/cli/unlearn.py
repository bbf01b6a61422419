"""The command `lunar-tune unlearn`: one run, without Ray."""

from __future__ import annotations

import dataclasses
import json as json_text
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lunar_tune.cli.commands import SUBJECT, Command, CommonOptions, Given, Reused
from lunar_tune.cli.running import say
from lunar_tune.config.fields import option, same_option, shared_options
from lunar_tune.config.run_options import RunOptions, read_assignments
from lunar_tune.errors import Problems
from lunar_tune.metrics.names import METRICS
from lunar_tune.paths import check_writable_file
from lunar_tune.report.progress_bars import build_progress, epochs_shown
from lunar_tune.study.rows import score_cells

if TYPE_CHECKING:
    from lunar_tune.trial.single import SingleRun

__all__ = ["COMMAND", "UnlearnOptions"]


@dataclass(frozen=True, kw_only=True)
class UnlearnOptions(RunOptions, CommonOptions):
    """What the command takes."""

    fix: tuple[str, ...] = same_option(
        RunOptions,
        "fix",
        help="Parameters and settings of the method: layer=1 coefficient=2 learning_rate=0.003; "
        "several layers with commas between.",
        group=SUBJECT,
        positional=True,
    )
    published_config: Path | None = option(
        None,
        "A forget.yaml of the published code; what is given beside it wins.",
        SUBJECT,
        metavar="FILE",
        common=True,
    )
    json: Path | None = same_option(Reused, "json", help="Write scores and answers as JSON.")
    save: Path | None = same_option(
        Reused, "save", help="Save the unlearned model as a Hugging Face checkpoint in this folder."
    )


def unlearn(options: UnlearnOptions, given: Given) -> None:
    """Unlearn once, with one setting, and say what was forgotten and what was kept.

    `lunar-tune unlearn layer=1 coefficient=2 learning_rate=0.003 --model tiny`

    `lunar-tune unlearn learning_rate=0.001 --model tiny --method npo`

    Users of the published code keep their file:
    `lunar-tune unlearn --published-config config/forget.yaml`

    The same from Python: `lunar_tune.unlearn_once(layer=1, coefficient=2.0, learning_rate=0.003)`
    """
    from lunar_tune.trial.assemble import assemble, configured

    console = Console(quiet=options.quiet, emoji=False)
    run, save_to = shared_options(options, RunOptions), options.save
    if options.published_config is not None:
        run, save_to = _published(options.published_config, options, given, console)
    problems, parameters = Problems(), dict[str, Any]()
    with problems.collect():
        method, parameters = configured(run)
        for name in method.parameters:
            if name not in parameters:
                problems.add(f"{name}={name.upper()} is needed.")
    with problems.collect():
        check_writable_file(options.json, "--json")
    if problems.messages:
        with problems.collect():
            assemble(run)  # to say all that is wrong
    problems.raise_if_any()
    _run(run, console, parameters, json=options.json, save_to=save_to)


def _run(
    options: RunOptions,
    console: Console,
    parameters: dict[str, Any],
    *,
    json: Path | None,
    save_to: Path | None,
) -> None:
    from lunar_tune.files import write_atomically
    from lunar_tune.trial.single import unlearn_once

    with build_progress(console) as bar:
        run = unlearn_once(
            options,
            vanilla=True,
            save_to=save_to,
            on_progress=epochs_shown(bar, "building the tiny model (once)"),
            **parameters,
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "forget", "retain", "factual", "deviation score"):
        table.add_column(column, justify="left" if column == "" else "right")
    if run.vanilla is not None:
        table.add_row("base model", *score_cells(run.vanilla.evaluation.scores))
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
    if json is not None:
        write_atomically(json, (json_text.dumps(run.document(), indent=1) + "\n").encode())
    for what, where in (("scores and answers", json), ("model", save_to)):
        if where is not None:
            say(console, f"{what} written to {where}")


_SETS = ("forget", "retain", "factual")


def _further_scores(run: SingleRun) -> Table:
    """Return the scores that were asked for beside ROUGE-1 as a table."""
    before = run.vanilla.evaluation.scores if run.vanilla is not None else {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "base model", "unlearned", "better"):
        table.add_column(
            column, justify="right" if column in {"base model", "unlearned"} else "left"
        )
    for name in run.spec.metrics:
        values = (f"{s[name]:.4g}" if name in s else "-" for s in (before, run.scores))
        table.add_row(name, *values, "lower" if METRICS[name].lower_is_better else "higher")
    return table


def _published(
    file: Path, options: UnlearnOptions, given: Given, console: Console
) -> tuple[RunOptions, Path | None]:
    """Read a published configuration and say what was made of each key.

    Returns:
        Its options, with what was given in their place, and where to save the model.
    """
    from lunar_tune.methods.method_registry import METHODS
    from lunar_tune.trial.assemble import configured
    from lunar_tune.trial.published_config import read_published_config

    published = read_published_config(file)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "value", "became"):
        table.add_column(column, overflow="fold")
    for note in published.notes:
        table.add_row(*map(escape, note))
    console.print(table)
    own = {one.name for one in dataclasses.fields(RunOptions)}
    values = {name: getattr(options, name) for name in given if name in own}
    anew = read_assignments(options.fix).keys()
    dropped = set(anew)
    if {"method", "solver"} & (values.keys() | anew):  # what the file says is of another solver
        changed = dataclasses.replace(published.options, **values | {"fix": options.fix})
        method, _ = configured(changed)
        known = METHODS[method.name].names_in_use(method.variant) - {"learning_rate"}
        dropped |= read_assignments(published.options.fix).keys() - known
    kept = [text for text in published.options.fix if text.partition("=")[0] not in dropped]
    values["fix"] = (*kept, *options.fix)
    return dataclasses.replace(published.options, **values), options.save or published.save_to


COMMAND = Command(unlearn, UnlearnOptions)
