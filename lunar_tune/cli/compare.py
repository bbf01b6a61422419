"""The command `lunar-tune compare`: the trials of searches beside each other."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.cli.commands import Command, CommonOptions, TrialOptions
from lunar_tune.config.fields import option, same_option
from lunar_tune.config.options import SUBJECT, Reused, SearchConfig
from lunar_tune.display import say
from lunar_tune.errors import InputError, Problems
from lunar_tune.secrets import without_login, without_password

if TYPE_CHECKING:
    from lunar_tune.report.results import SearchResults
    from lunar_tune.study.stored_search import StoredSearch
    from lunar_tune.tracking.ui import View


@dataclass(frozen=True, kw_only=True)
class CompareOptions(CommonOptions):
    """What the command takes."""

    search: tuple[str, ...] = option((), group=SUBJECT, positional=True)
    """Names or folders. Default: the search that was written to last."""
    output: Path = same_option(TrialOptions, "output")
    save: Path | None = same_option(Reused, "save", metavar="FILE", written=True)
    """Write one page of HTML to this file instead of starting MLflow's UI."""
    tracking_uri: str | None = same_option(SearchConfig, "tracking_uri")
    """MLflow tracking URI, if the store was moved or needs a password. Default: the store that the
    searches were written to."""


@Command
def compare(options: CompareOptions, problems: Problems) -> None:
    """Compare the trials of searches in MLflow's UI, or in one page of HTML.

    `lunar-tune compare`

    `lunar-tune compare runs/ONE runs/OTHER --save both.html`

    The UI can be reached from this machine only, by who knows the printed addresses, and runs until
    Ctrl-C; it shows runs and keeps views. Searches on a tracking server are compared there. Of a
    search that still runs, the trials that have ended are shown.
    """
    from lunar_tune.report.results import SearchResults, write_static_page
    from lunar_tune.study.folder import searches_in

    console, results, uri = options.console, [], ""
    # Without names, the search that was written to last.
    searches = options.search or [str(one.path) for one in searches_in(options.output)[:1]]
    if not searches:
        problems.add(
            f"{options.output} has no search to compare: name a search's folder, give --output, or "
            "start one with python -m lunar_tune.search."
        )
    for search in searches:
        with problems.collect():
            results.append(SearchResults.read(search, runs=options.output))
    if options.save is None:
        uri = _store(results, options.tracking_uri, problems)
    problems.raise_if_any()
    if options.save is not None:
        write_static_page(results, options.save)
        say(console, f"written to {options.save}")
    else:
        _show(results, uri, console)


def _store(results: Sequence[SearchResults], given: str | None, problems: Problems) -> str:
    """Return the tracking URI of the store that the searches share."""
    from lunar_tune.study.rows import COMPLETE
    from lunar_tune.tracking.address import store_of

    stores: dict[str, str] = {}
    for one in results:
        if not any(row.state == COMPLETE for row in one.rows):
            problems.add(
                f"{one.folder.name}: there is nothing to compare. {one.verdict} --save "
                "FILE writes a page without MLflow."
            )
        with problems.collect():
            uri = store_of(one, given)
            stores[without_password(uri)] = uri
    if len(stores) > 1:
        problems.add(
            f"the searches are in different MLflow stores ({', '.join(sorted(stores))}), which one "
            "UI cannot compare: name searches of one store, or use --save FILE."
        )
    return next(iter(stores.values()), "")


def _show(results: Sequence[SearchResults], uri: str, console: Console) -> None:
    """Show the comparison on the store's own server, or on one that runs until Ctrl-C."""
    from lunar_tune.tracking.address import sqlite_file
    from lunar_tune.tracking.ui import opening_page, served
    from lunar_tune.tracking.ui_server import NO_FILES

    # Before the server starts, which would bring an older store up to date at the same time.
    views = _written(results, uri)
    with ExitStack() as running:
        server, wait = without_login(uri), None
        if not uri.startswith(("http://", "https://")):
            console.print("starting MLflow's UI", highlight=False)
            server, wait = running.enter_context(served(uri))
            if sqlite_file(uri) is None:
                say(console, NO_FILES)
        for view in views:
            say(console, f"{view.name}: {view.address(server)}")
        # Without a screen Python would start a browser in this terminal.
        screens = (os.environ.get("DISPLAY"), os.environ.get("WAYLAND_DISPLAY"))
        if sys.platform != "linux" or any(screens):
            page = views[0].address(server)
            webbrowser.open(page if wait is None else running.enter_context(opening_page(page)))
        if wait is not None:
            console.print("Ctrl-C stops MLflow's UI", highlight=False)
            wait()


def _written(results: Sequence[SearchResults], uri: str) -> list[View]:
    """Bring the store up to date, and return the views that are kept there."""
    from lunar_tune.driver.persistence import alone
    from lunar_tune.report.results import short_report
    from lunar_tune.tracking.artifacts import bring_artifacts
    from lunar_tune.tracking.store import opened_store
    from lunar_tune.tracking.sync import claimed, shown, sync
    from lunar_tune.tracking.ui import keep_views

    found, problems = [], Problems()
    bring_artifacts(uri)
    with opened_store(uri) as client:
        for one in results:
            mine: StoredSearch = one
            # A search that runs writes its runs itself; the folder and the store may be another
            # user's, to be read alone.
            with suppress(InputError, OSError), alone(one.folder), opened_store(uri) as writing:
                mine = claimed(one, writing)
                sync(mine, writing, note=short_report(one))
            if (runs := shown(client, mine)) is not None:
                found.append(runs)
            else:
                problems.add(
                    f"{one.folder.name}: {without_password(uri)} does not have its runs, and they "
                    "cannot be written there. --save FILE compares the trials without MLflow."
                )
        problems.raise_if_any(InputError)
        return keep_views(client, found)
