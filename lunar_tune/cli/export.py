"""The command `lunar-tune export`."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune import __version__
from lunar_tune.cli.commands import OUTPUT, Command, Reused, TrialOptions
from lunar_tune.cli.running import say, score_table
from lunar_tune.config.fields import option, same_option
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import LunarTuneError, Problems
from lunar_tune.files import write_json
from lunar_tune.report.progress import tiny_progress, working

if TYPE_CHECKING:
    from lunar_tune.export.export_job import ExportJob
    from lunar_tune.export.proof import Exported


@dataclass(frozen=True, kw_only=True)
class ExportOptions(TrialOptions):
    """What the command takes."""

    save: Path = same_option(Reused, "save", default=MISSING)
    """Folder to write, empty or missing."""
    format: str = option("checkpoint", group=OUTPUT, metavar="FORMAT", common=True)
    """checkpoint (a whole model) or adapter (PEFT LoRA). adapter:RANK is one of another rank, where
    lunar's adamw leaves the choice; by default the smallest with an error of 1 %."""
    register: str | None = option(None, group=OUTPUT, metavar="NAME")
    """Register the folder as a version of this model in MLflow."""
    tracking_uri: str | None = same_option(SearchConfig, "tracking_uri")
    """MLflow tracking URI for --register, where the store was moved or wants a password. Default:
    the one that the search was written to."""
    json: Path | None = same_option(Reused, "json", common=False)
    """Write what export.json says here as well."""


def export(options: ExportOptions, problems: Problems) -> None:
    """Write a search's winner as files that load without lunar-tune, and prove it.

    A search keeps no weights: its trial runs again, with the search's seed. What was written is
    then loaded from the disk by transformers and peft alone and asked every question;
    exit code 1 if its scores are not those that the search reported.

    `lunar-tune export runs/NAME --save unlearned`
    """
    console = options.console()
    with working(console, f"lunar-tune {__version__}: reading the search"):
        job = _checked(options, problems)
        from lunar_tune.export.writing import export as run_export
        from lunar_tune.tracking.sync import register_model

    with tiny_progress(console) as on_build:
        exported = run_export(job, on_build=on_build, on_step=lambda text: say(console, text))
    document = exported.document
    _show(exported, console)
    if options.json is not None:
        write_json(options.json, document)
    if document["failures"]:
        larger = " --format adapter:RANK with a larger rank comes nearer."
        raise LunarTuneError(
            f"the {job.form} does not give what {document['search']} reported of trial "
            f"{document['trial']}: {'; '.join(document['failures'])}."
            f"{larger if document['relative_error'] else ''} {job.folder} is kept; its export.json "
            "says that it is not proven. A trial comes out the same on the machine, with the "
            "libraries and the model that it was searched with."
        )
    say(console, f"{job.form} written to {options.save}")
    if options.register is not None:
        version = register_model(
            job.search,
            job.folder,
            options.register,
            row=job.row,
            scores=document["scores"],
            form=job.form,
            tracking_uri=options.tracking_uri,
        )
        say(console, f"registered as {options.register}, version {version}")


def _checked(options: ExportOptions, problems: Problems) -> ExportJob:
    """Return what is to be exported, or say everything that is wrong."""
    from lunar_tune.export.export_job import ExportJob, check_adapter
    from lunar_tune.report.results import load_search
    from lunar_tune.search.resume import assemble_again
    from lunar_tune.tracking.sync import check_registrable
    from lunar_tune.training.checkpoints import check_save_folder

    form, _, rank = options.format.partition(":")
    if not re.fullmatch("checkpoint|adapter(:[1-9][0-9]*)?", options.format):
        problems.add(
            f"--format {options.format}: checkpoint, adapter, or adapter:RANK with 1 or more."
        )
    with problems.collect():
        check_save_folder(options.save)
    with problems.collect():
        results = load_search(options.search, runs=options.output)
        if options.register is not None:
            with problems.collect():
                check_registrable(results, options.register, tracking_uri=options.tracking_uri)
        with problems.collect():
            row = results.trial(options.trial)
            answers = results.answers(row.number, full=row == results.best)
        with problems.collect():
            spec = assemble_again(results, problems, device=options.device)
            if form == "adapter":
                check_adapter(spec, rank)
    problems.raise_if_any()
    return ExportJob(
        search=results,
        row=row,
        answers=answers,
        spec=spec,
        form=form,
        folder=options.save,
        rank=int(rank) if rank else None,
    )


def _show(exported: Exported, console: Console) -> None:
    """Show the form's scores beside those that the search reported."""
    from lunar_tune.study.rows import score_cells

    said = exported.document
    rows = {
        "base model": score_cells(said["baseline_scores"]),
        f"trial {said['trial']}, as reported": exported.cells(said["reported_scores"]),
        f"the {said['format']}, as loaded": exported.cells(said["scores"]),
    }
    console.print("ROUGE-1 recall of the answers")
    console.print(score_table(rows))
    for remark in exported.remarks:
        say(console, remark)
    text = exported.differences
    if said["relative_error"]:
        rank, error = max(said["ranks"].values()), said["relative_error"]
        text += f"; rank {rank}, relative error {error:.2g} (Frobenius)"
    say(console, text)


COMMAND = Command(export, ExportOptions)
