"""The command `python -m lunar_tune.fetch`: published data sets into the user's folder of data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lunar_tune.cli.commands import OUTPUT, SUBJECT, Command, CommonOptions, Given
from lunar_tune.cli.running import say
from lunar_tune.config.fields import option, same_option
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.data.data_catalog import PUBLISHED, PublishedSet
from lunar_tune.data.fetching import fetch as fetch_set
from lunar_tune.data.fetching import state_of
from lunar_tune.errors import DataError, Problems
from lunar_tune.paths import data_dir


@dataclass(frozen=True, kw_only=True)
class FetchOptions(CommonOptions):
    """What the command takes."""

    data: tuple[str, ...] = option(
        (), "Data sets to fetch; without one, shows what there is.", SUBJECT, positional=True
    )
    force: bool = same_option(
        SearchConfig,
        "force",
        help="Fetch again what is there already.",
        group=OUTPUT,
        common=True,
    )


def fetch(options: FetchOptions, _: Given) -> None:
    """Fetch published data sets, to be used by name: `--data tofu`.

    `lunar-tune fetch` shows what there is, with licences.

    `lunar-tune fetch tofu pistol-1` fetches two of them.

    They are kept in the folder that LUNAR_TUNE_DATA names, else in the user's folder of data. Each
    comes from one commit of its repository and must hold the rows that are known of it; its
    checksum must be the known one or, where none is known, the one of the first fetch.
    """
    console, folder = Console(quiet=options.quiet, emoji=False), data_dir()
    if not options.data:
        _show(console, folder)
        return
    _fetch(options.data, folder, console, force=options.force)


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


def _fetch(names: Sequence[str], folder: Path, console: Console, *, force: bool) -> None:
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
            lock = fetch_set(published, folder)
            how = "the known checksum" if published.sha256 else "checksum recorded"
            say(console, f"{name}: {lock.rows} rows, {how}, {path}")
    problems.raise_if_any(DataError)


COMMAND = Command(fetch, FetchOptions)
