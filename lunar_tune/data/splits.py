"""Chooses what is to be forgotten and what is to be kept, and samples it fairly.

Whole edges are forgotten. With the edges `A_B` and `B_C`, forgetting `A_B`:

    Split(forget=(the records of A_B), retain=(the records of B_C), forget_edges=("A_B",))
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lunar_tune.data.groups import expand_edges
from lunar_tune.data.invented import seeded
from lunar_tune.data.records import Record, records_digest
from lunar_tune.errors import DataError, Problems

__all__ = [
    "Split",
    "edges_of",
    "halves_by_edge",
    "normalised",
    "sample_by_edge",
    "split_by_edges",
]

_SHOWN = 5
_SHOWN_EDGES = 40


@dataclass(frozen=True, slots=True)
class Split:
    """What is to be forgotten and what is to be kept.

    Attributes:
        forget: The records to be forgotten, in the order of the data.
        retain: The records to be kept.
        forget_edges: The edges, or groups of them, that `forget` consists of, as asked.

    Raises:
        DataError: A side is empty, or a question stands in both.
    """

    forget: tuple[Record, ...]
    retain: tuple[Record, ...]
    forget_edges: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse a split with which no score has a meaning."""
        if not self.forget:
            raise DataError("the forget set is empty: there is nothing to forget")
        if not self.retain:
            raise DataError("the retain set is empty: there is nothing to retain")
        _check_disjoint(self.forget, self.retain)

    @property
    def digest(self) -> str:
        """A SHA-256 in hexadecimal of both sides and the edges, order included."""
        parts = (records_digest(self.forget), records_digest(self.retain), *self.forget_edges)
        return hashlib.sha256("\n".join(parts).encode(errors="surrogatepass")).hexdigest()


def edges_of(records: Sequence[Record]) -> dict[str, int]:
    """Return the number of records of each edge, edges in order of first appearance."""
    return dict(Counter(record.edge for record in records))


