"""The command `python -m lunar_tune.fetch`: published data sets into the user's folder of data.

Covers: a list of what there is, fetching by name, other servers.
Does not cover: what is fetched and how it is checked (`data.published`, `data.fetching`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lunar_tune.cli.running import DebugOption, QuietOption, reporting_errors, say
from lunar_tune.data.fetching import Servers, fetch, state_of
from lunar_tune.data.published import PUBLISHED, PublishedSet
from lunar_tune.errors import DataError, Problems
from lunar_tune.paths import data_dir


def fetch_command(
    *,
    names: Annotated[
        list[str] | None, typer.Argument(help="Data sets to fetch.", show_default=False)
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Show what there is; without names the same.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch again what is there already.")
    ] = False,
    github_url: Annotated[
        str | None,
        typer.Option(
            help="A server that answers as raw.githubusercontent.com does.",
            envvar="LUNAR_TUNE_GITHUB_URL",
            metavar="URL",
        ),
    ] = None,
    hub_url: Annotated[
        str | None,
        typer.Option(
            help="A server that answers as huggingface.co does.",
            envvar="HF_ENDPOINT",
            metavar="URL",
        ),
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Fetch published data sets, to be used by name: `--data tofu`.

    `python -m lunar_tune.fetch` shows what there is, with licences.

    `python -m lunar_tune.fetch tofu pistol-1` fetches two of them.

    They are kept in the folder that LUNAR_TUNE_DATA names, else in the user's folder of data. Each
    comes from one commit of its repository and must hold the rows that are known of it; its
    checksum must be the known one or, where none is known, the one of the first fetch.
    """
    with reporting_errors(debug=debug):
        console, folder = Console(quiet=quiet, emoji=False), data_dir()
        if show or not names:
            _show(console, folder)
        else:
            servers = Servers(github=github_url or None, hub=hub_url or None)
            _fetch(names, folder, servers, console, force=force)


def _show(console: Console, folder: Path) -> None:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for column in ("name", "rows", "licence", "here", "what"):
        table.add_column(
            column, justify="right" if column == "rows" else "left", no_wrap=column != "what"
        )
    for name, published in PUBLISHED.items():
        here = {"not fetched": "", "fetched": "yes", "changed": "changed"}[
            state_of(published, folder)
        ]
        licence = published.repository.licence
        table.add_row(name, str(published.rows), licence, here, published.about)
    console.print(table, highlight=False)
    for page in dict.fromkeys(entry.repository.page for entry in PUBLISHED.values()):
        say(console, f"from {page}")
    say(console, f"kept in {folder}")


def _fetch(
    names: Sequence[str], folder: Path, servers: Servers, console: Console, *, force: bool
) -> None:
    problems = Problems()
    wanted: dict[str, PublishedSet] = {}
    for name in names:
        with problems.collect():
            wanted[name] = PUBLISHED[name]
    problems.raise_if_any(DataError)
    for name, published in wanted.items():
        with problems.collect():
            path, state = folder / published.file_name, state_of(published, folder)
            if state == "fetched" and not force:
                say(console, f"{name}: is there already, {path}")
                continue
            if state == "changed" and not force:
                raise DataError(
                    f"{name}: {path} is not, or no longer, what was fetched. --force replaces it."
                )
            lock = fetch(published, folder, servers=servers)
            how = "the known checksum" if published.sha256 else "checksum recorded"
            say(console, f"{name}: {lock.rows} rows, {how}, {path}")
    problems.raise_if_any(DataError)
