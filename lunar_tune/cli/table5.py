"""The command `lunar-tune table5`: tuned settings for methods × models × data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lunar_tune.cli.commands import Command, CommonOptions
from lunar_tune.config.fields import option, same_option, shared_options
from lunar_tune.config.options import RETAINING, SUBJECT, TINY, Reused, SearchConfig
from lunar_tune.display import say
from lunar_tune.errors import Problems

PAPER_METHODS = ("lunar", "ga", "gd", "ukl", "dpo", "npo")
"""The methods of the paper's Table 5."""


@dataclass(frozen=True, kw_only=True)
class TableOptions(SearchConfig, CommonOptions):
    """What the command takes: a search's options, with lists where a cell has one."""

    model: str = same_option(SearchConfig, "model", default=TINY, group=SUBJECT)
    """Models, with commas between; each as a search takes it."""
    data: str | None = same_option(
        SearchConfig, "data", metavar="DATA[:EDGE[+EDGE]][,…]", group=SUBJECT
    )
    """Data sets, with commas between, each with edges to forget if they are not the default.
    Default: each model's own."""
    method: str = same_option(
        SearchConfig, "method", default=",".join(PAPER_METHODS), group=SUBJECT
    )
    """Methods, with commas between, each with its solver or trained part if that is not the
    default: lunar:closed_form, ga:full."""
    seeds: int = option(1, group=SUBJECT, least=1, common=True)
    """Searches of each cell, with seeds from --seed on; the table shows their spread."""
    constrain: tuple[str, ...] = same_option(SearchConfig, "constrain", default=(RETAINING,))
    """What a feasible trial keeps; the same for all methods."""
    time_budget: float | None = same_option(SearchConfig, "time_budget")
    """Start no trial of a cell after this many seconds. 0 runs nothing and writes the table from
    the searches that there are."""
    output: Path = same_option(SearchConfig, "output", default=Path("runs/table5"))
    """Folder of the table and of its searches. The same command resumes what is there."""
    dry_run: bool = same_option(Reused, "dry_run")
    """Check all that needs no weights, show which cells are missing, and stop."""
    # What belongs to a cell, or would give one method a better start than another.
    solver: str | None = None
    name: str | None = None
    resume: str | None = None
    start_from: tuple[str, ...] = ()


@Command
def table5(options: TableOptions, problems: Problems) -> int:
    """Tune every method on every model and data set, and write a table of what they reach.

    Each cell is a search of its own, with its folder and its MLflow runs under the output. Cells
    that are finished are never run again: the same command resumes after an interruption, and with
    a longer list of models, data or methods it runs what is new. `table.md`, `table.csv` and
    `table.tex` are written from the searches alone.

    On a laptop: `lunar-tune table5 --data mini,factual:arts --num-trials 10`

    Exit codes: 0 every cell is finished, 3 some could not be run, 130 interrupted, 2 the input was
    wrong.
    """
    from lunar_tune.data.texts import divided
    from lunar_tune.driver.table5 import TableRun, cells_of, check_names
    from lunar_tune.report.methods_table import data_and_edges
    from lunar_tune.tracking.address import named_uri

    console = options.console
    models = _listed("--model", options.model.split(","), problems)
    data = []
    if options.data is not None:
        parts = divided(options.data, lambda part: data_and_edges(part.strip(), options.edge)[2])
        data = _listed("--data", parts, problems)
    methods = _listed("--method", options.method.split(","), problems)
    shared = shared_options(options, SearchConfig, without={"model", "data", "method"})
    if shared.model_path is not None and len(models) > 1:
        problems.add("--model-path belongs to one model: give one with --model.")
    shared = dataclasses.replace(
        shared, tracking_uri=problems.attempt(lambda: named_uri(options.tracking_uri))
    )
    cells = []
    with problems.collect():
        seeds = {"seed": options.seed, "seeds": options.seeds}
        cells = cells_of(models, data, methods, edge=options.edge, **seeds)
    with problems.collect():
        if cells:  # each is checked whole later
            check_names(cells, shared)
        else:
            shared.check()
    with problems.collect():
        table = TableRun(cells, shared, console)
    problems.raise_if_any()
    if options.dry_run:
        table.show_plan()
        return 0
    if options.time_budget == 0:
        say(console, f"written to {', '.join(map(str, table.write()))}")
        return 0
    return table.run()


def _listed(flag: str, parts: Sequence[str], problems: Problems) -> list[str]:
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        problems.add(f"{flag} is empty: name at least one.")
    return names
