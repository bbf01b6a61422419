"""A search as it stands on disk: rows, scores, answers and configuration.

Nothing of it needs a store or pictures, which are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pyarrow as pa

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal
from lunar_tune.study.folder import RUNS, Folder, find_search
from lunar_tune.study.rows import COMPLETE, TrialRow, best_first
from lunar_tune.study.stored_config import StoredConfig
from lunar_tune.study.study import StoredStudy
from lunar_tune.study.tables import read_answers

if TYPE_CHECKING:
    import pandas as pd

    from lunar_tune.metrics.evaluate import AnswerRow

__all__ = ["StoredSearch", "stored_answers"]

_LISTED = 10
"""How many numbers of trials an error lists in full."""


@dataclass(frozen=True)
class StoredSearch:
    """A search as it stands on disk."""

    folder: Folder
    study: StoredStudy
    goal: Goal
    """What it is after."""

    @classmethod
    def read(cls, search: str | Path, *, runs: str | Path = RUNS) -> Self:
        """Read a search, finished or still running.

        Args:
            search: Its folder, or its name.
            runs: Where names are looked up.

        Raises:
            InputError: There is no such search, or it has not judged the base model yet.
        """
        folder = find_search(search, Path(runs))
        stored = StoredStudy.read(folder.journal)
        if stored is None or stored.goal is None:
            raise InputError(f"{folder.path}: the search has not begun its first trial.")
        return cls(folder=folder, study=stored, goal=stored.goal)

    @property
    def rows(self) -> tuple[TrialRow, ...]:
        """All trials that were started, by number."""
        return self.study.rows

    @property
    def vanilla(self) -> Mapping[str, float]:
        """The base model's scores."""
        scores: Mapping[str, float] = self.study.notes["vanilla"]
        return scores

    @property
    def held_out(self) -> bool:
        """Whether a full evaluation asks questions that no trial is judged on."""
        with suppress(InputError):  # a configuration that cannot be read has no part in the scores
            return self.config.search.holdout
        return False

    @property
    def vanilla_in_full(self) -> Mapping[str, float]:
        """The base model's scores on the questions of a full evaluation.

        Empty where these are held out and the search has not asked it, as earlier versions did not.
        """
        note = self.study.notes.get("confirmed") or {}
        return (note.get("vanilla") or {}) if self.held_out else self.vanilla

    @property
    def confirmed(self) -> Mapping[str, float] | None:
        """The best trial's scores in the full evaluation; None where there is none."""
        note = self.study.notes.get("confirmed")
        return note["scores"] if note is not None else None

    @property
    def best(self) -> TrialRow | None:
        """The confirmed best trial; None where there is none."""
        note = self.study.notes.get("confirmed")
        return self.rows[note["number"]] if note is not None else None

    @cached_property
    def config(self) -> StoredConfig:
        """What it was told.

        Raises:
            InputError: `config.yaml` is not there or cannot be read.
        """
        return StoredConfig.read(self.folder)

    @property
    def title(self) -> str:
        """What was searched, in a line; an older search does not know its method's solver."""
        tags = self.study.notes["tags"]
        solver = f" ({tags['solver']})" if "solver" in tags else ""
        parts = [
            f"{tags['model']}, {tags['data']}: forget {tags['forget_edge'].replace(',', ', ')}",
            *([tags["method"] + solver] if "method" in tags else []),
            *(["half held out"] if self.held_out else []),
        ]
        return ", ".join(parts)

    def trial(self, number: int | None = None) -> TrialRow:
        """Return a completed trial: the best, or one by its number.

        Raises:
            InputError: There is none, or it was not completed.
        """
        if number is None:
            if self.best is None:
                found = "and no trial is feasible"
                for first in best_first(list(self.rows))[:1]:
                    found = f"the best as searched is trial {first.number}"
                raise InputError(
                    f"{self.folder.name}: has no confirmed best setting, {found}; name a trial by "
                    f"its number ({self._numbers()})."
                )
            return self.best
        row = self.rows[number] if 0 <= number < len(self.rows) else None
        if row is None or row.state != COMPLETE:
            state = "there is no such trial" if row is None else f"the trial is {row.state}"
            raise InputError(
                f"{self.folder.name}, trial {number}: {state}; completed are {self._numbers()}."
            )
        return row

    def answers(self, number: int | None = None, *, full: bool = False) -> list[AnswerRow]:
        """Return a trial's answers, or the base model's, in the order in which they are kept.

        Args:
            number: Of the trial; None for the base model.
            full: Those of the full evaluation, which the best trial has, and of the base
                model where questions are held out for it.

        Raises:
            InputError: They are not there.
        """
        path = self.folder.vanilla_answers
        if number is None and full and self.folder.vanilla_full_answers.is_file():
            path = self.folder.vanilla_full_answers
        elif number is not None:
            path = (self.folder.full_answers if full else self.folder.answers)(number)
        if not path.is_file():
            raise InputError(f"{self.folder.name}: there are no answers in {path}.")
        return stored_answers(path)

    def answers_table(self, number: int | None = None, *, full: bool = False) -> pd.DataFrame:
        """Return a row an answer, beside what the base model says to the same question.

        Args:
            number: Of the trial; None for the best.
            full: The answers of the full evaluation, which the best trial has.

        Returns:
            The columns of `study.tables.answers_beside`.

        Raises:
            InputError: There are no such answers.
        """
        from lunar_tune.study.tables import answers_beside

        asked = self.answers(self.trial(number).number, full=full)
        return answers_beside(self.answers(full=full), asked)

    @property
    def trials(self) -> pd.DataFrame:
        """A row a trial, with the columns of `trials.parquet`."""
        import pandas as pd

        return pd.DataFrame([row.flat() for row in self.rows])

    def _numbers(self) -> str:
        numbers = [str(row.number) for row in self.rows if row.state == COMPLETE]
        if len(numbers) > _LISTED:
            return f"{', '.join(numbers[: _LISTED // 2])} … {numbers[-1]}, {len(numbers)} in all"
        return ", ".join(numbers) or "none"


def stored_answers(path: Path) -> list[AnswerRow]:
    """Read a file of answers; with `--no-text` their texts are empty.

    Raises:
        InputError: It is damaged, or holds something else.
    """
    try:
        return read_answers(path)[0]
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise InputError(f"{path}: is damaged, or holds no answers ({reason}).") from error
