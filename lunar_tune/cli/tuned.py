"""The command `python -m lunar_tune.tuned`: settings that searches found, for later searches.

Covers: a table, the entries as JSON, keeping the best of a finished search. Loads no torch.
Does not cover: using them; a search does that by itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lunar_tune.cli.running import DebugOption, QuietOption, reporting_errors, say
from lunar_tune.errors import Problems
from lunar_tune.paths import check_writable_file, tuned_dirs

if TYPE_CHECKING:
    from lunar_tune.search.tuned.tuned_store import KeptSetting

_SCORES = ("forget_rouge1", "retain_rouge1")


def tuned(
    *,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Keep the best setting of the finished search in this folder.", metavar="FOLDER"
        ),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="With --keep: also where what is kept is as good."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the entries, for other tools.")
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show settings that searches found, or keep the best of one.

    A later search of the same model and method tries them first: what was tuned on the same data,
    then up to three others. `--no-starting-points` goes without.

    `python -m lunar_tune.tuned --keep runs/NAME` keeps one; a search does it with `--keep`.
    """
    with reporting_errors(debug=debug):
        from lunar_tune.search.tuned.finished_search import keep_finished
        from lunar_tune.search.tuned.tuned_store import kept_settings

        console, problems = Console(quiet=quiet), Problems()
        if replace and keep is None:
            problems.add("--replace: says what --keep FOLDER may do; name the folder of a search.")
        with problems.collect():
            check_writable_file(json_file, "--json")
        problems.raise_if_any()
        if keep is not None:
            setting, path = keep_finished(keep, replace=replace)
            say(console, f"{setting.about} kept in {path}")
        kept = kept_settings()
        if json_file is not None:
            _write(kept, json_file)
            say(console, f"{_count(kept)} written to {json_file}")
        elif keep is None:
            _show(kept, console)


def _show(kept: Sequence[KeptSetting], console: Console) -> None:
    folders = " and ".join(map(str, tuned_dirs()))
    if not kept:
        say(console, f"Nothing is kept in {folders}.")
        return
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    columns = ("model", "data", "edges", "method", "setting", *_SCORES, "trials", "found")
    for column in columns:
        number = column in (*_SCORES, "trials")
        name = column.removesuffix("_rouge1")
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for one in kept:
        setting, found = one.setting, one.setting.provenance
        values = ", ".join(f"{k} {_brief(v)}" for k, v in setting.parameters.items())
        scores = (f"{setting.scores[n]:.3f}" if n in setting.scores else "" for n in _SCORES)
        edges, method = "+".join(setting.forget_edges), f"{setting.method} ({setting.variant})"
        partly = "" if found.confirmed_in_full else ", not in full"
        cells = (one.model, setting.data, edges, method, values, *scores, str(found.trials))
        table.add_row(*map(escape, cells), f"{found.date}{partly}")
    console.print(table)
    say(console, f"{_count(kept)} in {folders}")


def _write(kept: Sequence[KeptSetting], path: Path) -> None:
    from lunar_tune.files import write_atomically

    documents: list[dict[str, Any]] = [
        {"model": one.model, **one.setting.model_dump(mode="json"), "file": str(one.file)}
        for one in kept
    ]
    text = json.dumps(documents, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def _count(kept: Sequence[Any]) -> str:
    return "1 setting" if len(kept) == 1 else f"{len(kept)} settings"


def _brief(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
