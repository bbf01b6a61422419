"""The questions of a run: sets read, split, cut to what is evaluated, and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lunar_tune.config.run_options import NONE, TINY, RunOptions
from lunar_tune.data.data_catalog import resolve_data
from lunar_tune.data.records import Record, read_prompts, read_records
from lunar_tune.data.splits import (
    Split,
    edges_of,
    halves_by_edge,
    read_groups,
    sample_by_edge,
    split_by_edges,
)
from lunar_tune.errors import DataError, Problems
from lunar_tune.metrics.rouge import check_scorable
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.trial.spec import DataSets, HeldOut

__all__ = ["own_data", "read_set", "read_sets"]

DEFAULT_EDGES = ("A_B", "author_1")  # of PISTOL and of TOFU, as in the published code


def read_sets(options: RunOptions, model: ModelSpec | None, problems: Problems) -> DataSets | None:
    """Read and split all sets.

    Args:
        options: What was asked for.
        model: The model; None where it could not be told.
        problems: Where what is wrong is noted.

    Returns:
        The sets; None where something is wrong.
    """
    name = options.data or own_data(model)
    records = read_set(name, problems)
    # What is to be forgotten is no general knowledge.
    without = options.factual_data in {NONE, name}
    factual = () if without else read_set(options.factual_data, problems, NONE)
    other = read_set(options.retain_data, problems, "retain") if options.retain_data else None
    prompts = refusals = None
    with problems.collect():
        prompts = read_prompts(resolve_data(options.reference_prompts, kind="prompts"))
    with problems.collect():
        refusals = read_prompts(resolve_data(options.refusals, kind="prompts"))
    split = None
    if records is not None:
        with problems.collect():
            groups = read_groups(resolve_data(name, kind="records"))
            edges = options.forget_edge or _default_edge(edges_of(records), groups)
            # A file of nothing but what is to be forgotten is judged on the other retain set.
            split = split_by_edges(records, edges, retain=other, groups=groups)
    if split is None or factual is None or prompts is None or refusals is None:
        return None
    if other is not None:
        with problems.collect():
            Split(forget=split.forget, retain=other, forget_edges=split.forget_edges)
    sets = None
    with problems.collect():
        sets = _evaluated(options, name, split, factual)
    if sets is None:
        return None
    fit_retain = split.retain if other is None else other
    sets = dataclasses.replace(
        sets, fit_retain=fit_retain, reference_prompts=prompts, refusals=refusals
    )
    if options.holdout:
        with problems.collect():
            return _tuned_on_half(sets, options)
    return sets


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


def _evaluated(
    options: RunOptions,
    name: str,
    split: Split,
    factual: tuple[Record, ...],
) -> DataSets:
    """Cut the sets to what is evaluated, and check that it can be scored."""
    # A count below 1 is a mistake that is noted already; what else is wrong is to be found too.
    rows = None if options.evaluation_rows is None else max(1, options.evaluation_rows)
    retain = split.retain[:rows]
    size = len(retain) if options.retain_rows is None else max(1, options.retain_rows)
    sample = sample_by_edge(retain, size, seed=options.seed)
    evaluated = (*split.forget, *retain, *factual[:rows])
    check_scorable(evaluated, tokenizer=options.rouge_tokenizer, text=options.text)
    return DataSets(
        name=Path(name).stem,
        forget_edges=split.forget_edges,
        forget=split.forget[:rows],
        fit_forget=split.forget,
        fit_retain=split.retain,
        retain=retain,
        n_retain=len(split.retain),
        retain_sample=sample,
        factual=factual[:rows],
        reference_prompts=(),
    )


def read_set(
    name: str, problems: Problems, default_edge: str | None = None
) -> tuple[Record, ...] | None:
    """Read question-answer pairs; None where something is wrong, which is then noted."""
    with problems.collect():
        return read_records(resolve_data(name, kind="records"), default_edge=default_edge)
    return None


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
