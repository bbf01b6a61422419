"""Chooses what is to be forgotten and what is to be kept, and draws samples and invented prompts.

Whole edges are forgotten. A group stands for several of them, by a file that anyone may write
beside `pairs.json`, `pairs.groups.json`: {"half": ["author_1", "author_2"], "one": ["author_3"]}
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lunar_tune.data.readers import read_json, stem_of
from lunar_tune.data.records import Record
from lunar_tune.data.texts import edge_name, names_in, normalised
from lunar_tune.errors import DataError, Problems, close_name, listed

Groups = Mapping[str, Sequence[str]]

_SHOWN_EDGES = 40
_NO_GROUPS: Groups = MappingProxyType({})
_ONSETS = (
    *("b", "br", "d", "dr", "f", "fl", "g", "gr", "h", "k", "kl", "l", "m", "n", "p", "pl"),
    *("pr", "r", "s", "sk", "st", "t", "tr", "v", "vr", "z", "zh"),
)
_VOWELS = "aeiou"
_CODAS = ("", "", "", "", "l", "m", "n", "r", "s", "x", "sk", "nt", "rd")
_MANY_TRIES = 10_000


@dataclass(frozen=True, slots=True)
class Split:
    """What is to be forgotten and what is to be kept; a contradiction raises a DataError."""

    forget: tuple[Record, ...]  # the records to be forgotten, in the order of the data
    retain: tuple[Record, ...]
    forget_edges: tuple[str, ...]  # or groups of them, as asked

    def __post_init__(self) -> None:
        """Refuse a split with which no score has a meaning."""
        if not self.forget:
            raise DataError("the forget set is empty: there is nothing to forget")
        if not self.retain:
            raise DataError("the retain set is empty: there is nothing to retain")
        kept = {normalised(record.question) for record in self.retain}
        places = Counter[str]()
        both = {}
        for record in self.forget:
            places[record.edge] += 1
            if (question := normalised(record.question)) in kept:
                # Not the question itself: it may be private, and messages are logged.
                both[question] = f"question {places[record.edge]} of {record.edge}"
        if both:
            raise DataError(
                f"{len(both)} of the questions to forget stand in the retain set too: "
                f"{listed(list(both.values()))}. Remove them from one side."
            )


def edges_of(records: Sequence[Record]) -> dict[str, int]:
    """Return the number of records of each edge, edges in order of first appearance."""
    return dict(Counter(record.edge for record in records))


def groups_file(data: Path) -> Path:
    """Return where the groups of a data file are declared, whether or not they are."""
    return data.with_name(f"{stem_of(data)}.groups.json")


def read_groups(data: Path) -> dict[str, tuple[str, ...]]:
    """Return the groups that are declared beside a data file, if any, or raise a DataError."""
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
        elif len(set(map(edge_name, edges))) < len(edges):
            problems.add(f"{path}: group {name!r} names an edge twice")
    if len(set(map(edge_name, content))) < len(content):
        problems.add(f"{path}: two groups have names that differ in white space or form alone")
    problems.raise_if_any(DataError)
    return {edge_name(name): tuple(map(edge_name, edges)) for name, edges in content.items()}


def names_asked(
    asked: Iterable[str], existing: Iterable[str], groups: Groups = _NO_GROUPS
) -> tuple[str, ...]:
    """Return the edges and groups that texts name, each one or several with commas between."""
    known = {*existing, *groups}
    return tuple(name for text in asked for name in names_in(text, known))


def resolve_edges(
    asked: Sequence[str],
    existing: Mapping[str, int],
    groups: Groups = _NO_GROUPS,
    *,
    leave_one: bool = True,
) -> tuple[str, ...]:
    """Return the edges that are meant, a group's for its name, in the order asked.

    What is asked is read as in `names_asked`. A DataError says all mistakes at once: no edge, an
    unknown one, one by two names, or all of them where `leave_one` is set.
    """
    problems, origin, asked = Problems(), dict[str, str](), names_asked(asked, existing, groups)
    shown = [repr(edge) if "," in edge else edge for edge in existing]
    edges = listed(shown, _SHOWN_EDGES) or "none, the data set is empty"
    there_are = f"There are: {edges}."
    there_are += f" Groups of edges: {', '.join(groups)}." if groups else ""
    if not asked:
        problems.add(f"no forget edge was given. {there_are}")
    for name, count in Counter(asked).items():
        if count > 1:
            problems.add(f"forget edge {name!r} is given {count} times: give it once")
        if name not in existing and name not in groups:
            meant = close_name(name, [*existing, *groups])
            problems.add(f"unknown forget edge {name!r}.{meant} {there_are}")
            continue
        members = (name,) if name in existing else groups[name]
        if unknown := [edge for edge in members if edge not in existing]:
            problems.add(
                f"the group {name!r} names edges that the data do not have: {listed(unknown)}"
            )
        if twice := [edge for edge in members if edge in origin]:
            others = " and ".join(dict.fromkeys(repr(origin[edge]) for edge in twice))
            problems.add(f"forget edges: {name!r} and {others} have {listed(twice)} in common")
        origin |= {edge: name for edge in members if edge not in origin}
    if existing and leave_one and set(origin) >= set(existing):
        problems.add(
            "every edge is to be forgotten: leave one to retain, or give another retain set"
        )
    problems.raise_if_any(DataError)
    return tuple(origin)


def split_by_edges(
    records: Sequence[Record],
    forget_edges: Sequence[str],
    *,
    retain: Sequence[Record] | None = None,
    groups: Groups = _NO_GROUPS,
) -> Split:
    """Split records into those of some edges, or groups of them, and the others.

    `retain` is kept where every edge of `records` is to be forgotten. Edges as in `resolve_edges`
    and a contradiction as in `Split` raise a DataError.
    """
    edges = edges_of(records)
    chosen = set(resolve_edges(forget_edges, edges, groups, leave_one=retain is None))
    others = tuple(record for record in records if record.edge not in chosen)
    return Split(
        forget=tuple(record for record in records if record.edge in chosen),
        retain=others or tuple(retain or ()),
        forget_edges=names_asked(forget_edges, edges, groups),
    )


def seeded(*parts: object) -> random.Random:
    """Return a generator that depends on the parts alone, the same in every process.

    Parts name the purpose, so that one more draw here moves nothing there.
    """
    return random.Random(":".join(map(str, parts)))  # noqa: S311 - invented data, not secrets


def sample_by_edge(records: Sequence[Record], count: int, *, seed: int) -> tuple[Record, ...]:
    """Return at most `count` records, a random sample in the original order, or raise a DataError.

    Every edge has its share by the largest remainder method, ties drawn by lot; where `count`
    allows, every edge has at least one record.
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
    records: Sequence[Record],
    *,
    seed: int,
    in_first: dict[str, bool] | None = None,
    lone: list[str] | None = None,
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Return two random halves of every edge, in the original order, or raise a DataError.

    What is divided are different questions: one that stands several times, in whatever edges, is in
    one half. Of an edge with an odd number of them the first half has one more. `in_first` says of
    other sets' questions whether they are in the first half; this set's are added. Where `lone` is
    given, edges of one question are added to it and are in the first half.
    """
    generator = seeded("halves_by_edge", seed)
    asked = [normalised(record.question) for record in records]
    in_first = {} if in_first is None else in_first
    for edge in edges_of(records):
        here = dict.fromkeys(q for q, one in zip(asked, records, strict=True) if one.edge == edge)
        if len(here) < 2:
            if lone is None:
                raise DataError(f"edge {edge!r} has one question: half of it cannot be held out")
            lone.append(edge)
            in_first |= {question: in_first.get(question, True) for question in here}
            continue
        new = [question for question in here if question not in in_first]
        count = (len(here) + 1) // 2 - sum(in_first.get(question, False) for question in here)
        chosen = set(generator.sample(new, min(max(count, 0), len(new))))
        in_first |= {question: question in chosen for question in new}
        if len({in_first[question] for question in here}) < 2:
            raise DataError(
                f"edge {edge!r} shares all of its questions with others that are in one half: none "
                "is left for the other half. Give it a question of its own, or try another --seed"
            )
    first = [in_first[question] for question in asked]
    return (
        tuple(record for record, is_first in zip(records, first, strict=True) if is_first),
        tuple(record for record, is_first in zip(records, first, strict=True) if not is_first),
    )


def folds(
    fitted: Sequence[Record], judged: Sequence[Record], *, share: float, times: int, seed: int
) -> Iterator[tuple[tuple[Record, ...], tuple[Record, ...]]]:
    """Yield what is left to fit, and the judged records that are left out of it, `times` at most.

    Left out is a `share` of the questions that are fitted, one at least, of those that are judged
    as well; the last fold may be smaller. None is left out twice, one that stands several times as
    a whole. A fold that would leave nothing to fit is not one.
    """
    asked = {normalised(record.question) for record in judged}
    known = list(dict.fromkeys(normalised(record.question) for record in fitted))
    both = [question for question in known if question in asked]
    size = max(1, int(len(known) * share))
    seeded("folds", seed).shuffle(both)
    for start in range(0, min(size * times, len(both)), size):
        fold = {*both[start : start + size]}
        if len(fold) < len(known):
            yield (
                tuple(record for record in fitted if normalised(record.question) not in fold),
                tuple(record for record in judged if normalised(record.question) in fold),
            )


def _shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Return how many of `count` places each edge has, without rounding; earlier edges win ties."""
    total = sum(sizes.values())
    least = 1 if count >= len(sizes) else 0
    places = {edge: max(least, count * size // total) for edge, size in sizes.items()}

    def lacks(edge: str) -> int:
        return count * sizes[edge] - places[edge] * total

    while sum(places.values()) < count:
        places[max(sizes, key=lacks)] += 1
    while sum(places.values()) > count:
        places[min((e for e in sizes if places[e] > least), key=lacks)] -= 1
    return places


def invented_words(generator: random.Random, *, syllables: int = 3) -> Iterator[str]:
    """Yield capitalised words none of which begins with another; a ValueError if none is left."""
    choose, drawn, known = generator.choice, set[str](), set[str]()
    tries = 0
    while tries < _MANY_TRIES:
        parts = [choose(_ONSETS) + choose(_VOWELS) for _ in range(syllables)]
        word = ("".join(parts) + choose(_CODAS)).capitalize()
        beginnings = {word[:length] for length in range(1, len(word) + 1)}
        tries += 1
        if word not in known and drawn.isdisjoint(beginnings):
            drawn.add(word)
            known |= beginnings
            tries = 0
            yield word
    raise ValueError(f"no new word of {syllables} syllables is left")


def generate_unverifiable(count: int, *, seed: int) -> tuple[str, ...]:
    """Return prompts about invented things, all different and others for another seed.

    Every template is used before one is used again. A count below 1 is a DataError.
    """
    if count < 1:
        raise DataError(f"{count} unverifiable prompts were asked for: ask for at least 1")
    generator = seeded("unverifiable", seed)
    words = invented_words(generator)
    # Each names one invented thing, so that no two prompts of a call are the same.
    templates = Path(__file__).with_name("unverifiable.txt").read_text("utf-8").splitlines()
    prompts: list[str] = []
    while len(prompts) < count:
        round_of_templates = generator.sample(templates, len(templates))
        prompts += [template.format(name=next(words)) for template in round_of_templates]
    return tuple(prompts[:count])
