"""What a search says of itself: its configuration, and its MLflow run in words.

Covers: `config.yaml`; few parameters of the run, numbers where there are numbers; a note in
Markdown for the run's page.
Does not cover: writing them (`session`, `tracked_run`), the report that is kept as a file
(`report`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from lunar_tune.config.search_config import config_document, plain
from lunar_tune.metrics.goal import goal_of
from lunar_tune.report.report import Report, verdict
from lunar_tune.search.backends.ray.cluster import Resources
from lunar_tune.search.plan import SearchPlan
from lunar_tune.study.rows import score_cells
from lunar_tune.tracking.store import kept_uri

__all__ = ["run_note", "run_parameters", "search_document", "space_document"]


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
    return config_document(
        config,
        given=given,
        derived={
            "name": name,
            "tracking_uri": kept_uri(uri),
            "cpus_per_trial": resources.cpus,
            "gpus_per_trial": resources.gpus,
            "concurrency": resources.concurrency,
            "space": plan.space.origin,
            "data": data.name,
            "forget_edges": data.forget_edges,
        },
        resolved=resolved,
    )


def run_parameters(plan: SearchPlan) -> dict[str, Any]:
    """Return the parameters of a search's run; those of trials have other names."""
    config, spec = plan.config, plan.spec
    return {
        **spec.tags,
        "goal": str(goal_of(config)),
        "sampler": config.sampler,
        "seed": config.run.seed,
        **{f"space.{name}": text for name, text in plan.space.describe()},
    }


def space_document(plan: SearchPlan) -> str:
    """Return what is searched as YAML."""
    return yaml.safe_dump(plain(plan.space.to_dict()), sort_keys=False, allow_unicode=True)


def run_note(report: Report) -> str:
    """Return the description of a search: its goal, what came out, what it was told."""
    if report.best is not None:
        setting = ", ".join(f"{name} `{v!r}`" for name, v in report.best.parameters.items())
        outcome = f"**Best feasible setting**: {setting} (trial {report.best.number})."
    else:
        outcome = verdict(report)
    lines = [
        f"{str(report.goal)[:1].upper()}{str(report.goal)[1:]}.",
        "",
        outcome,
        "",
        "| | forget ROUGE-1 | retain ROUGE-1 | factual ROUGE-1 | deviation score |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join([who, *score_cells(s)])} |" for who, s in report.compared.items()),
        "",
        *(f"- {label}: {text}" for label, text in report.facts.items()),
    ]
    return "\n".join(lines) + "\n"
