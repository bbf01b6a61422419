"""How a parameter or setting of a method is written on a command line.

Covers: the one exception to writing dashes for underscores.
Does not cover: which options there are (`cli.options.run_options`).
"""

from __future__ import annotations

__all__ = ["flag_of"]


def flag_of(name: str) -> str:
    """Return a parameter as a user writes it; `--batch-size` alone is that of answers."""
    return "--train-batch-size" if name == "batch_size" else f"--{name.replace('_', '-')}"
