"""The questions of a run: sets read, split, cut to what is evaluated, and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lunar_tune.config.run_options import NONE, TINY, RunOptions
from lunar_tune.data.bundled import resolve_data
from lunar_tune.data.groups import expand_edges, read_groups
from lunar_tune.data.readers import read_prompts, read_records
from lunar_tune.data.records import Record
from lunar_tune.data.splits import (
    Split,
    edges_of,
    halves_by_edge,
    sample_by_edge,
    split_by_edges,
)
from lunar_tune.errors import DataError, Problems
from lunar_tune.metrics.rouge import check_scorable
from lunar_tune.models.loading import ModelSpec
from lunar_tune.trial.spec import DataSets, HeldOut

__all__ = ["own_data", "read_prompts_of", "read_records_of", "read_sets"]

DEFAULT_EDGES = ("A_B", "author_1")  # of PISTOL and of TOFU, as in the published code


def read_sets(options: RunOptions, model: ModelSpec | None, problems: Problems) -> DataSets | None:
    """Read and split all sets; None where something is wrong, which is then noted."""
    name = options.data or own_data(model)
    records = problems.attempt(lambda: read_records_of(name))
    factual: tuple[Record, ...] | None = ()
    if options.factual_data not in {NONE, name}:  # what is to be forgotten is not general knowledge
        factual = problems.attempt(lambda: read_records_of(options.factual_data, NONE))
    other, retain_data = None, options.retain_data
    if retain_data:
        other = problems.attempt(lambda: read_records_of(retain_data, "retain"))
    prompts = problems.attempt(lambda: read_prompts_of(options.reference_prompts))
    refusals = problems.attempt(lambda: read_prompts_of(options.refusals))
    split = None
    if records is not None:
        with problems.collect():
            existing = edges_of(records)
            groups = read_groups(resolve_data(name, kind="records"))
            edges = options.forget_edge or _default_edge(existing, groups)
            # A file of nothing but what is to be forgotten is judged on the other retain set.
            chosen = expand_edges(edges, existing, groups)
            other_retain = other if set(chosen) >= set(existing) else None
            split = split_by_edges(records, edges, retain=other_retain, groups=groups)
    if split is None or factual is None or prompts is None or refusals is None:
        return None
    if other is not None:
        with problems.collect():
            Split(forget=split.forget, retain=other, forget_edges=split.forget_edges)
    # A count below 1 is a mistake that is noted already; what else is wrong is to be found too.
    rows = None if options.evaluation_rows is None else max(1, options.evaluation_rows)
    retain = split.retain[:rows]
    size = len(retain) if options.retain_rows is None else max(1, options.retain_rows)
    sets = DataSets(
        name=Path(name).stem,
        forget_edges=split.forget_edges,
        forget=split.forget[:rows],
        fit_forget=split.forget,
        fit_retain=split.retain if other is None else other,
        retain=retain,
        n_retain=len(split.retain),
        retain_sample=sample_by_edge(retain, size, seed=options.seed),
        factual=factual[:rows],
        reference_prompts=prompts,
        refusals=refusals,
    )
    with problems.collect():
        evaluated = (*split.forget, *retain, *factual[:rows])
        check_scorable(evaluated, tokenizer=options.rouge_tokenizer, text=options.text)
        return _tuned_on_half(sets, options) if options.holdout else sets
    return None


def _tuned_on_half(sets: DataSets, options: RunOptions) -> DataSets:
    """Leave one half of every evaluated set for the trials, and keep the other for the report."""
    forget, retain, factual = (
        halves_by_edge(records, seed=options.seed)
        for records in (sets.forget, sets.retain, sets.factual)
    )
    size = max(1, options.retain_rows or len(retain[0]))
    return dataclasses.replace(
        sets,
        forget=forget[0],
        retain=retain[0],
        factual=factual[0],
        n_retain=len(retain[0]),
        retain_sample=sample_by_edge(retain[0], size, seed=options.seed),
        held_out=HeldOut(forget=forget[1], retain=retain[1], factual=factual[1]),
        # What is kept in the fit would be kept in the report as well.
        fit_retain=tuple(record for record in sets.fit_retain if record not in set(retain[1])),
    )


def read_records_of(name: str, default_edge: str | None = None) -> tuple[Record, ...]:
    """Return the question-answer pairs of a data set's name or file."""
    return read_records(resolve_data(name, kind="records"), default_edge=default_edge)


def read_prompts_of(name: str) -> tuple[str, ...]:
    """Return the prompts, or the refusals, of a shipped name or file."""
    return read_prompts(resolve_data(name, kind="prompts"))


def own_data(model: ModelSpec | None) -> str:
    """Return the name of the data that a model is taken to know."""
    return "mini" if model is not None and model.name == TINY else "contracts"


def _default_edge(
    edges: Mapping[str, int], groups: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    default = next((edge for edge in DEFAULT_EDGES if edge in edges or edge in groups), None)
    if default is None:
        among = f" Groups of edges: {', '.join(groups)}." if groups else ""
        raise DataError(
            f"--forget-edge is needed: the data have no edge {DEFAULT_EDGES[0]!r}, the default. "
            f"There are: {', '.join(list(edges)[:40])}.{among}"
        )
    return (default,)
