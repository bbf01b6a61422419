"""A search as it stands on disk: configuration, rows, scores and answers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic_core import to_jsonable_python

from lunar_tune.config.fields import from_document, options_of, permissions_in
from lunar_tune.config.options import AUTO, OWN, RunOptions, SearchConfig, check_permitted
from lunar_tune.data.data_catalog import BUNDLED, PUBLISHED
from lunar_tune.display import Concise
from lunar_tune.errors import InputError
from lunar_tune.files import is_file, is_folder, shipped_spaces
from lunar_tune.metrics.evaluate import ROUNDING, AnswerRow, answers_beside, row_means
from lunar_tune.metrics.goal import Goal
from lunar_tune.metrics.means import error_name, errors_of
from lunar_tune.models.catalog import CATALOG
from lunar_tune.models.chat import PUBLISHED as PUBLISHED_TURN
from lunar_tune.study.folder import (
    RUNS,
    Folder,
    answers_note,
    find_search,
    is_written,
    read_answers,
)
from lunar_tune.study.rows import (
    COMPLETE,
    TrialRow,
    best_first,
    nearest_first,
    parameter_importance,
)
from lunar_tune.study.study import StoredStudy
from lunar_tune.yaml_files import read_yaml, write_yaml

if TYPE_CHECKING:
    import pandas as pd

DEFAULT, DERIVED, EARLIER = "default", "derived", "an earlier version"
OWN_DATA = ("data", "factual_data", "reference_prompts")
"""Options that stay what they were found to be, also where a later version would find another."""
_LISTED = 10  # numbers of trials that an error lists in full
_ADVICE = " Remove the file: the study has a copy, which is used then."
# What is no file even where there is one of that name.
_NAMES: tuple[Container[str], ...] = (BUNDLED, PUBLISHED, CATALOG, (AUTO, OWN, PUBLISHED_TURN))


def configuration_document(
    config: SearchConfig,
    *,
    given: Mapping[str, str],
    derived: Mapping[str, Any],
    resolved: Mapping[str, Any],
) -> str:
    """Return `config.yaml`: every value with its origin.

    `given` are origins of options that were not left at their default, `derived` values that stand
    for options left open, both by field name; `resolved` is what there is beside options.
    """
    options = {}
    for name in options_of(SearchConfig):
        value, origin = getattr(config, name), given.get(name, DEFAULT)
        if value in (None, ()) and name in derived:
            value, origin = derived[name], DERIVED
        options[name] = {"value": to_jsonable_python(value), "origin": origin}
    return write_yaml({"options": options, "resolved": to_jsonable_python(resolved)})


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StoredConfig(Concise):
    """What a search was told."""

    search: SearchConfig
    """Every option, named as the search and with the output folder that it lies in now. Files that
    were named relative to the folder that it was started in are found from here."""
    origins: Mapping[str, str]
    """Where values come from that were not left at their default, by field name."""
    resolved: Mapping[str, Any]  # what there is beside options: space, digests of data, versions
    permissions: Mapping[str, Any]
    """What the search was permitted (`config.fields.Option`), which `search` is not."""

    @classmethod
    def read(cls, folder: Folder) -> StoredConfig:
        """Read `config.yaml`, or the study's copy where there is none, or raise an InputError."""
        stored = StoredStudy.read(folder.journal)  # refuses what another version has written
        source = folder.config if folder.config.exists() else stored.notes.get("configuration")
        if not source:
            raise InputError(
                f"{folder.path}: has no config.yaml, and its study has no copy of it, so there is "
                "no search to read or to resume."
            )
        try:
            document = read_yaml(source)
        except InputError as error:
            problem = str(error).removeprefix(f"{folder.config}: ")
            raise InputError(f"{folder.config}: {problem}.{_ADVICE}") from error
        if not all(isinstance(document.get(part), dict) for part in ("options", "resolved")):
            raise InputError(
                f"{folder.config}: is damaged: a part of the file is missing.{_ADVICE}"
            )
        return cls._of(document, folder)

    @classmethod
    def begun(cls, folder: Folder) -> StoredConfig | None:
        """Return what a search was told, or None where none has begun in the folder."""
        told = StoredStudy.read(folder.journal).notes.get("configuration")
        return cls.read(folder) if told or folder.config.exists() else None

    @classmethod
    def _of(cls, document: Mapping[str, Any], folder: Folder) -> StoredConfig:
        known, resolved = options_of(SearchConfig), document["resolved"]
        told = {key: said for key, said in document["options"].items() if isinstance(said, dict)}
        kept = {
            key: said.get("value")
            for key, said in told.items()
            if (said.get("origin") != DERIVED or key in OWN_DATA)
            and (key not in known or known[key].stored)
        }
        earlier = {name: said.before for name, said in known.items() if said.before is not None}
        missing = earlier.keys() - told.keys()
        kept |= {name: earlier[name] for name in missing}
        values = from_document(SearchConfig, kept, source=str(folder.config))
        for name in values.keys() & {name for name, said in known.items() if said.place}:
            values[name] = _placed(values[name], resolved)
        permissions = permissions_in(SearchConfig, values)
        values = {name: value for name, value in values.items() if name not in permissions}
        values |= {"output": folder.path.parent, "name": folder.name}
        origins = {key: str(said.get("origin")) for key, said in told.items()}
        origins |= dict.fromkeys(missing, EARLIER)
        return cls(
            search=SearchConfig(**values),
            origins={key: one for key, one in origins.items() if one not in {DEFAULT, DERIVED}},
            resolved=resolved,
            permissions=permissions,
        )

    def check_permitted(self, given: Mapping[str, Any], *, command: str = "") -> None:
        """Raise an InputError if the search was permitted what is None in `given`."""
        asked = {name: value for name, value in self.permissions.items() if name in given}
        known = [name for name, value in given.items() if value is not None]
        check_permitted(f"{self.search.name}: was searched with", asked, known, command=command)

    @property
    def trial_options(self) -> RunOptions:
        """The options of a single run of the model that trials worked on, perhaps fine-tuned."""
        weights = _placed(self.resolved.get("weights"), self.resolved)
        return dataclasses.replace(self.search, model_path=weights) if weights else self.search


