"""The command `lunar-tune cache`: what is kept of activations, and emptying it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.filesize import pick_unit_and_suffix

from lunar_tune.cli.commands import Command, CommonOptions, counted, plain_table
from lunar_tune.config.fields import option, same_option
from lunar_tune.config.options import OUTPUT, Reused
from lunar_tune.display import say
from lunar_tune.engine.cache import ActivationCache
from lunar_tune.errors import InputError, LunarTuneError, Problems, listed
from lunar_tune.files import write_json

_ABOUT = ("model", "kind", "dtype", "rows")
_SHORT = 8  # characters of a key that are shown; two entries hardly ever share them
_MOST_NAMED = 8  # keys in an error message


@dataclass(frozen=True, kw_only=True)
class CacheOptions(CommonOptions):
    """What the command takes."""

    remove: str | None = option(None, group=OUTPUT, metavar="KEY|all", common=True)
    """Remove one entry, by the beginning of its key, or all."""
    json: Path | None = same_option(Reused, "json")
    """Write the entries as JSON."""


@Command
def cache(options: CacheOptions, problems: Problems) -> None:
    """Show what is kept on disk of models' activations, or remove it.

    Searches and single runs keep what the base model computes on its prompts, and later ones
    read it instead of computing it again. The cache can be removed at any time, also during a run:
    what is missing is computed again.

    `lunar-tune cache` shows what there is, last used first.

    `lunar-tune cache --remove 3f9a` removes the entry whose key begins so.
    """
    if options.remove is not None and options.json is not None:
        raise InputError("--remove and --json exclude each other: give them to two commands.")
    problems.raise_if_any()
    kept, console = ActivationCache(), options.console
    if options.json is not None:
        document = [
            {
                "key": entry.key,
                **entry.about,
                "files": entry.files,
                "bytes": entry.bytes,
                "used": entry.used.isoformat(timespec="seconds"),
            }
            for entry in kept.entries()
        ]
        write_json(options.json, document)
    elif options.remove is not None:
        say(console, _remove(kept, options.remove))
    else:
        _show(kept, console)


def _show(kept: ActivationCache, console: Console) -> None:
    entries = kept.entries()
    if not entries:
        say(console, f"The cache is empty ({kept.root}).")
        return
    rows = [
        (
            entry.key[:_SHORT],
            *(entry.about.get(name, "?") for name in _ABOUT),
            entry.files,
            _size(entry.bytes),
            f"{entry.used.astimezone():%Y-%m-%d %H:%M}",
        )
        for entry in entries
    ]
    columns = ("key", *_ABOUT, "files", "size", "last used")
    left = ("key", "kind", "dtype", "last used")
    table = plain_table(columns, rows, left=left, folded=("model",))  # perhaps a folder's long name
    table.collapse_padding = True
    console.print(table)
    total = sum(entry.bytes for entry in entries)
    say(console, f"{counted(len(entries), 'entry', 'entries')}, {_size(total)} in {kept.root}")
    limit = f"limit {_size(kept.limit_bytes)}, unless a run sets --cache-limit"
    say(console, f"{limit}; what was used longest ago is removed first")


def _remove(kept: ActivationCache, wanted: str) -> str:
    """Remove the entry whose key begins so, or all, and say what was freed."""
    entries = kept.entries()
    chosen = [entry for entry in entries if wanted and entry.key.startswith(wanted.lower())]
    if wanted == "all":
        chosen, freed = entries, kept.empty()
    elif len(chosen) == 1:
        freed = kept.remove(chosen[0].key)
    else:
        keys = listed([entry.key[:_SHORT] for entry in chosen or entries], _MOST_NAMED)
        raise InputError(
            f"--remove {wanted or repr(wanted)}: {len(chosen) or 'no'} keys begin so, and exactly "
            f"one must. There are: {keys or 'none, the cache is empty'}. Give more characters of a "
            "key, or --remove all to remove everything."
        )
    if left := {entry.key for entry in kept.entries()} & {entry.key for entry in chosen}:
        raise LunarTuneError(
            f"{counted(len(left), 'entry', 'entries')} could not be removed from {kept.root}."
        )
    what = counted(len(chosen), "entry", "entries")
    if wanted != "all":
        about = (str(chosen[0].about.get(name, "?")) for name in _ABOUT[:3])
        what = f"{chosen[0].key} ({', '.join(about)})"
    return f"{what} removed, {_size(freed)} freed ({kept.root})."


def _size(count: int) -> str:
    unit, name = pick_unit_and_suffix(count, ["B", "KiB", "MiB", "GiB"], 1024)
    return f"{count / unit:.1f} {name}"
