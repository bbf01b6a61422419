"""Named entries with a helpful error for a name that is not there."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import TypeVar

from lunar_tune.errors import InputError, suggestion

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """A mapping from names to entries of one kind, which messages call `kind`.

    An unknown name raises an `error_class`. Packages may add entries by entry points of a `group`,
    which are loaded when entries are first looked at.
    """

    def __init__(
        self, kind: str, *, error_class: type[InputError] = InputError, group: str | None = None
    ) -> None:
        self.kind = kind
        self._error_class, self._group = error_class, group
        self._own: dict[str, Entry] = {}
        self.added: dict[str, Entry] = {}  # by `add`

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry, or raise a ValueError where the name is taken."""
        if name in self._own:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._own[name] = entry

    def add(self, name: str, entry: Entry) -> None:
        """Add a user's entry, in place of one that was added before, as when a cell runs again.

        The name of any other entry raises an `error_class`.
        """
        if name in self._entries and name not in self.added:
            raise self._error_class(f"{self.kind} {name!r} exists; give yours another name.")
        self._own[name] = self.added[name] = entry

    @property
    def _entries(self) -> dict[str, Entry]:
        if self._group is not None:
            group, self._group = self._group, None
            for point in importlib.metadata.entry_points(group=group):
                self.register(point.name, point.load())
        return self._own

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise self._error_class(f"unknown {self.kind} {name!r}.{suggestion(name, self)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # that of Mapping would raise an InputError

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
