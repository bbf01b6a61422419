"""What a search says of itself: `config.yaml`, and what its study keeps for MLflow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lunar_tune.metrics.goal import goal_of
from lunar_tune.models.lineage import read_lineage
from lunar_tune.search.backends.interface import Resources
from lunar_tune.search.plan import SearchPlan
from lunar_tune.study.stored_search import configuration_document
from lunar_tune.tracking.store import kept_uri, origin_tags

__all__ = ["description", "search_document"]


def search_document(
    plan: SearchPlan,
    *,
    name: str,
    uri: str,
    resources: Resources,
    given: Mapping[str, str],
    resolved: Mapping[str, Any],
) -> str:
    """Return `config.yaml` of a search under way.

    Args:
        plan: Of the search.
        name: Of the search.
        uri: Of its MLflow store.
        resources: Of a trial.
        given: Origin of options that were not left at their default.
        resolved: What there is beside options.
    """
    config, data = plan.config, plan.spec.data
    if config.tracking_uri is not None:
        config = dataclasses.replace(config, tracking_uri=kept_uri(config.tracking_uri))
    return configuration_document(
        config,
        given=given,
        derived={
            "name": name,
            "tracking_uri": kept_uri(uri),
            "gpus_per_trial": resources.gpus,
            "concurrency": resources.concurrency,
            "space": plan.space.origin,
            "data": data.name,
            "forget_edge": data.forget_edges,
        },
        resolved=resolved,
    )


def description(
    plan: SearchPlan, digests: Mapping[str, str], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what MLflow shows of a search and its study does not say otherwise.

    Args:
        plan: Of the search.
        digests: Of its data sets, by name.
        before: What an earlier process has kept, whose origin stays.
    """
    config, spec, data = plan.config, plan.spec, plan.spec.data
    splits = {"forget": data.forget, "retain": data.retain, "factual": data.factual}
    lineage = read_lineage(spec.model.checkpoint)
    return {
        "parameters": {
            **spec.tags,
            "goal": str(goal_of(config)),
            "sampler": config.sampler,
            "seed": config.seed,
            **{f"space.{name}": text for name, text in plan.space.describe()},
        },
        "num_trials": config.num_trials,
        "data": {name: (digests[name], len(records)) for name, records in splits.items()},
        "lineage": lineage.tags() if lineage is not None else {},
        "origin": (before or {}).get("origin") or origin_tags(),
    }
