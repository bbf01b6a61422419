"""The options of a search that more than one command takes, each declared once.

Covers: what decides trials, and resources and results.
Does not cover: options of a run (`given`), options of one command alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lunar_tune.config.search_config import SAMPLERS, SCHEDULERS

__all__ = [
    "PLACE_PANEL",
    "SEARCH_PANEL",
    "AddressOption",
    "BoundedOption",
    "ConcurrencyOption",
    "ConstrainOption",
    "CpusOption",
    "DryRunOption",
    "ExperimentOption",
    "FinetuneOption",
    "GpusOption",
    "MaxFailuresOption",
    "MinimiseOption",
    "NumTrialsOption",
    "OutputOption",
    "RetainFloorOption",
    "SamplerOption",
    "SchedulerOption",
    "SpaceOption",
    "StartingPointsOption",
    "TrackingUriOption",
    "TrialTimeoutOption",
]

SEARCH_PANEL, PLACE_PANEL = "Search", "Resources and results"

SpaceOption = Annotated[
    str | None,
    typer.Option(
        help="Search space: a YAML file or a shipped name. Default: the model's own.",
        rich_help_panel=SEARCH_PANEL,
    ),
]
NumTrialsOption = Annotated[int, typer.Option(help="Trials to run.", rich_help_panel=SEARCH_PANEL)]
MinimiseOption = Annotated[
    str,
    typer.Option(
        "--minimise",
        "--minimize",
        help="Metric to make as good as possible; one for which higher is better is maximised. See "
        "the README for their names.",
        metavar="METRIC",
        rich_help_panel=SEARCH_PANEL,
    ),
]
ConstrainOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Bound that a feasible trial keeps; may be given several times. Default: "
        "'retain_rouge1>=0.8'.",
        metavar="'METRIC>=VALUE'",
        rich_help_panel=SEARCH_PANEL,
    ),
]
RetainFloorOption = Annotated[
    float | None,
    typer.Option(
        help="Least retain ROUGE-1 of a feasible trial: a short form of --constrain.",
        rich_help_panel=SEARCH_PANEL,
    ),
]
BoundedOption = Annotated[
    bool,
    typer.Option(
        help="Ask no more of a trial that has missed the floor for certain; its retain score is "
        "then the mean of the rows that were asked.",
        rich_help_panel=SEARCH_PANEL,
    ),
]
SamplerOption = Annotated[
    str,
    typer.Option(help=f"Who proposes: {', '.join(SAMPLERS)}.", rich_help_panel=SEARCH_PANEL),
]
SchedulerOption = Annotated[
    str,
    typer.Option(
        help=f"Who ends gradient fits early by comparing them: {', '.join(SCHEDULERS)}.",
        rich_help_panel=SEARCH_PANEL,
    ),
]
StartingPointsOption = Annotated[
    bool,
    typer.Option(help="Try the space's known-good settings first.", rich_help_panel=SEARCH_PANEL),
]
MaxFailuresOption = Annotated[
    int,
    typer.Option(help="Stop after so many failed trials in a row.", rich_help_panel=SEARCH_PANEL),
]
TrialTimeoutOption = Annotated[
    float | None,
    typer.Option(
        help="Seconds after which a trial counts as hanging: its worker is replaced, and the trial "
        "runs again, three times at most.",
        rich_help_panel=SEARCH_PANEL,
    ),
]
FinetuneOption = Annotated[
    str,
    typer.Option(
        help="What happens when the unmodified model does not know the data: auto fine-tunes a "
        "model of the catalogue first, and keeps it for all later searches; never stops with the "
        "advice.",
        metavar="auto|never",
        rich_help_panel=SEARCH_PANEL,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything that needs no weights, show the plan, and stop.",
        rich_help_panel=SEARCH_PANEL,
    ),
]
OutputOption = Annotated[
    Path, typer.Option(help="Folder of all searches.", rich_help_panel=PLACE_PANEL)
]
TrackingUriOption = Annotated[
    str | None,
    typer.Option(
        help="MLflow tracking URI. Default: a sqlite file in the output folder.",
        rich_help_panel=PLACE_PANEL,
    ),
]
ExperimentOption = Annotated[
    str,
    typer.Option(
        help="MLflow experiment of the runs; made if missing.", rich_help_panel=PLACE_PANEL
    ),
]
GpusOption = Annotated[
    float | None,
    typer.Option(
        help="GPUs of a trial, fractions allowed. Default: 1 where there are any.",
        rich_help_panel=PLACE_PANEL,
    ),
]
CpusOption = Annotated[
    float | None,
    typer.Option(
        help="CPU cores of a trial. Default: shared out, at most 4.", rich_help_panel=PLACE_PANEL
    ),
]
ConcurrencyOption = Annotated[
    int | None,
    typer.Option(help="Trials at once. Default: as many as fit.", rich_help_panel=PLACE_PANEL),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Address of a Ray cluster. Default: Ray is started here.", rich_help_panel=PLACE_PANEL
    ),
]
