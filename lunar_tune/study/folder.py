"""A search's folder: finding it by what a user calls the search, its files, and its tables.

runs/NAME/  config.yaml  study.journal  trials/00007.parquet  trials.parquet  best.yaml  …

trials/00007.parquet  set_name  edge  row  question  truth  answer  rouge1  rouge_l  ended
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lunar_tune.bounded import bounded
from lunar_tune.errors import InputError
from lunar_tune.files import is_file, is_folder, write_atomically
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.metrics.means import error_name
from lunar_tune.study.rows import HEADLINE_SCORES, TrialRow

if TYPE_CHECKING:
    from lunar_tune.trial.worker import TrialResult  # loads torch

_LOSSES = b"lunar_tune.losses"
_SECONDS, _MEMORY = 10, 2 * 2**30  # for reading a trial's answers
_TEXTS = ("question", "truth", "answer")
# Columns that every trials.parquet has, with these types, also where no trial was completed.
_COLUMNS = {
    **dict.fromkeys(("number", "retain_rows", "max_new_tokens"), pa.int64()),
    **dict.fromkeys((*HEADLINE_SCORES, "objective", "seconds"), pa.float64()),
    **dict.fromkeys(map(error_name, HEADLINE_SCORES[:3]), pa.float64()),
    **dict.fromkeys(("feasible", "retain_exact", "again"), pa.bool_()),
    **dict.fromkeys(("state", "failure", "answers_digest"), pa.string()),
    **dict.fromkeys(("started", "ended"), pa.timestamp("us")),
}


def write_result(path: Path, result: TrialResult, *, text: bool = True) -> str:
    """Write the answers of an evaluation as `write_answers` does; return the file's SHA-256."""
    return write_answers(path, result.evaluation.rows, result.losses, text=text)


def write_answers(
    path: Path, rows: Iterable[AnswerRow], losses: Sequence[float], *, text: bool = True
) -> str:
    """Write answers, and the losses of each epoch before them; return the file's SHA-256.

    Without `text`, the number in `row` stands for `question`, `truth` and `answer`.
    """
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in rows])
    if not text:
        table = table.drop_columns([name for name in _TEXTS if name in table.column_names])
    table = table.replace_schema_metadata({_LOSSES: json.dumps(list(losses)).encode()})
    content = _parquet(table)
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def answers_note(path: Path) -> str:
    """Return the key under which a study keeps the digest of answers that are no trial's row."""
    return f"answers_digest.{path.name}"


