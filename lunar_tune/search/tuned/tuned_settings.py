"""Tuned settings as a file: what a search found for a model, and how it came about.

    format: lunar-tune tuned settings
    version: 1
    model: tiny
    entries:
    - data: mini
      forget_edges: [A_B]
      method: lunar
      variant: adamw
      parameters: {layer: 1, coefficient: 2.0, learning_rate: 0.003}
      minimise: forget_rouge1
      constraints: [retain_rouge1>=0.8]
      scores: {forget_rouge1: 0.0, retain_rouge1: 0.964, …}
      provenance: {search: …, date: '2026-11-25', trials: 12, seed: 0, …}

One file a model, in it one entry for data, edges, method and variant. Later versions may add keys,
which are read over; a change of meaning raises `version`.

Covers: the form, reading and writing it, when one setting is better than another.
Does not cover: where files lie (`tuned_store`), making an entry from a search (`finished_search`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal
from lunar_tune.yaml_files import describe_mistakes, looks_like_number, read_yaml_mapping

__all__ = ["Provenance", "TunedFile", "TunedSetting", "no_better", "read_tuned", "tuned_text"]

_FORM: Final = ConfigDict(strict=True, frozen=True, extra="ignore")
Key = tuple[str, tuple[str, ...], str, str]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], Field(strict=False)]  # YAML has lists only


class Provenance(BaseModel):
    """How a setting was found."""

    model_config = _FORM

    search: Name
    """Name of the search."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    """When it ended, in UTC."""
    trials: Count
    """Trials that were run."""
    seed: int
    confirmed_in_full: bool
    """Whether the scores are those of all rows with at least the published token budget."""
    max_new_tokens: Count
    """Token budget of the answers that were scored."""
    digests: dict[str, str]
    """Of the data, a set each."""
    source: Name
    """Hub id of the model, or name of its folder."""
    weights: str | None
    """Name of the folder of fine-tuned weights."""
    revision: str | None
    """Of the model on the hub, if one was named."""
    lineage: dict[str, Any] | None
    """Of fine-tuned weights: base, data and fingerprint."""
    version: Name
    """Of lunar-tune."""


class TunedSetting(BaseModel):
    """The best setting for one model, data set, edges, method and variant."""

    model_config = _FORM

    data: Name
    forget_edges: Annotated[Names, Field(min_length=1)]
    method: Name
    variant: Name
    parameters: Annotated[dict[str, int | float], Field(min_length=1)]
    minimise: Name
    """The metric that the search made as good as possible."""
    constraints: Names
    """Bounds that it kept."""
    scores: dict[str, float]
    """Of the confirmation."""
    provenance: Provenance

    @model_validator(mode="after")
    def _goal_is_met(self) -> Self:
        try:
            goal = self.goal
        except InputError as error:
            raise ValueError(f"minimise, constraints: {error}") from error
        missing = [name for name in goal.metrics if name not in self.scores]
        if missing:
            raise ValueError(f"scores: {', '.join(missing)} is missing, which the goal speaks of")
        if not goal.is_kept(self.scores):
            raise ValueError("scores: miss a constraint, and only feasible settings are kept")
        return self

    @property
    def goal(self) -> Goal:
        """What the search was after."""
        return Goal.read(self.minimise, self.constraints)

    @property
    def key(self) -> Key:
        """What it was tuned for, whatever the order of edges; a file has one entry for each."""
        return self.data, tuple(sorted(self.forget_edges)), self.method, self.variant

    @property
    def about(self) -> str:
        """The key in words."""
        return f"{self.data} {'+'.join(self.forget_edges)}, {self.method} ({self.variant})"


class TunedFile(BaseModel):
    """The tuned settings of one model."""

    model_config = _FORM

    format: Literal["lunar-tune tuned settings"] = "lunar-tune tuned settings"
    version: Literal[1] = 1
    model: Name
    """Its name, as in a search's results."""
    entries: Annotated[tuple[TunedSetting, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _entries_differ(self) -> Self:
        keys = [entry.key for entry in self.entries]
        twice = next((entry for entry in self.entries if keys.count(entry.key) > 1), None)
        if twice is not None:
            raise ValueError(f"entries: {twice.about} stands there twice; keep one of them")
        return self

    def with_setting(self, setting: TunedSetting) -> TunedFile:
        """Return a copy with a setting, in the place of one for the same key."""
        others = {entry.key: entry for entry in self.entries}
        entries = sorted((others | {setting.key: setting}).values(), key=lambda one: one.key)
        return TunedFile(model=self.model, entries=tuple(entries))


def read_tuned(path: Path) -> TunedFile:
    """Read and check one file.

    Raises:
        InputError: It cannot be read, or something in it is wrong; the message says where.
    """
    content = read_yaml_mapping(path, error_class=InputError)
    try:
        return TunedFile.model_validate(content)
    except ValidationError as error:
        mistakes = "; ".join(describe_mistakes(error, ()))
        raise InputError(
            f"{path}: {mistakes}. Mend it, or remove the file (python -m lunar_tune.tuned --keep "
            "FOLDER writes it anew)."
        ) from error


def tuned_text(file: TunedFile) -> str:
    """Return a file's content."""
    document = file.model_dump(mode="json")
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def no_better(new: TunedSetting, old: TunedSetting) -> str | None:
    """Say why a setting does not take the place of an older one; None if it is better."""
    if new.provenance.digests != old.provenance.digests:
        return "was found on other questions, so that the scores do not compare"
    if new.goal.text != old.goal.text:
        return f"was found for another goal ({old.goal})"
    metric = new.minimise
    if new.goal.value(new.scores) < old.goal.value(old.scores):
        return None
    return f"has {metric} {old.scores[metric]:.4g}, and this one {new.scores[metric]:.4g}"


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what would be a number in YAML 1.2, as `1e5`."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return a text as a node."""
        style = "'" if looks_like_number(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
