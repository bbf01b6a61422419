"""The command `lunar-tune export`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from lunar_tune.cli.commands import Command, TrialOptions, score_table
from lunar_tune.config.fields import option, same_option
from lunar_tune.config.options import OUTPUT, Reused, SearchConfig
from lunar_tune.display import say
from lunar_tune.errors import Problems
from lunar_tune.files import write_json


@dataclass(frozen=True, kw_only=True)
class ExportOptions(TrialOptions):
    """What the command takes."""

    save: Path = same_option(Reused, "save", default=MISSING)
    """Folder to write, empty or missing."""
    format: str = option("checkpoint", group=OUTPUT, metavar="FORMAT", common=True)
    """checkpoint (a whole model) or adapter (PEFT LoRA). adapter:RANK chooses the rank for lunar's
    adamw, which an adapter approximates; default: the smallest with an error of at most 1 %."""
    register: str | None = option(None, group=OUTPUT, metavar="NAME")
    """Register the folder as a version of this model in MLflow."""
    tracking_uri: str | None = same_option(SearchConfig, "tracking_uri")
    """MLflow tracking URI for --register, if the store was moved or needs a password. Default: the
    store that the search was written to."""
    json: Path | None = same_option(Reused, "json", common=False)
    """Write the content of export.json to this file too."""


@Command
def export(options: ExportOptions, problems: Problems) -> None:
    """Write a search's best setting as a model that loads without lunar-tune, and prove its scores.

    A search keeps no weights: its trial runs again, with the search's seed. What was written is
    then loaded from the disk by transformers and peft alone and asked every question;
    exit code 1 if its scores are not those that the search reported.

    `lunar-tune export runs/NAME --save unlearned`
    """
    console = options.console
    with options.working("reading the search"):
        from lunar_tune.export.export_job import ExportJob
        from lunar_tune.study.stored_search import StoredSearch

        if options.register is not None:
            from lunar_tune.tracking.sync import check_registrable

            with problems.collect():
                search = StoredSearch.read(options.search, runs=options.output)
                check_registrable(search, options.register, tracking_uri=options.tracking_uri)
        job = ExportJob.plan(
            options.search,
            options.save,
            runs=options.output,
            number=options.trial,
            form=options.format,
            device=options.device,
            trust_remote_code=options.trusted,
            problems=problems,
        )
        from lunar_tune.export.writing import export as run_export
        from lunar_tune.tracking.sync import register_model

    exported = run_export(job, console)
    document = exported.document
    console.print("ROUGE-1 recall of the answers")
    console.print(score_table(exported.rows))
    for remark in exported.remarks:
        say(console, remark)
    say(console, f"compared with what the search recorded, {exported.differences}")
    if options.json is not None:
        write_json(options.json, document)
    exported.raise_if_unproven()
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
