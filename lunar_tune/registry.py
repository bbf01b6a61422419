"""Named entries with a helpful error for a name that is not there."""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import TypeVar

from lunar_tune.errors import InputError

__all__ = ["Registry"]

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """A read-mostly mapping from names to entries of one kind.

    Args:
        kind: What an entry is called in messages, for example `model`.
        error_class: The error that an unknown name raises.
        group: Of entry points by which other packages add entries; they are loaded when entries
            are first looked at.
    """

    def __init__(
        self, kind: str, *, error_class: type[InputError] = InputError, group: str | None = None
    ) -> None:
        """Start empty."""
        self.kind = kind
        self._error_class, self._group = error_class, group
        self._own: dict[str, Entry] = {}

    def register(self, name: str, entry: Entry) -> Entry:
        """Add an entry and return it.

        Raises:
            ValueError: The name is taken; that is a mistake in the program, not of a user.
        """
        if name in self._own:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._own[name] = entry
        return entry

    @property
    def _entries(self) -> dict[str, Entry]:
        """All entries, those of other packages among them."""
        if self._group is not None:
            group, self._group = self._group, None
            for point in importlib.metadata.entry_points(group=group):
                self.register(point.name, point.load())
        return self._own

    def __getitem__(self, name: str) -> Entry:
        """Return the entry.

        Raises:
            InputError: There is no such name; the message lists those that exist.
        """
        if name not in self._entries:
            raise self._error_class(self.describe_unknown(name))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        """Say whether there is an entry of that name, without raising."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterate over names in the order of registration."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._entries)

    def describe_unknown(self, name: str) -> str:
        """Say that there is no such name, which one is close, and which exist."""
        close = difflib.get_close_matches(name, self._entries, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"unknown {self.kind} {name!r}.{hint} There are: {', '.join(self._entries)}."
