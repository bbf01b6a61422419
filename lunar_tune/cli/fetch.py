"""The command `lunar-tune fetch`: published data sets into the user's folder of data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lunar_tune.cli.commands import Command, CommonOptions, plain_table
from lunar_tune.config.fields import option, same_option
from lunar_tune.config.options import OUTPUT, SUBJECT, SearchConfig
from lunar_tune.data.data_catalog import PUBLISHED, state_of
from lunar_tune.data.data_catalog import fetch as fetch_set
from lunar_tune.display import say
from lunar_tune.errors import DataError, Problems
from lunar_tune.files import data_dir


@dataclass(frozen=True, kw_only=True)
class FetchOptions(CommonOptions):
    """What the command takes."""

    data: tuple[str, ...] = option((), group=SUBJECT, positional=True)
    """Data sets to fetch. Default: none, and the list of all is shown."""
    force: bool = same_option(SearchConfig, "force", group=OUTPUT, common=True)
    """Fetch again data sets that are there already."""


@Command
def fetch(options: FetchOptions, problems: Problems) -> None:
    """Fetch published data sets, to be used by name: `--data tofu`.

    `lunar-tune fetch` shows what there is, with licences.

    `lunar-tune fetch tofu pistol-1` fetches two of them.

    Data sets are kept in the folder that LUNAR_TUNE_DATA names, else in the user's folder of data.
    Each comes from one commit of its repository. Its number of rows is checked, and its checksum:
    against the published one or, where none is known, against that of the first fetch.
    """
    console, folder = options.console, data_dir()
    if not options.data:
        _show(console, folder)
    wanted = {}
    for name in options.data:
        with problems.collect():
            wanted[name] = PUBLISHED[name]
    problems.raise_if_any(DataError)
    for name, published in wanted.items():
        with problems.collect():
            path, state = folder / published.file_name, state_of(published, folder)
            if state == "fetched" and not options.force:
                say(console, f"{name}: is there already, {path}")
                continue
            if state == "changed" and not options.force:
                raise DataError(
                    f"{name}: {path} is not, or no longer, what was fetched. --force replaces it."
                )
            lock = fetch_set(published, folder)
            how = "the known checksum" if published.sha256 else "checksum recorded"
            say(console, f"{name}: {lock.rows} rows, {how}, {path}")
    problems.raise_if_any(DataError)


def _show(console: Console, folder: Path) -> None:
    here = {"not fetched": "", "fetched": "yes", "changed": "changed"}
    rows = [
        (name, one.rows, one.repository.licence, here[state_of(one, folder)], one.about)
        for name, one in PUBLISHED.items()
    ]
    columns = ("name", "rows", "licence", "here", "what")
    table = plain_table(columns, rows, left=("name", "licence", "here"), folded=("what",))
    table.collapse_padding = True
    console.print(table, highlight=False)
    for page in dict.fromkeys(entry.repository.page for entry in PUBLISHED.values()):
        say(console, f"from {page}")
    say(console, f"kept in {folder}")
