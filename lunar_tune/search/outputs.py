"""What a search writes into its folder, and what its study keeps for MLflow."""

from __future__ import annotations

import dataclasses
import getpass
import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lunar_tune import __version__
from lunar_tune.files import write_atomically
from lunar_tune.metrics.goal import Goal, goal_of
from lunar_tune.models.catalog import read_lineage
from lunar_tune.report.results import SearchResults, write_report
from lunar_tune.search.backends import Resources
from lunar_tune.search.loop import Confirmation
from lunar_tune.search.plan import SearchPlan
from lunar_tune.study.answers import write_trials
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.stored_search import configuration_document
from lunar_tune.tracking.store import kept_uri
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.yaml_files import write_yaml

__all__ = ["search_document", "tracked_description", "write_best", "write_mirrors"]


def search_document(
    plan: SearchPlan,
    *,
    name: str,
    uri: str,
    resources: Resources,
    given: Mapping[str, str],
    baseline: Mapping[str, float],
) -> str:
    """Return `config.yaml` of a search under way; `given` are origins of options."""
    config, spec, data, prior = plan.config, plan.spec, plan.spec.data, plan.prior
    if config.tracking_uri is not None:
        config = dataclasses.replace(config, tracking_uri=kept_uri(config.tracking_uri))
    derived = {
        "name": name,
        "tracking_uri": kept_uri(uri),
        "gpus_per_trial": resources.gpus,
        "concurrency": resources.concurrency,
        "space": plan.space.origin,
        "data": data.name,
        "forget_edge": data.forget_edges,
    }
    resolved: dict[str, Any] = {
        "space": plan.space.to_dict(),
        "n_layers": plan.n_layers,
        "model_source": spec.model.checkpoint,
        "weights": spec.model.weights,
        "working_folder": str(Path.cwd()),
        "rows": _rows(plan),
        "digests": data.digests(),
        "baseline": dict(baseline),
        "version": __version__,
    }
    if prior is not None:
        resolved["layer_prior"] = {"made_of_it": plan.layers, **prior.model_dump(mode="json")}
    if (lineage := read_lineage(spec.model.checkpoint)) is not None:
        resolved["lineage"] = dataclasses.asdict(lineage)
    return configuration_document(config, given=given, derived=derived, resolved=resolved)


def tracked_description(plan: SearchPlan, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what MLflow shows of a search and its study does not say otherwise.

    The origin stays that which an earlier process has kept.
    """
    config, spec, digests = plan.config, plan.spec, plan.spec.data.digests()
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
        "data": {name: (digests[name], count) for name, count in _rows(plan).items()},
        "lineage": lineage.tags() if lineage is not None else {},
        "origin": (before or {}).get("origin") or _origin_tags(),
    }


def _rows(plan: SearchPlan) -> dict[str, int]:
    """Return the number of questions of each set."""
    data = plan.spec.data
    return {"forget": len(data.forget), "retain": len(data.retain), "factual": len(data.factual)}


def write_mirrors(folder: Folder, results: SearchResults) -> None:
    """Write table, pictures, report and page from the rows."""
    write_trials(folder.trials, results.rows)  # first: it needs nothing to be loaded

    from lunar_tune.report.charts import CHARTS, write_charts  # loads Altair
    from lunar_tune.report.page import write_static_page

    pictures = write_charts(results, folder.pictures)
    shown = {f"{folder.pictures.name}/{name}.png": CHARTS[name].caption for name in pictures}
    write_report(results, folder.path / "report.md", shown)
    write_static_page([results], folder.path / "page.html")


def write_best(
    folder: Folder,
    row: TrialRow,
    confirmation: Confirmation,
    *,
    spec: TrialSpec,
    n_layers: int,
    baseline: Mapping[str, float],
    goal: Goal,
) -> None:
    """Write `best.yaml`: a setting, its scores in full, and as the trial saw them."""
    full = dataclasses.asdict(confirmation)
    shown = ("max_new_tokens", "scores", "baseline")
    document = {
        "model": spec.model.name,
        "n_layers": n_layers,
        "data": spec.data.name,
        "forget_edges": list(spec.data.forget_edges),
        "method": spec.method.name,
        "solver": spec.method.variant,
        "trial": row.number,
        "parameters": dict(row.parameters),
        "minimise": goal.objective.name,
        "constraints": [str(one) for one in goal.constraints],
        "feasible": goal.is_kept(confirmation.scores),
        "confirmed": {key: full[key] for key in shown if full[key] is not None},
        "as_searched": {"max_new_tokens": row.max_new_tokens, "scores": dict(row.scores)},
        "baseline": dict(baseline),
        "seed": spec.seed,
    }
    write_atomically(folder.best, write_yaml(document).encode())


def _origin_tags() -> dict[str, str]:
    """Return where a run comes from that is started here and now, some for MLflow's own columns."""
    user = "unknown"
    with suppress(KeyError, OSError, ImportError):  # a container's user may have no name
        user = getpass.getuser()
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    command = str(spec.name).removesuffix(".__main__") if spec is not None else ""
    tags = {
        "mlflow.user": user,
        "mlflow.source.name": command if command.startswith("lunar_tune") else "lunar_tune",
        "mlflow.source.type": "LOCAL",
        "version.lunar_tune": __version__,
    }
    for package in ("torch", "transformers", "ray", "optuna"):
        with suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    commit = code_commit(Path(__file__).parents[1])
    return tags if commit is None else {**tags, "mlflow.source.git.commit": commit}


def code_commit(package: Path) -> str | None:
    """Return the commit of a package's own checkout; None where no repository has its files."""
    # Of its file as well: an installed package may lie below the repository of something else.
    command = ["git", "-C", str(package), "rev-parse", "HEAD", "HEAD:./__init__.py"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split()[0]
