"""The command `lunar-tune export`."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.cli.commands import OUTPUT, Command, Reused, TrialOptions
from lunar_tune.cli.running import say, score_table
from lunar_tune.config.fields import option, same_option
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError, LunarTuneError, Problems
from lunar_tune.files import write_json

if TYPE_CHECKING:
    from lunar_tune.export.export_job import Exported, ExportJob
    from lunar_tune.report.results import SearchResults
    from lunar_tune.trial.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class ExportOptions(TrialOptions):
    """What the command takes."""

    save: Path = same_option(
        Reused, "save", help="Folder to write, empty or missing.", default=MISSING
    )
    format: str = option(
        "checkpoint",
        "checkpoint (a whole model) or adapter (PEFT LoRA). adapter:RANK is one of another rank, "
        "where lunar's adamw leaves the choice; by default the smallest with an error of 1 %.",
        OUTPUT,
        metavar="FORMAT",
        common=True,
    )
    register: str | None = option(
        None, "Register the folder as a version of this model in MLflow.", OUTPUT, metavar="NAME"
    )
    tracking_uri: str | None = same_option(
        SearchConfig,
        "tracking_uri",
        help="MLflow tracking URI for --register, where the store was moved or wants a password. "
        "Default: the one that the search was written to.",
    )
    json: Path | None = same_option(
        Reused, "json", help="Write what export.json says here as well.", common=False
    )


def export(options: ExportOptions, problems: Problems) -> None:
    """Write a search's winner as files that load without lunar-tune, and prove it.

    A search keeps no weights: its trial runs again, with the search's seed. What was written is
    then loaded from the disk by transformers and peft alone and asked every question;
    exit code 1 if its scores are not those that the search reported.

    `lunar-tune export runs/NAME --save unlearned`
    """
    from lunar_tune.export.writing import export as run_export
    from lunar_tune.report.progress import tiny_progress
    from lunar_tune.tracking.registering import register_model

    console = options.console()
    results, job = _checked(options, problems)
    with tiny_progress(console) as on_build:
        exported = run_export(job, on_build=on_build, on_step=lambda text: say(console, text))
    _show(exported, console)
    if options.json is not None:
        write_json(options.json, exported.document())
    if exported.failures:
        raise LunarTuneError(_unproven(exported))
    say(console, f"{job.form} written to {options.save}")
    if options.register is not None:
        version = register_model(
            results,
            options.save,
            options.register,
            row=results.trial(options.trial),
            scores=exported.comparison.scores,
            form=job.form,
            tracking_uri=options.tracking_uri,
        )
        say(console, f"registered as {options.register}, version {version}")


def _checked(options: ExportOptions, problems: Problems) -> tuple[SearchResults, ExportJob]:
    """Return the search and what is to be exported, or say everything that is wrong."""
    from lunar_tune.export.export_job import check_form
    from lunar_tune.report.results import load_search
    from lunar_tune.search.resume import assemble_again
    from lunar_tune.tracking.registering import check_registrable

    spec = None
    form, rank = _form(options.format)
    with problems.collect():
        results = load_search(options.search, runs=options.output)
        if options.register is not None:
            with problems.collect():
                check_registrable(results, options.register, tracking_uri=options.tracking_uri)
        with problems.collect():
            results.trial(options.trial)
        with problems.collect():
            spec = assemble_again(results, problems, device=options.device)
            job = _job(results, spec, options, form=form, rank=rank)
    with problems.collect():
        check_form(form, options.save, rank, spec)
    problems.raise_if_any()
    return results, job


def _form(text: str) -> tuple[str, int | None]:
    """Return the form and an adapter's rank, if one is named."""
    form, colon, rank = text.partition(":")
    if not colon:
        return form, None
    if form != "adapter" or not rank.isdecimal() or int(rank) < 1:
        raise InputError(f"--format {text}: checkpoint, adapter, or adapter:RANK with 1 or more.")
    return form, int(rank)


def _job(
    results: SearchResults, spec: TrialSpec, options: ExportOptions, *, form: str, rank: int | None
) -> ExportJob:
    from lunar_tune.export.export_job import ExportJob, Reported
    from lunar_tune.metrics.goal import in_words

    row, goal, held = results.trial(options.trial), results.goal, spec.data.held_out
    full = results.best is not None and row.number == results.best.number
    scores = results.confirmed if full and results.confirmed is not None else row.scores
    noted = results.study.notes["confirmed"] if full else {"max_new_tokens": row.max_new_tokens}
    missed = goal.missed(scores)
    layer = row.parameters.get("layer") if spec.method.edits_one_layer else None
    edited = [] if layer is None else layer if isinstance(layer, list | tuple) else [layer]
    return ExportJob(
        spec=dataclasses.replace(
            spec,
            layers=tuple(map(int, edited)),  # no others are captured
            engine=dataclasses.replace(  # which may have ended the trial's fit early
                spec.engine, retain_floor=goal.stoppable_floor
            ),
        ),
        parameters=row.parameters,
        form=form,
        folder=options.save,
        rank=rank,
        reported=Reported(
            search=results.folder.name,
            trial=row.number,
            goal=str(goal),
            scores=scores,
            rows=results.answers(row.number, full=full),
            max_new_tokens=int(noted["max_new_tokens"] or 0),
            baseline=results.baseline_in_full if full else results.baseline,
            missed=in_words(missed),
            n_retain=len(held.retain) if held is not None and full else spec.data.n_retain,
            held_out=held is not None,
            full=full,
        ),
    )


def _show(exported: Exported, console: Console) -> None:
    """Show the form's scores beside those that the search reported."""
    from lunar_tune.study.rows import score_cells

    found, reported = exported.comparison, exported.job.reported
    rows = {
        "base model": score_cells(reported.baseline),
        f"trial {reported.trial}, as reported": reported.cells(reported.scores),
        f"the {exported.job.form}, as loaded": reported.cells(found.scores),
    }
    console.print("ROUGE-1 recall of the answers")
    console.print(score_table(rows))
    for remark in reported.remarks:
        say(console, remark)
    text = found.differences
    if exported.run.errors:
        rank, error = max(exported.run.ranks.values()), exported.run.relative_error
        text += f"; rank {rank}, relative error {error:.2g} (Frobenius)"
    say(console, text)


def _unproven(exported: Exported) -> str:
    job = exported.job
    more = " --format adapter:RANK with a larger rank comes nearer." if exported.run.errors else ""
    return (
        f"the {job.form} does not give what {job.reported.search} reported of trial "
        f"{job.reported.trial}: {'; '.join(exported.failures)}.{more} {job.folder} is kept; its "
        "export.json says that it is not proven. A trial comes out the same on the machine, with "
        "the libraries and the model that it was searched with."
    )


COMMAND = Command(export, ExportOptions)
