"""The command `lunar-tune unlearn`: one run, without Ray."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.cli.commands import Command, CommonOptions, plain_table, score_table
from lunar_tune.config.fields import option, options_again, options_of, same_option, shared_options
from lunar_tune.config.options import SUBJECT, Reused, RunOptions, read_assignments
from lunar_tune.display import say
from lunar_tune.errors import Problems
from lunar_tune.files import write_json
from lunar_tune.metrics.goal import METRICS, VERDICTS
from lunar_tune.metrics.means import errors_of
from lunar_tune.study.rows import ERROR, score_cells

if TYPE_CHECKING:
    from lunar_tune.trial.single import SingleRun


@dataclass(frozen=True, kw_only=True)
class UnlearnOptions(RunOptions, CommonOptions):
    """What the command takes."""

    fix: tuple[str, ...] = same_option(RunOptions, "fix", group=SUBJECT, positional=True)
    """Parameters and settings of the method: layer=1 coefficient=2 learning_rate=0.003; several
    layers with commas between."""
    published_config: Path | None = option(None, group=SUBJECT, metavar="FILE", common=True)
    """A forget.yaml of the published code; options given beside it win."""
    json: Path | None = same_option(Reused, "json")
    """Write scores and answers as JSON."""
    save: Path | None = same_option(Reused, "save")
    """Save the unlearned model as a Hugging Face checkpoint in this folder."""


@Command
def unlearn(options: UnlearnOptions, problems: Problems) -> None:
    """Unlearn once, with one setting, and say what was forgotten and what was kept.

    `lunar-tune unlearn layer=1 coefficient=2 learning_rate=0.003 --model tiny`

    `lunar-tune unlearn learning_rate=0.001 --model tiny --method npo`

    Users of the published code keep their file:
    `lunar-tune unlearn --published-config config/forget.yaml`

    The same from Python: `lunar_tune.unlearn(layer=1, coefficient=2.0, learning_rate=0.003)`
    """
    console = options.console
    run, save_to = shared_options(options, RunOptions), options.save
    if options.published_config is not None:
        run, save_to = _published(options.published_config, options, console)
    with options.working("one unlearning run"):
        from lunar_tune.trial.single import unlearn as run_once

        done = run_once(run, save_to=save_to, console=console, problems=problems)
    _show(done, console)
    if options.json is not None:
        write_json(options.json, done.document())
    for what, where in (("scores and answers", options.json), ("model", save_to)):
        if where is not None:
            say(console, f"{what} written to {where}")


def _show(run: SingleRun, console: Console) -> None:
    """Show ROUGE-1, the scores that were asked for beside it, and what the run took."""
    before = run.baseline.evaluation.scores if run.baseline is not None else {}
    counts = [str(run.scores.get(f"{name}_rows", "-")) for name in ("forget", "retain", "factual")]
    rows = {
        "base model": score_cells(before),
        "unlearned model": score_cells(run.scores),
        ERROR: score_cells(errors_of(run.scores)),
        "rows": counts,
    }
    console.print("ROUGE-1 recall of the answers")
    console.print(score_table(rows))
    further = []
    judged = [name for name, metric in METRICS.items() if VERDICTS in metric.needs]
    for name in dict.fromkeys((*run.spec.metrics, *filter(run.scores.__contains__, judged))):
        shown = (f"{one[name]:.4g}" if name in one else "-" for one in (before, run.scores))
        further.append((name, *shown, "lower" if METRICS[name].lower_is_better else "higher"))
    if further:
        columns = ("", "base model", "unlearned model", "better")
        console.print(plain_table(columns, further, left=("", "better")))
    seconds = run.result.seconds
    console.print(
        f"fit {seconds['fit']:.1f} s, evaluation {seconds['evaluate']:.1f} s, "
        f"up to {run.result.max_new_tokens} tokens an answer",
        highlight=False,
    )


def _published(
    file: Path, options: UnlearnOptions, console: Console
) -> tuple[RunOptions, Path | None]:
    """Return a published file's options, changed by what was given, and where to save the model."""
    from lunar_tune.methods.contract import METHODS
    from lunar_tune.trial.assemble import configured
    from lunar_tune.trial.published_config import read_published_config

    published, save_to, ignored = read_published_config(file)
    again = options_again(published, options_of(RunOptions))
    say(console, f"{file} says: lunar-tune unlearn {shlex.join(again)}")
    if ignored:
        say(console, f"keys that decide nothing here: {', '.join(ignored)}")
    values = {
        name: getattr(options, name) for name in options.given if name in options_of(RunOptions)
    }
    anew = read_assignments(options.fix).keys()
    dropped = set(anew)
    if {"method", "solver"} & (values.keys() | anew):  # what the file says is of another solver
        changed = dataclasses.replace(published, **values | {"fix": options.fix})
        method, _ = configured(changed)
        known = METHODS[method.name].names_in_use(method.variant) - {"learning_rate"}
        dropped |= read_assignments(published.fix).keys() - known
    kept = [text for text in published.fix if text.partition("=")[0] not in dropped]
    values["fix"] = (*kept, *options.fix)
    return dataclasses.replace(published, **values), options.save or save_to
