"""The command `python -m lunar_tune.compare`: the trials of searches beside each other.

Covers: MLflow's comparison page on the right store, started here or on its own server; one page
of HTML instead, which needs no server.
Does not cover: what the page shows (`static_page`), how the server is run (`mlflow_ui`).
"""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lunar_tune.cli.running import DebugOption, reporting_errors, say
from lunar_tune.errors import InputError, Problems
from lunar_tune.paths import check_writable_file
from lunar_tune.secrets import without_login, without_password
from lunar_tune.study.folder import RUNS

if TYPE_CHECKING:
    from lunar_tune.report.results import SearchResults
    from lunar_tune.tracking.mirror import Mirror


def compare(
    *,
    searches: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names or folders. Default: the search that was written to last.",
            metavar="[SEARCH]…",
            show_default=False,
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder in which names are looked up.")] = RUNS,
    static: Annotated[
        Path | None,
        typer.Option(help="Write one page of HTML instead, and start nothing.", metavar="FILE"),
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            help="MLflow tracking URI, where the store was moved or wants a password. Default: "
            "the one that the searches were written to."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Of MLflow's UI on this machine. Default: a free one.")
    ] = None,
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Print the address and open no browser.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Compare the trials of searches in MLflow's UI, or in one page of HTML.

    `python -m lunar_tune.compare`

    `python -m lunar_tune.compare runs/ONE runs/OTHER --static both.html`

    The UI is bound to this machine alone and runs until Ctrl-C. Searches on a tracking server are
    compared there. A search that still runs shows the trials that have ended.
    """
    with reporting_errors(debug=debug):
        problems, results = Problems(), []
        for search in searches or _last(runs, problems):
            with problems.collect():
                results.append(_load(search, runs))
        with problems.collect():
            check_writable_file(static, "--static")
        mirrors = [] if static is not None else _mirrors(results, tracking_uri, port, problems)
        problems.raise_if_any()
        console = Console(emoji=False)
        if static is not None:
            from lunar_tune.report.static_page import write_static_page

            write_static_page(results, static)
            say(console, f"written to {static}")
        else:
            _show(mirrors, console, port=port, opens=not no_open)


def _load(search: str, runs: Path) -> SearchResults:
    from lunar_tune.report.results import load_search

    return load_search(search, runs=runs)


def _last(runs: Path, problems: Problems) -> list[str]:
    """Return the folder of the search that was written to last, if there is one."""
    from lunar_tune.study.folder import searches_in

    found = searches_in(runs)
    if not found:
        problems.add(
            f"{runs} has no search to compare: name a search's folder, give --runs, or start one "
            "with lunar_tune.search."
        )
    return [str(one.path) for one in found[:1]]


def _mirrors(
    results: Sequence[SearchResults], uri: str | None, port: int | None, problems: Problems
) -> list[Mirror]:
    from lunar_tune.tracking.mirror import find_mirror
    from lunar_tune.tracking.ui import check_port

    mirrors = []
    for one in results:
        with problems.collect():
            mirrors.append(find_mirror(one, uri))
    with problems.collect():
        check_port(port)
    if len(stores := sorted({without_password(mirror.uri) for mirror in mirrors})) > 1:
        problems.add(
            f"the searches are in different MLflow stores ({', '.join(stores)}), which one UI "
            "cannot compare: name searches of one store, or use --static FILE."
        )
    return mirrors


def _show(mirrors: Sequence[Mirror], console: Console, *, port: int | None, opens: bool) -> None:
    """Show the comparison on the store's own server, or on one that runs until Ctrl-C."""
    from lunar_tune.tracking.ui import is_served, served

    uri = mirrors[0].uri
    experiments = sorted({mirror.experiment_id for mirror in mirrors})
    # Before the server starts, which would bring an older store up to date at the same time.
    trials, views = _trials(mirrors)
    if is_served(uri):
        _present(console, without_login(uri), trials, experiments, views, opens=opens)
        return
    console.print("starting MLflow's UI", highlight=False)
    with served(uri, port=port) as server:
        server.wait_until_ready()
        _present(console, server.address, trials, experiments, views, opens=opens)
        console.print("Ctrl-C ends it", highlight=False)
        server.wait_until_interrupted()


def _trials(mirrors: Sequence[Mirror]) -> tuple[list[str], dict[Mirror, str]]:
    """Return the runs of the searches' trials, and the keys of the searches' views."""
    from lunar_tune.tracking.chart_view import keep_view
    from lunar_tune.tracking.mirror import opened_store

    problems, trials, views = Problems(), [], {}
    with opened_store(mirrors[0].uri) as client:
        for mirror in mirrors:
            with problems.collect():
                runs = mirror.trials(client)
                trials += [run.info.run_id for run in runs]
                if (key := keep_view(client, mirror, runs)) is not None:
                    views[mirror] = key
    problems.raise_if_any(InputError)
    return trials, views


def _present(
    console: Console,
    server: str,
    trials: Sequence[str],
    experiments: Sequence[str],
    views: Mapping[Mirror, str],
    *,
    opens: bool,
) -> None:
    """Print the addresses, and open one where there is a screen: one search as charts."""
    from lunar_tune.tracking.ui import charts_address, comparison_address, runs_address

    address = comparison_address(server, trials, experiments)
    say(console, f"{len(trials)} trials: {address}")
    charts = {
        mirror.search: charts_address(server, mirror.experiment_id, key)
        for mirror, key in views.items()
    }
    for search, place in charts.items():
        say(console, f"charts of {search}: {place}")
    for experiment in experiments:
        say(console, f"all runs: {runs_address(server, experiment)}")
    if opens and _has_screen():
        webbrowser.open(next(iter(charts.values())) if len(charts) == 1 else address)


def _has_screen() -> bool:
    """Say whether a browser has where to open: Python would start one in this terminal, too."""
    if sys.platform != "linux":
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
