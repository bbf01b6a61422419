"""Groups of edges: names that stand for several edges of one data set.

Beside `pairs.json` a file `pairs.groups.json`, which anyone may write:

    {"first_half": ["author_1", "author_2"], "one": ["author_3"]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lunar_tune.data.formats import read_json
from lunar_tune.errors import DataError, Problems

__all__ = ["expand_edges", "groups_file", "groups_text", "read_groups"]

Groups = Mapping[str, Sequence[str]]


def groups_file(data: Path) -> Path:
    """Return where the groups of a data file are declared, whether or not they are."""
    return data.with_name(f"{data.stem}.groups.json")


def groups_text(groups: Groups) -> str:
    """Return groups as the content of a file."""
    return json.dumps({name: list(edges) for name, edges in groups.items()}, indent=1) + "\n"


def read_groups(data: Path) -> dict[str, tuple[str, ...]]:
    """Return the groups that are declared beside a data file; none if there is no such file.

    Raises:
        DataError: The file is not JSON or holds something else than lists of edges by name.
    """
    path = groups_file(data)
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f'{path}: must be an object of lists: {{"group": ["edge", …]}}')
    problems = Problems()
    for name, edges in content.items():
        if not isinstance(edges, list) or not edges or not all(isinstance(e, str) for e in edges):
            problems.add(f"{path}: group {name!r} must be a list of at least one edge in quotes")
        elif len(set(edges)) < len(edges):
            problems.add(f"{path}: group {name!r} names an edge twice")
    problems.raise_if_any(DataError)
    return {name: tuple(edges) for name, edges in content.items()}


def expand_edges(asked: Sequence[str], edges: Mapping[str, int], groups: Groups) -> tuple[str, ...]:
    """Return the edges that are meant: an edge is itself, a group its edges, in the order asked.

    Names that are neither are returned as they are.

    Raises:
        DataError: A group holds an edge that does not exist, or one edge is asked for by two
            names; one name given twice is left to be found by others.
    """
    problems, origin = Problems(), dict[str, str]()
    expanded: list[str] = []
    for name in asked:
        members = groups[name] if name in groups and name not in edges else (name,)
        unknown = [edge for edge in members if edge not in edges and edge != name]
        if unknown:
            problems.add(
                f"the group {name!r} names edges that the data do not have: {_cut(unknown)}"
            )
        twice = [edge for edge in members if origin.get(edge, name) != name]
        if twice:
            others = " and ".join(dict.fromkeys(repr(origin[edge]) for edge in twice))
            problems.add(f"forget edges: {name!r} and {others} have {_cut(twice)} in common")
        origin |= {edge: name for edge in members if edge not in origin}
        expanded += [edge for edge in members if edge not in twice]
    problems.raise_if_any(DataError)
    return tuple(expanded)


def _cut(edges: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(edges) - shown} more" if len(edges) > shown else ""
    return ", ".join(edges[:shown]) + more