def _placed(value: str | None, resolved: Mapping[str, Any]) -> str | None:
    """Return the name of a file where the search was started as it is found from here."""
    if value is None or any(value in names for names in (*_NAMES, shipped_spaces())):
        return value
    here = Path(value).expanduser()
    there = Path(str(resolved.get("working_folder", "."))) / here
    is_there = is_file(there) or is_folder(there)
    return str(there) if is_there and there.resolve() != here.resolve() else value


@dataclass(frozen=True)
class StoredSearch:
    """A search as it stands on disk."""

    folder: Folder
    study: StoredStudy

    @classmethod
    def read(cls, search: str | Path, *, runs: str | Path = RUNS) -> Self:
        """Read a search with a judged base model by folder or name, or raise an InputError."""
        folder = find_search(search, Path(runs))
        stored = StoredStudy.read(folder.journal)
        if "goal" not in stored.notes:
            raise InputError(f"{folder.path}: the search has not begun its first trial.")
        return cls(folder=folder, study=stored)

    @cached_property
    def goal(self) -> Goal:
        """What it is after."""
        return Goal.read(*self.study.notes["goal"])

    @cached_property
    def config(self) -> StoredConfig:
        """What it was told; an `InputError` where that cannot be read."""
        return StoredConfig.read(self.folder)

    @property
    def rows(self) -> tuple[TrialRow, ...]:
        """All trials that were started, by number."""
        return self.study.rows

    @property
    def trials(self) -> pd.DataFrame:
        """A row a trial, with the columns of `trials.parquet`."""
        import pandas as pd

        return pd.DataFrame([row.flat() for row in self.rows])

    @property
    def baseline(self) -> Mapping[str, float]:
        """The base model's scores."""
        return dict(self.study.notes["baseline"])

    @cached_property
    def held_out(self) -> bool:
        """Whether a full evaluation asks questions that no trial is judged on."""
        with suppress(InputError):  # a configuration that cannot be read has no part in the scores
            return self.config.search.holdout
        return False

    @property
    def baseline_in_full(self) -> Mapping[str, float]:
        """The base model's scores on the questions of a full evaluation; empty if not asked."""
        note = self.study.notes.get("confirmed") or {}
        return (note.get("baseline") or {}) if self.held_out else self.baseline

    @cached_property
    def confirmed(self) -> Mapping[str, float] | None:
        """The best trial's scores in the full evaluation; None where there is none.

        An older search has no standard errors: they are those of its answers, where they are kept.
        """
        note = self.study.notes.get("confirmed")
        if note is None or errors_of(note["scores"]):
            return note and note["scores"]
        scores, means = note["scores"], dict[str, float]()
        with suppress(InputError):
            rows = self.answer_rows(note["number"], full=True)
            means = row_means(rows, [*{row.set_name for row in rows}])
        errors = {
            error_name(name): error
            for name, error in errors_of(means).items()
            if math.isclose(scores.get(name, math.nan), means[name], abs_tol=ROUNDING)
        }
        return {**scores, **errors}

    @property
    def best(self) -> TrialRow | None:
        """The confirmed best trial; None where there is none."""
        note = self.study.notes.get("confirmed")
        return self.rows[note["number"]] if note is not None else None

    @property
    def ranked(self) -> list[TrialRow]:
        """The feasible trials, the confirmed best first; where none is, the nearest misses."""
        rows = best_first(self.rows) or nearest_first(self.rows, self.goal)
        best = [] if self.best is None else [self.best]
        return [*best, *(row for row in rows if row not in best)]

    @property
    def number_format(self) -> str:
        """What the base model's weights were held in, to show."""
        return str(self.study.notes.get("facts", {}).get("number format", "not known"))

    @property
    def title(self) -> str:
        """What was searched, in a line."""
        tags = self.study.notes["tags"]
        edges = re.sub(r",\b", ", ", tags["forget_edge"])
        about = f"{tags['model']}, {tags['data']}: forget {edges}"
        held_out = ", half held out" if self.held_out else ""
        return f"{about}, {tags['method']} ({tags['solver']}){held_out}"

    @cached_property
    def importance(self) -> dict[str, dict[str, float]]:
        """The share of variance that each parameter explains by itself, of scores in charts."""
        shares = {
            name: parameter_importance(self.rows, self.study.distributions, name)
            for name in self.goal.shown
        }
        return {name: share for name, share in shares.items() if share is not None}

    @cached_property
    def layer_prior(self) -> Mapping[str, Any] | None:
        """The scored layers that the search began with, as `trial.layer_scores` documents them."""
        prior: Mapping[str, Any] | None = json.loads(self.study.notes.get("layer_prior") or "null")
        return prior

    def trial(self, number: int | None = None) -> TrialRow:
        """Return a completed trial: the best, or one by its number, or raise an InputError."""
        if number is None:
            if self.best is None:
                found = "and no trial is feasible"
                for one in best_first(self.rows)[:1]:
                    found = f"the best as searched is trial {one.number}"
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

    def answer_rows(self, number: int | None = None, *, full: bool = False) -> list[AnswerRow]:
        """Return a trial's answers, or the base model's (None), or raise an InputError.

        The best trial has those of its `full` evaluation, too.
        """
        path = self.folder.answers(number, full=full)
        if number is None and not path.is_file():
            path = self.folder.answers(None)
        if not path.is_file():
            raise InputError(f"{self.folder.name}: there are no answers in {path}.")
        return read_answers(path, self._digest(number, path))

    def has_its_answers(self, number: int) -> bool:
        """Say whether a trial's answers are there, as they were scored."""
        path = self.folder.answers(number)
        return path.is_file() and is_written(path, self._digest(number, path))

    @cached_property
    def changed_answers(self) -> list[Path]:
        """The files of answers that are not those that were scored."""
        numbers = [None, *(row.number for row in self.rows)]
        paths = [
            (number, self.folder.answers(number, full=full))
            for number in numbers
            for full in (False, True)
        ]
        there = [(number, path) for number, path in paths if path.is_file()]
        return [path for number, path in there if not is_written(path, self._digest(number, path))]

    def _digest(self, number: int | None, path: Path) -> str | None:
        """Return the digest that the study keeps of a file of answers; older ones have but some."""
        if number is not None and path == self.folder.answers(number):
            return self.rows[number].answers_digest if number < len(self.rows) else None
        digest: str | None = self.study.notes.get(answers_note(path))
        return digest

    def answers(self, number: int | None = None, *, full: bool = False) -> pd.DataFrame:
        """Return a trial's answers, or the best one's (None), each beside the base model's.

        The best trial has those of its `full` evaluation, too; an InputError says that it has none.
        """
        asked = self.answer_rows(self.trial(number).number, full=full)
        return answers_beside(self.answer_rows(full=full), asked)

    def _numbers(self) -> str:
        numbers = [str(row.number) for row in self.rows if row.state == COMPLETE]
        if len(numbers) > _LISTED:
            return f"{', '.join(numbers[: _LISTED // 2])} … {numbers[-1]}, {len(numbers)} in all"
        return ", ".join(numbers) or "none"
