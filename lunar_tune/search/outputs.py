"""The files of a search, in one place: `<output>/<name>/`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.config.search_config import LONGEST_NAME, SearchConfig
from lunar_tune.errors import InputError
from lunar_tune.files import write_atomically
from lunar_tune.metrics.goal import Goal
from lunar_tune.paths import check_writable, is_plain, safe_name
from lunar_tune.report.report import Report, write_report
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.tables import write_trials
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.yaml_files import write_yaml

if TYPE_CHECKING:
    from lunar_tune.search.loop import Confirmation  # loads Optuna

__all__ = [
    "best_document",
    "check_output",
    "make_folder",
    "write_best",
    "write_mirrors",
]


def write_mirrors(folder: Folder, report: Report) -> list[Path]:
    """Write table, pictures and report from the rows; return the pictures and the report."""
    write_trials(folder.trials, report.rows)  # first: it needs nothing to be loaded

    from lunar_tune.report.charts import CHARTS, write_charts  # loads Altair

    pictures = write_charts(report, folder.pictures)
    text = folder.path / "report.md"
    shown = {f"{folder.pictures.name}/{name}.png": CHARTS[name].caption for name in pictures}
    write_report(report, text, shown)
    return [*(path for files in pictures.values() for path in files), text]


def make_folder(config: SearchConfig, spec: TrialSpec) -> Folder:
    """Make the folder of a new search.

    Raises:
        InputError: It exists, or cannot be written.
    """
    name = config.name
    if name is None:
        stamp = datetime.now(tz=UTC).strftime("%Y%m%d-%H%M%S")
        edges = "+".join(spec.data.forget_edges)
        method = f"{spec.method.name}-{spec.method.variant}-{stamp}"
        about = f"{spec.model.name}-{spec.data.name}-{edges}"[: LONGEST_NAME - len(method) - 1]
        name = safe_name(f"{about}-{method}")
    path = config.output / name
    if not config.resume and Folder(path).is_taken:
        raise InputError(_taken(name, path))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {config.output}: cannot be written ({error}).") from error
    return Folder(path.resolve())


def _taken(name: str, path: Path) -> str:
    return (
        f"--name {name}: {path} exists already. Go on with it (python -m lunar_tune.search "
        f"--resume {path}), choose another name, or delete the folder to search anew."
    )


def check_output(output: Path, name: str | None, *, resume: bool = False) -> None:
    """Check that a search's folder can be made, without making it.

    Args:
        output: Folder of all searches.
        name: The search's name; None if it is yet to be made.
        resume: Whether one that exists is gone on with.

    Raises:
        InputError: It exists already, or cannot be written.
    """
    named = name is not None and is_plain(name) and not resume
    if name is not None and named and Folder(output / name).is_taken:
        raise InputError(_taken(name, output / name))
    check_writable(output, f"--output {output}")


def best_document(
    row: TrialRow,
    confirmation: Confirmation,
    *,
    spec: TrialSpec,
    n_layers: int,
    vanilla: Mapping[str, float],
    goal: Goal,
) -> dict[str, Any]:
    """Return what `best.yaml` says: the setting, its scores in full, and as the trial saw them."""
    confirmed = confirmation.scores
    return {
        "model": spec.model.name,
        "n_layers": n_layers,
        "data": spec.data.name,
        "forget_edges": list(spec.data.forget_edges),
        "method": spec.method.name,
        "solver": spec.method.variant,
        "trial": row.number,
        "parameters": dict(row.parameters),
        "minimise": goal.objective.metric,
        "constraints": [str(one) for one in goal.constraints],
        "feasible": goal.is_kept(confirmed),
        "confirmed": {
            "max_new_tokens": confirmation.max_new_tokens,
            "scores": dict(confirmed),
            **({"vanilla": dict(held)} if (held := confirmation.vanilla) is not None else {}),
        },
        "as_searched": {"max_new_tokens": row.max_new_tokens, "scores": dict(row.scores)},
        "vanilla": dict(vanilla),
        "seed": spec.seed,
    }


def write_best(folder: Folder, document: Mapping[str, Any]) -> None:
    """Write `best.yaml`."""
    write_atomically(folder.best, write_yaml(document).encode())
