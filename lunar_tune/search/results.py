"""What a search has found so far, read from its folder: for commands, reports and notebooks.

Covers: rows, scores and answers from the study and the trials' own files; the report that tables,
pictures and pages are made of; the pictures, for a notebook. Nothing of it needs the search's
mirrors.
Does not cover: running anything, how pictures look (`reporting`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from lunar_tune.errors import InputError
from lunar_tune.evaluation.goal import Goal
from lunar_tune.reporting.layer_curve import LayerCurve
from lunar_tune.reporting.report import Report
from lunar_tune.reporting.rows import COMPLETE, TrialRow, best_first
from lunar_tune.reporting.tables import read_answers
from lunar_tune.search.folder import RUNS, Folder, find_search
from lunar_tune.search.importance import parameter_importance
from lunar_tune.search.stored_config import StoredConfig
from lunar_tune.search.study import StoredStudy

if TYPE_CHECKING:
    import pandas as pd

    from lunar_tune.evaluation.evaluate import AnswerRow
    from lunar_tune.reporting.pictures.figure import Canvas

__all__ = ["SearchResults", "load_search", "stored_answers"]

_LISTED = 10
"""How many numbers of trials an error lists in full."""


def load_search(search: str | Path, *, runs: str | Path = RUNS) -> SearchResults:
    """Read a search, finished or still running.

    Args:
        search: Its folder, or its name.
        runs: Where names are looked up.

    Raises:
        InputError: There is no such search, or it has not judged the unmodified model yet.

    Example:
        >>> results = load_search("runs/NAME")  # doctest: +SKIP
        >>> results.trials.sort_values("forget_rouge1")
    """
    folder = find_search(search, Path(runs))
    stored = StoredStudy.read(folder.journal)
    if stored is None or stored.goal is None:
        raise InputError(f"{folder.path}: the search has not begun its first trial.")
    return SearchResults(folder=folder, study=stored, goal=stored.goal)


@dataclass(frozen=True)
class SearchResults:
    """A search as it stands on disk."""

    folder: Folder
    study: StoredStudy
    goal: Goal
    """What it is after."""

    @property
    def rows(self) -> tuple[TrialRow, ...]:
        """All trials that were started, by number."""
        return self.study.rows

    @property
    def vanilla(self) -> Mapping[str, float]:
        """The unmodified model's scores."""
        scores: Mapping[str, float] = self.study.notes["vanilla"]
        return scores

    @property
    def held_out(self) -> bool:
        """Whether a full evaluation asks questions that no trial is judged on."""
        with suppress(InputError):  # a configuration that cannot be read has no part in the scores
            return self.config.search.run.holdout
        return False

    @property
    def vanilla_in_full(self) -> Mapping[str, float]:
        """The unmodified model's scores on the questions of a full evaluation.

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

    @cached_property
    def report(self) -> Report:
        """What tables, pictures and pages are made of."""
        notes = self.study.notes
        tags = notes["tags"]
        return Report(
            title=self._title,
            facts=notes.get("facts", tags),
            goal=self.goal,
            vanilla=self.vanilla,
            rows=self.rows,
            best=self.best,
            confirmed=self.confirmed,
            held_out=self.held_out,
            vanilla_in_full=self.vanilla_in_full,
            ending=notes.get("ending"),
            log_scale=self.study.log_scale,
            listed=self.study.listed,
            importance=functools.cache(self._importance),
            layers=self._layers(),
        )

    def trade_off(self) -> Canvas:
        """Draw what is forgotten against what is kept: every trial, the bounds, the best."""
        return self._draw("trade_off")

    def history(self) -> Canvas:
        """Draw the best feasible score so far, over the trials and over time."""
        return self._draw("history")

    def layer_coefficient(self) -> Canvas:
        """Draw the map of layer and coefficient.

        Raises:
            InputError: They were not both searched.
        """
        return self._draw("layer_coefficient")

    def sensitivity(self, parameter: str | None = None) -> Canvas:
        """Draw the scores against a parameter: the learning rate, or what is in its place.

        Raises:
            InputError: No two completed trials differ in it.
        """
        from lunar_tune.reporting.pictures.sensitivity import sensitivity

        return sensitivity(self.report, parameter)

    def importance(self) -> Canvas:
        """Draw how much each parameter decides.

        Raises:
            InputError: Too few trials are completed, or their scores do not differ.
        """
        return self._draw("importance")

    def layers(self) -> Canvas:
        """Draw the similarities that chose the layers.

        Raises:
            InputError: The search was not told to score layers.
        """
        return self._draw("layers")

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
        """Return a trial's answers, or the unmodified model's, in the order in which they are kept.

        Args:
            number: Of the trial; None for the unmodified model.
            full: Those of the full evaluation, which the best trial has, and of the unmodified
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
        """Return a row an answer, beside what the unmodified model says to the same question.

        Args:
            number: Of the trial; None for the best.
            full: The answers of the full evaluation, which the best trial has.

        Returns:
            The columns of `reporting.tables.answers_beside`.

        Raises:
            InputError: There are no such answers.
        """
        from lunar_tune.reporting.tables import answers_beside

        asked = self.answers(self.trial(number).number, full=full)
        return answers_beside(self.answers(full=full), asked)

    @property
    def trials(self) -> pd.DataFrame:
        """A row a trial, with the columns of `trials.parquet`."""
        import pandas as pd

        return pd.DataFrame([row.flat() for row in self.rows])

    @property
    def _title(self) -> str:
        """What was searched, in a line; an older search does not know its method's solver."""
        tags = self.study.notes["tags"]
        solver = f" ({tags['solver']})" if "solver" in tags else ""
        parts = [
            f"{tags['model']}, {tags['data']}: forget {tags['forget_edge'].replace(',', ', ')}",
            *([tags["method"] + solver] if "method" in tags else []),
            *(["half held out"] if self.held_out else []),
        ]
        return ", ".join(parts)

    def _draw(self, name: str) -> Canvas:
        from lunar_tune.reporting.pictures.gallery import PICTURES  # loads matplotlib

        return PICTURES[name].draw(self.report)

    def _importance(self) -> dict[str, dict[str, float]]:
        """Return what decides the scores that pictures show; of those that there is something.

        It takes seconds where there are hundreds of trials (`parameter_importance`).
        """
        shares = {
            name: parameter_importance(self.rows, self.study.distributions, name)
            for name in self.goal.shown
        }
        return {name: share for name, share in shares.items() if share is not None}

    def _layers(self) -> LayerCurve | None:
        """Return the scored layers, from the study or from the file that was given."""
        document = json.loads(self.study.notes.get("layer_prior") or "null")
        if document is None and self.folder.config.is_file():
            with suppress(InputError):  # one that cannot be read has no part in the scores
                document = self.config.resolved.get("layer_prior")
        return LayerCurve.read(document) if document is not None else None

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
