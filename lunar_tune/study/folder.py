"""A search's folder: which file is where, and finding the folder by what a user calls the search.

runs/NAME/  config.yaml  study.journal  trials/00007.parquet  trials.parquet  best.yaml  …
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lunar_tune.errors import InputError
from lunar_tune.files import is_file, is_folder

__all__ = ["RUNS", "Folder", "find_search", "searches_in"]

RUNS = Path("runs")
"""Where searches are kept unless another folder is named."""
_LISTED = 8
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

    def stack(self, number: int) -> Path:
        """What a worker was doing when a trial took too long; below 0, the base model."""
        name = f"{number:05d}" if number >= 0 else "baseline"
        return self.path / "trials" / f"{name}-stack.txt"


def find_search(search: str | Path, runs: Path = RUNS) -> Folder:
    """Return the folder of a search that was begun, from its path or its name in `runs`.

    Raises:
        InputError: There is no such search; those that there are, are named.
    """
    try:
        given = Path(search).expanduser()
        for path in (given, runs / given):
            if (path / "study.journal").is_file():
                return Folder(path.resolve())
        is_folder = given.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a home that does not exist
        raise InputError(f"{search}: cannot be looked at ({error}).") from error
    if is_folder:
        raise InputError(f"{search}: is not the folder of a search (it has no study.journal).")
    names = [folder.name for folder in searches_in(runs)]
    listed = f"{runs} has none; name a search's folder, or start one with lunar_tune.search."
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        listed = f"{runs} has {', '.join(names[:_LISTED])}{more}."
    raise InputError(f"{search}: there is no such search. {listed}")


def searches_in(runs: Path) -> list[Folder]:
    """Return the searches of a folder, those that were written to last first."""
    journals = sorted(
        runs.glob("*/study.journal"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    return [Folder(path.parent.resolve()) for path in journals]
