"""The command `lunar-tune export`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lunar_tune.cli.commands import OUTPUT, SUBJECT, Command, CommonOptions, Given, Reused
from lunar_tune.cli.running import say
from lunar_tune.config.fields import option, same_option
from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError, LunarTuneError, Problems
from lunar_tune.files import write_atomically
from lunar_tune.paths import check_writable_file

if TYPE_CHECKING:
    from lunar_tune.config.run_options import RunOptions
    from lunar_tune.export.export_job import Exported, ExportJob
    from lunar_tune.report.results import SearchResults
    from lunar_tune.trial.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CommonOptions):
    """What the command takes."""

    search: str = option(MISSING, "A search's folder, or its name.", SUBJECT, positional=True)
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
    trial: int | None = same_option(Reused, "trial", help="Another trial than the best.")
    register: str | None = option(
        None, "Register the folder as a version of this model in MLflow.", OUTPUT, metavar="NAME"
    )
    output: Path = same_option(
        SearchConfig, "output", help="Where names of searches are looked up."
    )
    device: str | None = same_option(
        RunOptions, "device", default=None, help="cpu, cuda or auto. Default: as in the search."
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


def export(options: ExportOptions, _: Given) -> None:
    """Write a search's winner as files that load without lunar-tune, and prove it.

    A search keeps no weights: its trial runs again, with the search's seed. What was written is
    then loaded from the disk by transformers and peft alone and asked every question;
    exit code 1 if its scores are not those that the search reported.

    `lunar-tune export runs/NAME --save unlearned`
    """
    from lunar_tune.export.writing import export as run_export
    from lunar_tune.report.progress_bars import build_progress, epochs_shown

    console = Console(quiet=options.quiet, emoji=False)
    form, rank = _form(options.format)
    results, job = _checked(
        options.search,
        form=form,
        output=options.save,
        trial=options.trial,
        rank=rank,
        runs=options.output,
        device=options.device,
        register=options.register,
        tracking_uri=options.tracking_uri,
        json_file=options.json,
    )
    with build_progress(console) as bar:
        exported = run_export(
            job,
            on_build=epochs_shown(bar, "building the tiny model (once)"),
            on_step=lambda text: say(bar.console, text),
        )
    _show(exported, console)
    if options.json is not None:
        write_atomically(options.json, (options.save / "export.json").read_bytes())
    if exported.failures:
        raise LunarTuneError(_unproven(exported))
    say(console, f"{form} written to {options.save}")
    if options.register is not None:
        from lunar_tune.tracking.registering import register_model

        version = register_model(
            results,
            options.save,
            options.register,
            row=results.trial(options.trial),
            scores=exported.comparison.scores,
            form=form,
            tracking_uri=options.tracking_uri,
        )
        say(console, f"registered as {options.register}, version {version}")


def _form(text: str) -> tuple[str, int | None]:
    """Return the form and an adapter's rank, if one is named.

    Raises:
        InputError: The rank is none.
    """
    form, colon, rank = text.partition(":")
    if not colon:
        return form, None
    if form != "adapter" or not rank.isdecimal() or int(rank) < 1:
        raise InputError(f"--format {text}: checkpoint, adapter, or adapter:RANK with 1 or more.")
    return form, int(rank)


def _checked(
    search: str,
    *,
    form: str,
    output: Path,
    trial: int | None,
    rank: int | None,
    runs: Path,
    device: str | None,
    register: str | None,
    tracking_uri: str | None,
    json_file: Path | None,
) -> tuple[SearchResults, ExportJob]:
    """Return the search and what is to be exported, or say everything that is wrong."""
    from lunar_tune.export.export_job import check_form
    from lunar_tune.report.results import load_search
    from lunar_tune.search.data_check import check_same_data

    problems = Problems()
    results = spec = job = None
    with problems.collect():
        results = load_search(search, runs=runs)
    if results is not None:
        with problems.collect():
            spec = _spec(results, device)
    with problems.collect():
        check_form(form, output, rank, spec)
    with problems.collect():
        check_writable_file(json_file, "--json")
    if results is not None:
        with problems.collect():
            results.trial(trial)
        if register is not None:
            from lunar_tune.tracking.registering import check_registrable

            with problems.collect():
                check_registrable(results, register, tracking_uri=tracking_uri)
        if spec is not None:
            with problems.collect():
                check_same_data(results, spec)
            with problems.collect():
                job = _job(results, spec, trial, form=form, output=output, rank=rank)
    problems.raise_if_any()
    if results is None or job is None:
        raise AssertionError("every None above comes with a noted problem")
    return results, job


def _spec(results: SearchResults, device: str | None) -> TrialSpec:
    """Return what the search's trials shared."""
    from lunar_tune.trial.assemble import assemble

    config = results.config
    options: RunOptions = config.trial_options
    goal = results.goal
    options = dataclasses.replace(options, metrics=(*options.metrics, *goal.metrics))
    if device is not None:
        options = dataclasses.replace(options, device=device)
    spec = assemble(options)
    floor = goal.stoppable_floor  # may have ended a fit early
    engine = dataclasses.replace(spec.engine, retain_floor=floor)
    return dataclasses.replace(spec, engine=engine, metrics=(), embedding_model=None)


def _job(
    results: SearchResults,
    spec: TrialSpec,
    number: int | None,
    *,
    form: str,
    output: Path,
    rank: int | None,
) -> ExportJob:
    from lunar_tune.export.export_job import ExportJob, Reported
    from lunar_tune.metrics.goal import in_words

    row, best, goal = results.trial(number), results.best, results.goal
    full = best is not None and row.number == best.number
    scores = results.confirmed if full and results.confirmed is not None else row.scores
    noted = results.study.notes["confirmed"] if full else {"max_new_tokens": row.max_new_tokens}
    spec = dataclasses.replace(spec, layers=_layers(spec, row.parameters))
    missed = goal.missed(scores)
    held = spec.data.held_out
    return ExportJob(
        spec=spec,
        parameters=row.parameters,
        form=form,
        folder=output,
        rank=rank,
        reported=Reported(
            search=results.folder.name,
            trial=row.number,
            goal=str(goal),
            scores=scores,
            rows=results.answers(row.number, full=full),
            max_new_tokens=int(noted["max_new_tokens"] or 0),
            vanilla=results.vanilla_in_full if full else results.vanilla,
            missed=in_words(missed),
            n_retain=len(held.retain) if held is not None and full else spec.data.n_retain,
            held_out=held is not None,
            full=full,
        ),
    )


def _layers(spec: TrialSpec, parameters: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the blocks that the trial edits, so that no others are captured."""
    layer = parameters.get("layer")
    if not spec.method.edits_one_layer or layer is None:
        return ()
    return tuple(map(int, layer if isinstance(layer, (list, tuple)) else (layer,)))


def _show(exported: Exported, console: Console) -> None:
    """Show the form's scores beside those that the search reported."""
    from lunar_tune.study.rows import score_cells

    found, reported = exported.comparison, exported.job.reported
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "forget", "retain", "factual", "deviation score"):
        table.add_column(column, justify="left" if column == "" else "right")
    table.add_row("base model", *score_cells(reported.vanilla))
    table.add_row(f"trial {reported.trial}, as reported", *reported.cells(reported.scores))
    table.add_row(f"the {exported.job.form}, as loaded", *reported.cells(found.scores))
    console.print("ROUGE-1 recall of the answers")
    console.print(table)
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
