"""Lists of layers as text: `0-3,5`.

Covers: reading and showing.
Does not cover: which layers a model has.
"""

from __future__ import annotations

from collections.abc import Sequence

from lunar_tune.errors import InputError

__all__ = ["read_layers", "show_layers"]

MOST = 10_000  # no model is so deep; a slip of the keyboard is not to fill memory


def read_layers(text: str, flag: str) -> tuple[int, ...]:
    """Return the layers that a text means, each once.

    Args:
        text: Numbers and ranges with commas between, for example `0-3,5`.
        flag: The option, for the message.

    Raises:
        InputError: It is not such a text.
    """
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise InputError(f"{flag} {text}: whole numbers and ranges, for example 0-3,5.")
        start, stop = int(first), int(last or first)
        if stop < start:
            raise InputError(f"{flag} {text}: {part.strip()} runs backwards.")
        chosen += range(start, stop + 1)
    return tuple(dict.fromkeys(chosen))


def show_layers(chosen: Sequence[int]) -> str:
    """Return ascending layers as `0-3,5`."""
    runs: list[list[int]] = []
    for layer in chosen:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) < MOST