def is_written(path: Path, digest: str | None) -> bool:
    """Say whether a file is the one that was written with a digest, as far as that is known."""
    if digest is None:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def read_answers(path: Path, digest: str | None = None) -> list[AnswerRow]:
    """Read a file of answers, texts that were left out as empty, or raise an InputError."""
    without = dict.fromkeys(_TEXTS, "")
    try:
        if not is_written(path, digest):
            raise InputError(
                f"{path}: was changed or exchanged: it is not the file of the answers that were "
                "scored. Restore it from a copy; the scores themselves are in the study."
            )
        # A few kilobytes can stand for gigabytes.
        bounded(lambda: len(_rows_of(path)), seconds=_SECONDS, memory=_MEMORY)
        return [AnswerRow(**(without | row)) for row in _rows_of(path)]
    except (pa.ArrowException, OSError, ValueError, TypeError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise InputError(f"{path}: is damaged, or holds no answers ({reason}).") from error


def _rows_of(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        rows: list[dict[str, Any]] = file.read(columns, use_threads=False).to_pylist()
    return rows


def write_trials(path: Path, rows: Sequence[TrialRow]) -> None:
    """Write `trials.parquet`, a row a trial."""
    flat = [row.flat() for row in rows]
    # The fullest row knows the best order; what it lacks follows.
    names = dict.fromkeys(name for row in sorted(flat, key=len, reverse=True) for name in row)
    columns = {
        name: pa.array([row.get(name) for row in flat], _COLUMNS.get(name))
        for name in names | dict.fromkeys(_COLUMNS)
    }
    write_atomically(path, _parquet(pa.table(columns)))


def _parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    content: bytes = buffer.getvalue().to_pybytes()
    return content


RUNS = Path("runs")  # where searches are kept unless another folder is named
_LISTED = 8
_MOST_JOURNAL = 2**30  # bytes; a trial takes a few thousand
_BEFORE_THE_FIRST_TRIAL = {".lock", ".study.journal.lock", "config.yaml", "search.log", "trials"}


@dataclass
class Folder:
    """The folder of one search."""

    path: Path

    def __post_init__(self) -> None:
        self.name = self.path.name
        self.journal = self.path / "study.journal"  # Optuna's: the truth about scores
        self.config = self.path / "config.yaml"  # every option, with its origin
        self.trials = self.path / "trials.parquet"  # a row a trial
        self.best = self.path / "best.yaml"  # the best feasible setting, confirmed
        self.log = self.path / "search.log"
        self.pictures = self.path / "pictures"  # each as PNG and SVG
        self.lock = self.path / ".lock"  # held by the process that works on the search

    @property
    def is_taken(self) -> bool:
        """Whether there is more in it than a search leaves that was killed before it began."""
        if is_file(self.path):
            return True
        return is_folder(self.path) and any(
            entry.name not in _BEFORE_THE_FIRST_TRIAL for entry in self.path.iterdir()
        )

    def answers(self, number: int | None, *, full: bool = False) -> Path:
        """A trial's answers, or the base model's (None).

        Those of the `full` evaluation that confirms the best are kept beside them; the base model
        has such where questions are held out from the trials.
        """
        name = "baseline" if number is None else f"{number:05d}"
        return self.path / "trials" / f"{name}{'-full' if full else ''}.parquet"

    def told(self) -> dict[int, str]:
        """Return what the table says: the digest of each trial's answers by its number."""
        if not is_file(self.trials):
            return {}
        names = ["number", "answers_digest"]
        try:
            rows = bounded(lambda: _rows_of(self.trials, names), seconds=_SECONDS, memory=_MEMORY)
        except RuntimeError:  # damaged: it is made again
            return {}
        return {row["number"]: row["answers_digest"] for row in rows if row["answers_digest"]}

    def stack(self, number: int) -> Path:
        """What a worker was doing when a trial took too long; below 0, the base model."""
        name = f"{number:05d}" if number >= 0 else "baseline"
        return self.path / "trials" / f"{name}-stack.txt"


def find_search(search: str | Path, runs: Path = RUNS) -> Folder:
    """Return a search's folder, from its path or its name in `runs`, or raise an InputError."""
    try:
        given = Path(search).expanduser()
        for path in (given, runs / given):
            if (path / "study.journal").is_file():
                _check_own(path.resolve())
                return Folder(path.resolve())
        is_folder = given.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a home that does not exist
        raise InputError(f"{search}: cannot be read ({error}).") from error
    if is_folder:
        raise InputError(f"{search}: is not the folder of a search (it has no study.journal).")
    names = [folder.name for folder in searches_in(runs)]
    listed = (
        f"{runs} has no searches; name a search's folder, or start one with python -m "
        "lunar_tune.search."
    )
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        listed = f"{runs} has {', '.join(names[:_LISTED])}{more}."
    raise InputError(f"{search}: there is no such search. {listed}")


def _check_own(folder: Path) -> None:
    """Raise an InputError if what is written or read in a search's folder would be elsewhere."""
    entries = *folder.iterdir(), *folder.glob("trials/*"), *folder.glob("pictures/*")
    for entry in entries:
        try:
            mode = entry.lstat().st_mode
        except FileNotFoundError:  # what a search under way writes has another name at first
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(
                f"{entry}: is a link or a device. What a search reads and writes lies in its "
                "own folder: put the file itself there, or move the whole folder."
            )
    size = (folder / "study.journal").stat().st_size
    if size > _MOST_JOURNAL:
        raise InputError(f"{folder / 'study.journal'}: has {size:,} bytes, which no search writes.")


def searches_in(runs: Path) -> list[Folder]:
    """Return the searches of a folder, those that were written to last first."""
    journals = sorted(
        runs.glob("*/study.journal"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    return [Folder(path.parent.resolve()) for path in journals]
