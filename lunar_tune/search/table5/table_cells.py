"""The cells of the table of methods: every model with every data set, method and seed."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lunar_tune.config.search_config import LONGEST_NAME, SearchConfig
from lunar_tune.data.data_catalog import resolve_data
from lunar_tune.errors import InputError, Problems
from lunar_tune.methods.method_registry import METHODS
from lunar_tune.models.catalog import resolve_model
from lunar_tune.paths import safe_name

__all__ = ["Cell", "cells_of", "check_fixed"]

OWN_DATA = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One study of the table."""

    model: str
    data: str
    """`NAME` or `NAME:EDGE+EDGE`; empty for the model's own data."""
    method: str
    variant: str
    seed: int
    several_seeds: bool = False
    """Whether it is one of several that differ in their seed."""

    @property
    def name(self) -> str:
        """The search's name and folder."""
        model, data = _short(self.model), _short(self.data or "own")
        seed = f"-seed{self.seed}" if self.seed else ""
        text = f"{model}-{data}-{self.method}-{self.variant}{seed}"
        name = safe_name(text)
        if name == text and len(name) <= LONGEST_NAME:
            return name
        # Characters were left out, or are too many: other text may look the same.
        return f"{name[: LONGEST_NAME - 8]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"

    @property
    def fixable(self) -> set[str]:
        """Parameters and settings that can be fixed."""
        return METHODS[self.method].names_in_use(self.variant)

    def config(self, shared: SearchConfig) -> SearchConfig:
        """Return the cell's search.

        Args:
            shared: What all cells have in common.
        """
        name, _, edges = self.data.partition(":")
        variant = f"{METHODS[self.method].variant_setting}={self.variant}"
        known = self.fixable
        return dataclasses.replace(
            shared,
            model=self.model,
            data=name or shared.data,
            forget_edge=tuple(edges.split("+")) if edges else shared.forget_edge,
            method=self.method,
            # What one method has and another has not is for those that have it.
            fix=(variant, *(text for text in shared.fix if _name_of(text) in known)),
            seed=self.seed,
            name=self.name,
            resume=self.name,
        )


def check_fixed(cells: Sequence[Cell], fix: Sequence[str]) -> None:
    """Check that what is fixed has a meaning with one of the methods at least.

    Raises:
        InputError: Something has none.
    """
    known = set[str]().union(*(cell.fixable for cell in cells))
    unknown = [text for text in fix if _name_of(text) not in known]
    if unknown:
        raise InputError(
            f"--fix {', '.join(unknown)}: no method of the table has it. There are: "
            f"{', '.join(sorted(known))}."
        )


def _name_of(assignment: str) -> str:
    return assignment.partition("=")[0].strip().replace("-", "_")


def cells_of(
    models: Sequence[str],
    data: Sequence[str],
    methods: Sequence[str],
    *,
    seed: int = 0,
    seeds: int = 1,
) -> list[Cell]:
    """Return all cells, model by model, so that what is kept of a model is used while it is fresh.

    Args:
        models: As `--model` takes them.
        data: `NAME` or `NAME:EDGE+EDGE`; none for each model's own.
        methods: `NAME` or `NAME:VARIANT`.
        seed: Of the first study of a cell.
        seeds: Studies of a cell.

    Raises:
        InputError: Something means nothing or is named twice; all of it is said.
    """
    problems = Problems()
    if seeds < 1:
        problems.add(f"--seeds {seeds}: at least 1.")
    for flag, names in (("--model", models), ("--data", data), ("--method", methods)):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        if twice:
            problems.add(f"{flag}: {', '.join(twice)} is named twice.")
    for model in models:
        with problems.collect():
            resolve_model(model)
    for name in filter(None, (one.partition(":")[0] for one in data)):
        with problems.collect():
            resolve_data(name, kind="records")
    variants = []
    for method in methods:
        with problems.collect():
            variants.append(_variant_of(method))
    if len(set(variants)) < len(variants):
        problems.add("--method: a method and variant are named twice.")
    problems.raise_if_any()
    return [
        Cell(
            model=model,
            data=one,
            method=method,
            variant=variant,
            seed=number,
            several_seeds=seeds > 1,
        )
        for model, one, (method, variant), number in itertools.product(
            models, data or [OWN_DATA], variants, range(seed, seed + seeds)
        )
    ]


def _variant_of(text: str) -> tuple[str, str]:
    name, _, variant = text.partition(":")
    known = METHODS[name].variants
    if variant and variant not in known:
        raise InputError(f"--method {text}: {name} has {', '.join(known)}.")
    return name, variant or known[0]


def _short(text: str) -> str:
    """Return a name for folders; of a path its last part and a digest, for others may share it."""
    if "/" not in text:
        return text.replace(":", "-")
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{Path(text).stem}-{digest}"
