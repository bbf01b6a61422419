"""The command `lunar-tune cache`: what is kept of activations, and emptying it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lunar_tune.cli.commands import OUTPUT, Command, CommonOptions, Given, Reused
from lunar_tune.config.fields import option, same_option
from lunar_tune.engine.cache import ActivationCache, EntryInfo
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.files import write_atomically
from lunar_tune.models.device import GIB
from lunar_tune.paths import check_writable_file

_ABOUT = ("model", "kind", "dtype", "rows")
_SHORT = 8  # characters of a key that are shown, more where these do not tell two apart
_MOST_NAMED = 8  # keys in an error message


@dataclass(frozen=True, kw_only=True)
class CacheOptions(CommonOptions):
    """What the command takes."""

    remove: str | None = option(
        None,
        "Remove one entry, by the beginning of its key, or all.",
        OUTPUT,
        metavar="KEY|all",
        common=True,
    )
    json: Path | None = same_option(Reused, "json", help="Write the entries as JSON.")


def cache(options: CacheOptions, _: Given) -> None:
    """Show what is kept on disk of models' activations, or remove it.

    Searches and single runs keep what the base model computes on its prompts, and later ones
    read it instead of computing it again. It can be removed at any time, also during a run: what is
    missing is computed again.

    `lunar-tune cache` shows what there is, last used first.

    `lunar-tune cache --remove 3f9a` removes the entry whose key begins so.
    """
    if options.remove is not None and options.json is not None:
        raise InputError("--remove and --json: one at a time, in a command each.")
    check_writable_file(options.json, "--json")
    kept, console = ActivationCache(), Console(quiet=options.quiet, emoji=False)
    if options.json is not None:
        document = json.dumps([_document(entry) for entry in kept.entries()], indent=1)
        write_atomically(options.json, document.encode())
    elif options.remove == "all":
        _empty(kept, console)
    elif options.remove is not None:
        _remove(kept, options.remove, console)
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
            "or --remove all to remove everything."
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


COMMAND = Command(cache, CacheOptions)