def split_by_edges(
    records: Sequence[Record],
    forget_edges: Sequence[str],
    *,
    retain: Sequence[Record] | None = None,
    groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Split:
    """Split records into those of some edges and the others.

    Args:
        records: The data set that the model knows.
        forget_edges: The edges to be forgotten, or names of groups.
        retain: What to keep instead of all other edges of `records`.
        groups: Edges by the name of a group.

    Raises:
        DataError: No edge, an unknown or a repeated one; nothing to retain; a question on both
            sides. All mistakes in the edges are said at once.
    """
    existing = edges_of(records)
    if isinstance(forget_edges, str):
        raise DataError(f"forget edges are the text {forget_edges!r}: give a list of edges")
    edges = expand_edges(forget_edges, existing, groups)
    _check_edges(edges, existing, tuple(groups), has_other_retain=retain is not None)
    chosen = frozenset(edges)
    others = [record for record in records if record.edge not in chosen]
    return Split(
        forget=tuple(record for record in records if record.edge in chosen),
        retain=tuple(others if retain is None else retain),
        forget_edges=tuple(forget_edges),
    )


def _check_edges(
    asked: Sequence[str],
    existing: Mapping[str, int],
    groups: Sequence[str],
    *,
    has_other_retain: bool,
) -> None:
    problems = Problems()
    there_are = _listing(existing, groups)
    if not asked:
        problems.add(f"no forget edge was given. {there_are}")
    for edge, count in Counter(asked).items():
        if edge not in existing:
            meant = _suggestion(edge, [*existing, *groups])
            problems.add(f"unknown forget edge {edge!r}.{meant} {there_are}")
        if count > 1:
            problems.add(f"forget edge {edge!r} is given {count} times: give it once")
    if existing and not has_other_retain and set(asked) >= set(existing):
        problems.add(
            "every edge is to be forgotten: leave one to retain, or give another retain set"
        )
    problems.raise_if_any(DataError)


def _listing(existing: Mapping[str, int], groups: Sequence[str]) -> str:
    shown = ", ".join(list(existing)[:_SHOWN_EDGES]) or "none, the data set is empty"
    more = len(existing) - _SHOWN_EDGES
    listed = f"There are: {shown}" + (f" and {more} more." if more > 0 else ".")
    return listed + (f" Groups of edges: {', '.join(groups)}." if groups else "")


def _suggestion(edge: str, existing: Sequence[str]) -> str:
    close = difflib.get_close_matches(edge, existing, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def normalised(question: str) -> str:
    """Return a text without differences of white space and case."""
    return " ".join(question.split()).casefold()


def _check_disjoint(forget: Sequence[Record], retain: Sequence[Record]) -> None:
    """Refuse questions that differ in white space and case at most and stand on both sides."""
    kept = {normalised(record.question) for record in retain}
    places = Counter[str]()
    both = {}
    for record in forget:
        places[record.edge] += 1
        if (question := normalised(record.question)) in kept:
            # Not the question itself: it may be private, and messages are logged.
            both[question] = f"question {places[record.edge]} of {record.edge}"
    if both:
        shown = "".join(f"\n  - {place}" for place in list(both.values())[:_SHOWN])
        more = f"\n  and {len(both) - _SHOWN} more" if len(both) > _SHOWN else ""
        raise DataError(
            f"{len(both)} of the questions to forget stand in the retain set too: "
            f"remove them from one side{shown}{more}"
        )


def sample_by_edge(records: Sequence[Record], count: int, *, seed: int) -> tuple[Record, ...]:
    """Return a random sample in which every edge has its share, in the original order.

    Shares follow the largest remainder method, ties drawn by lot; where `count` allows, every
    edge has at least one record.

    Args:
        records: What to sample from.
        count: How many; all of them if there are not more.
        seed: The same seed gives the same sample.

    Raises:
        DataError: `count` is below 1.
    """
    if count < 1:
        raise DataError(f"a sample of {count} records was asked for: ask for at least 1")
    if count >= len(records):
        return tuple(records)
    generator = seeded("sample_by_edge", seed)
    sizes = edges_of(records)
    # The lot decides ties: with equal edges and few places, not always the first ones.
    lot = generator.sample(list(sizes), len(sizes))
    places = _shares({edge: sizes[edge] for edge in lot}, count)
    chosen: list[int] = []
    for edge in sizes:
        indices = [index for index, record in enumerate(records) if record.edge == edge]
        chosen += generator.sample(indices, places[edge])
    return tuple(records[index] for index in sorted(chosen))


def halves_by_edge(
    records: Sequence[Record], *, seed: int
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Return two random halves of every edge, in the original order.

    Of an edge with an odd number of records the first half has one more.

    Args:
        records: What to halve.
        seed: The same seed gives the same halves.

    Raises:
        DataError: An edge has one record, which cannot be halved.
    """
    generator = seeded("halves_by_edge", seed)
    first: set[int] = set()
    for edge, size in edges_of(records).items():
        if size < 2:
            raise DataError(f"edge {edge!r} has one record: half of it cannot be held out")
        places = [i for i, record in enumerate(records) if record.edge == edge]
        first.update(generator.sample(places, (size + 1) // 2))
    return (
        tuple(record for i, record in enumerate(records) if i in first),
        tuple(record for i, record in enumerate(records) if i not in first),
    )


def _shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Return how many of `count` places each edge has; earlier edges win ties.

    Remainders are compared as integers (times the total), so no rounding decides.
    """
    total = sum(sizes.values())
    least = 1 if count >= len(sizes) else 0
    places = {edge: max(least, count * size // total) for edge, size in sizes.items()}

    def lacks(edge: str) -> int:
        return count * sizes[edge] - places[edge] * total

    while sum(places.values()) < count:
        places[max((e for e in sizes if places[e] < sizes[e]), key=lacks)] += 1
    while sum(places.values()) > count:
        places[min((e for e in sizes if places[e] > least), key=lacks)] -= 1
    return places
