"""The command `python -m lunar_tune.cache`: what is kept of models' activations, and emptying it.

Covers: a table, the entries as JSON, removing one entry or all. Loads no torch, to stay quick.
Does not cover: the built `tiny` models, which lie beside the activations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lunar_tune.cli.running import DebugOption, QuietOption, reporting_errors
from lunar_tune.engine.cache import ActivationCache, EntryInfo
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.models.memory import GIB

_REMOVE = "Remove"
_ABOUT = ("model", "kind", "dtype", "rows")
_SHORT = 8  # characters of a key that are shown, more where these do not tell two apart
_MOST_NAMED = 8  # keys in an error message


def cache(
    *,
    remove: Annotated[
        str | None,
        typer.Option(
            help="Remove one entry; the beginning of its key is enough.",
            metavar="KEY",
            rich_help_panel=_REMOVE,
        ),
    ] = None,
    empty: Annotated[
        bool, typer.Option("--empty", help="Remove everything.", rich_help_panel=_REMOVE)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the entries as JSON, for other tools.")
    ] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what is kept on disk of models' activations, or remove it.

    Searches and single runs keep what the unmodified model computes on its prompts, and later ones
    read it instead of computing it again. It can be removed at any time, also during a run: what is
    missing is computed again.

    `python -m lunar_tune.cache` shows what there is, last used first.

    `python -m lunar_tune.cache --remove 3f9a` removes the entry whose key begins so.
    """
    with reporting_errors(debug=debug):
        chosen = {"--remove": remove is not None, "--empty": empty, "--json": as_json}
        if sum(chosen.values()) > 1:
            given = " and ".join(flag for flag, given in chosen.items() if given)
            raise InputError(f"{given}: one at a time, in a command each.")
        kept, console = ActivationCache(), Console(quiet=quiet, emoji=False)
        if as_json:
            typer.echo(json.dumps([_document(entry) for entry in kept.entries()], indent=1))
        elif empty:
            _empty(kept, console)
        elif remove is not None:
            _remove(kept, remove, console)
        else:
            _show(kept, console)


def _show(kept: ActivationCache, console: Console) -> None:
    entries = kept.entries()
    if not entries:
        _say(console, f"The cache is empty ({kept.root}).")
        return
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for column in ("key", *_ABOUT, "files", "size", "last used"):
        number = column in ("rows", "files", "size")
        table.add_column(
            column,
            justify="right" if number else "left",
            overflow="fold",  # a model may be the long name of a folder
            no_wrap=column != "model",
        )
    shown = _shown_characters(entries)
    for entry in entries:
        about = [escape(str(entry.about.get(name, "?"))) for name in _ABOUT]
        size, used = _size(entry.bytes), f"{_used(entry).astimezone():%Y-%m-%d %H:%M}"
        table.add_row(entry.key[:shown], *about, str(entry.files), size, used)
    console.print(table)
    total = sum(entry.bytes for entry in entries)
    _say(console, f"{_count(entries)}, {_size(total)} in {kept.root}")
    _say(
        console,
        f"limit {_size(kept.limit_bytes)}, unless a run says --cache-limit; what was used longest "
        "ago goes first",
    )


def _empty(kept: ActivationCache, console: Console) -> None:
    found = kept.entries()
    freed = kept.empty()
    left = {entry.key for entry in kept.entries()} & {entry.key for entry in found}
    if left:
        raise LunarTuneError(f"{_count(left)} could not be removed from {kept.root}.")
    said = f"{_count(found)} removed, {_size(freed)} freed" if found else "It was empty"
    _say(console, f"{said} ({kept.root}).")


def _remove(kept: ActivationCache, wanted: str, console: Console) -> None:
    entry = _chosen(kept.entries(), wanted)
    freed = kept.remove(entry.key)
    if any(left.key == entry.key for left in kept.entries()):
        raise LunarTuneError(f"{kept.root / entry.key} could not be removed.")
    what = ", ".join(str(entry.about[name]) for name in _ABOUT[:3] if name in entry.about)
    _say(console, f"{entry.key} ({what or '?'}) removed, {_size(freed)} freed.")


def _chosen(entries: Sequence[EntryInfo], wanted: str) -> EntryInfo:
    """Return the one entry whose key begins as it was asked for.

    Raises:
        InputError: There is none, or more than one.
    """
    matching = [entry for entry in entries if wanted and entry.key.startswith(wanted.lower())]
    if len(matching) == 1:
        return matching[0]
    asked = f"--remove {wanted or repr(wanted)}"
    if not entries:
        raise InputError(f"{asked}: the cache is empty, there is nothing to remove.")
    if not matching:
        raise InputError(
            f"{asked}: no key begins so. There are: {_names(entries)}. Give the beginning of one, "
            "or --empty to remove everything."
        )
    raise InputError(
        f"{asked}: {len(matching)} keys begin so: {_names(matching)}. Give more characters."
    )


def _names(entries: Sequence[EntryInfo]) -> str:
    shown = _shown_characters(entries)
    more = f" and {len(entries) - _MOST_NAMED} more" if len(entries) > _MOST_NAMED else ""
    return ", ".join(entry.key[:shown] for entry in entries[:_MOST_NAMED]) + more


def _shown_characters(entries: Sequence[EntryInfo]) -> int:
    """Return how many characters of each key tell it from all others."""
    longest = max(len(entry.key) for entry in entries)
    lengths = range(_SHORT, longest + 1)
    return next(n for n in lengths if len({entry.key[:n] for entry in entries}) == len(entries))


def _document(entry: EntryInfo) -> dict[str, Any]:
    used = _used(entry).isoformat(timespec="seconds")
    own = {"key": entry.key, "files": entry.files, "bytes": entry.bytes, "used": used}
    return {"key": entry.key, **entry.about, **own}


def _used(entry: EntryInfo) -> datetime:
    return datetime.fromtimestamp(entry.used, UTC)


def _count(entries: Sequence[Any] | set[str]) -> str:
    return "1 entry" if len(entries) == 1 else f"{len(entries)} entries"


def _size(count: int) -> str:
    for unit, one in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:.1f} {unit}"
    return f"{count} B"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
