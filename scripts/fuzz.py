"""Gives damaged and made-up files to every reader; each is read, or refused in one clear message.

    python scripts/fuzz.py                      # five minutes
    python scripts/fuzz.py --examples 2000      # so many files of each kind

Covers: data and prompts in every format, groups of edges, locks of fetched data, search spaces,
published configurations, scored layers, lineages, and what a search leaves: its
configuration, journal and answers. Valid files with bytes, lines or values changed, spliced with
others of their kind, cut off; and random bytes. Exit code 1 where a reader raises anything but
`InputError`, or takes longer than `--slow` seconds; the file is kept then.
Does not cover: weights, which safetensors reads; files beyond a few kilobytes.
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cyclopts
from cyclopts.types import PositiveInt
from fuzz_kinds import KINDS, Kind
from rich.console import Console
from rich.table import Table

from lunar_tune.errors import InputError
from lunar_tune.yaml_files import read_yaml, write_yaml

# Values that readers have stumbled over, here or elsewhere.
VALUES: Sequence[Any] = (
    *(None, True, False, 0, 1, -1, 10**30, 0.5, -0.0, 1e308, "", " ", "a", "\ud800", "\x00"),
    *("1e-4", "A_B", "../x", "<b>", "é" * 300, [], [[]], {}, {"a": None}, ["A_B", "A_B"]),
)
PIECES: tuple[bytes, ...] = (
    b"\x00",
    b"\xff\xfe",
    b"\n",
    b"---\n",
    b"&a *a",
    b"!!python/object:os.system ",
    b"NaN",
)
PIECES += (b"{", b"}", b"[" * 3000, b'"', b"\\u", b"1e999", b"- ", b": ", b"\t", b"\xed\xa0\x80")
TRIES = 50  # inputs of one kind before the next has its turn


@dataclass(frozen=True, slots=True)
class Broken:
    """A file that a reader neither read nor refused."""

    kind: str
    error: str
    file: Path


class Fuzzer:
    """Damages files and counts what becomes of them."""

    def __init__(self, seed: int, folder: Path, kept: Path, slow: float) -> None:
        self._random = random.Random(seed)  # noqa: S311  # nothing secret
        self._folder, self._kept, self._slow = folder, kept, slow
        self.tried: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.broken: list[Broken] = []

    def check(self, kind: Kind) -> None:
        """See that what is called valid is read; else nothing but refusals would be tried."""
        for content in kind.valid:
            kind.read(kind.placed(self._folder, content))

    def one(self, kind: Kind) -> None:
        """Try one file of a kind."""
        content = self._damaged(kind)
        file = kind.placed(self._folder, content)
        self.tried[kind.name] += 1
        start, error = time.perf_counter(), None
        try:
            kind.read(file)
        except InputError as refusal:
            self.refused[kind.name] += 1
            if not str(refusal).strip():
                error = "an empty message"
        except Exception as problem:  # what it is looking for
            error = f"{type(problem).__name__}: {str(problem)[:200]}"
        if error is None and time.perf_counter() - start > self._slow:
            error = f"took {time.perf_counter() - start:.1f} s"
        if error is not None:
            self._kept.mkdir(parents=True, exist_ok=True)
            kept = self._kept / f"{kind.name.replace(' ', '-')}-{len(self.broken)}{file.suffix}"
            kept.write_bytes(content)
            self.broken.append(Broken(kind.name, error, kept))

    def _damaged(self, kind: Kind) -> bytes:
        """Return random bytes, or a valid file with one to four changes."""
        if self._random.random() < 0.05:
            return self._random.randbytes(self._random.randrange(400))
        content = self._random.choice(kind.valid)
        if kind.form is not None and self._random.random() < 0.5:
            content = self._with_values(content, kind.form)
            if self._random.random() < 0.7:
                return content
        for _ in range(self._random.randint(1, 4)):
            content = self._random.choice(self._changes)(content, kind)
        return content

    @property
    def _changes(self) -> Sequence[Callable[[bytes, Kind], bytes]]:
        return (
            self._flipped,
            self._cut,
            self._without,
            self._repeated,
            self._with_piece,
            self._spliced,
        )

    def _span(self, content: bytes) -> tuple[int, int]:
        first, last = sorted(self._random.randint(0, len(content)) for _ in range(2))
        return first, min(last, first + 200)

    def _flipped(self, content: bytes, _kind: Kind) -> bytes:
        changed = bytearray(content)
        for _ in range(self._random.randint(1, 3) if content else 0):
            changed[self._random.randrange(len(changed))] = self._random.randrange(256)
        return bytes(changed)

    def _cut(self, content: bytes, _kind: Kind) -> bytes:
        return content[: self._random.randint(0, len(content))]

    def _without(self, content: bytes, _kind: Kind) -> bytes:
        first, last = self._span(content)
        return content[:first] + content[last:]

    def _repeated(self, content: bytes, _kind: Kind) -> bytes:
        first, last = self._span(content)
        return content[:last] + content[first:last] * self._random.randint(1, 3) + content[last:]

    def _with_piece(self, content: bytes, _kind: Kind) -> bytes:
        place = self._random.randint(0, len(content))
        return content[:place] + self._random.choice(PIECES) + content[place:]

    def _spliced(self, content: bytes, kind: Kind) -> bytes:
        other = self._random.choice(kind.valid)
        return content[: self._span(content)[1]] + other[self._span(other)[0] :]

    def _with_values(self, content: bytes, form: str) -> bytes:
        """Return a document with some of its values replaced, removed or moved."""
        if form == "lines":
            lines = content.splitlines(keepends=True)
            number = self._random.randrange(len(lines))
            lines[number] = self._with_values(lines[number], "json") + b"\n"
            return b"".join(lines)
        document = json.loads(content) if form == "json" else read_yaml(content.decode())
        for _ in range(self._random.randint(1, 3)):
            self._change_value(document)
        if form == "json":
            return json.dumps(document).encode()
        return write_yaml(document).encode()

    def _change_value(self, document: Any) -> None:
        part = document
        while isinstance(part, dict | list) and part:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            key = self._random.choice(keys)
            if isinstance(part[key], dict | list) and part[key] and self._random.random() < 0.7:
                part = part[key]
                continue
            if self._random.random() < 0.2:
                del part[key]
            elif isinstance(part, dict) and self._random.random() < 0.1:
                part[self._random.choice(["", "unknown", "é", "edge"])] = part[key]
            else:
                part[key] = self._random.choice(VALUES)
            return


def main(
    *,
    seconds: float = 300,
    examples: PositiveInt | None = None,
    seed: int = 0,
    only: str | None = None,
    slow: float = 10.0,
    kept: Path = Path("fuzzed"),
) -> None:
    """Try files until the time is over or there were enough of each kind.

    Args:
        seconds: How long, where --examples is not given.
        examples: Files of each kind.
        seed: Of what is made up.
        only: Kinds whose names hold this.
        slow: Seconds that a small file may take.
        kept: Where files that break are kept.
    """
    faulthandler.enable()  # a reader that crashes the process shows where
    kinds = [kind for kind in KINDS if only is None or only in kind.name]
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(seed, Path(folder), kept, slow)
        end = time.monotonic() + seconds
        rounds = 0
        for kind in kinds:
            fuzzer.check(kind)
        while rounds * TRIES < examples if examples is not None else time.monotonic() < end:
            rounds += 1
            for kind in kinds:
                for _ in range(TRIES):
                    fuzzer.one(kind)
    console = Console(emoji=False)
    table = Table("kind", "tried", "read", "refused", "neither", box=None, header_style="bold")
    broken = Counter(one.kind for one in fuzzer.broken)
    for name, tried in fuzzer.tried.items():
        refused, neither = fuzzer.refused[name], broken[name]
        numbers = (tried, tried - refused - neither, refused, neither)
        table.add_row(name, *(f"{number:,}" for number in numbers))
    console.print(table)
    console.print(f"{fuzzer.tried.total():,} files, seed {seed}, {len(fuzzer.broken)} neither")
    for error, number in Counter(f"{one.kind}: {one.error}" for one in fuzzer.broken).most_common(
        20
    ):
        file = next(one.file for one in fuzzer.broken if f"{one.kind}: {one.error}" == error)
        console.print(f"{number} x {error} ({file})", markup=False, soft_wrap=True)
    sys.exit(1 if fuzzer.broken else 0)


if __name__ == "__main__":
    cyclopts.run(main)
