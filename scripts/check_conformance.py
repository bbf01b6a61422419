"""Compare this implementation with what the authors' published code got on a small checkpoint.

Covers: directions, and forget, retain and factual ROUGE-1 at the recorded settings, averaged over
seeds, with the published bfloat16 matrix (judged) and an fp32 master (beside it), which is another
fit at small learning rates: bfloat16 loses small updates.
Does not cover: rank metrics.

The folder holds `model/`, `data.json`, `directions.safetensors` and `results.json`; the factual and
reference prompts lie beside it in `../data`. Exit code 0: conforms; 1: does not.

    scripts/check_conformance.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import cyclopts
import torch
from cyclopts.types import ExistingDirectory, PositiveInt
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from lunar_tune.cli.main import reporting_errors
from lunar_tune.config.options import NEVER, RunOptions
from lunar_tune.methods.lunar.method import PreparedLunar
from lunar_tune.models.chat import PUBLISHED
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.worker import Worker

LEAST_COSINE = 0.999
TOLERANCE = {"forget": 0.06, "retain": 0.03, "factual": 0.03}  # forget has 20 rows
EVALUATED_ROWS = 200  # the published code's first rows of each set
MASTERS = ("published", "bfloat16", "fp32")
REFERENCE_FILES = {"harmful": "harmful.json", "unverified": "unverified.json"}


class Setting(NamedTuple):
    """What one group of recorded runs shares."""

    reference: str
    forget_edge: str
    layer: int
    coefficient: float
    learning_rate: float

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Setting:
        """Return the setting of one recorded run."""
        return cls(**{name: result[name] for name in cls._fields})


def recorded(folder: Path) -> dict[Setting, dict[str, float]]:
    """Return the recorded ROUGE-1 of each setting, averaged over its repeats."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results.sort(key=Setting.of)
    return {
        setting: _average([{s: run[s]["rouge1_recall"] for s in TOLERANCE} for run in runs])
        for setting, runs in ((key, list(group)) for key, group in groupby(results, Setting.of))
    }


def workers(
    folder: Path, settings: Sequence[Setting], master_dtype: str
) -> Iterator[tuple[Worker, list[Setting]]]:
    """Yield a worker for each reference set and forget edge, with its settings."""
    data = folder.parent / "data"
    for (reference, edge), group in groupby(settings, lambda s: (s.reference, s.forget_edge)):
        options = RunOptions(
            model=str(folder / "model"),
            dtype="bfloat16",
            chat_template=PUBLISHED,
            data=str(folder / "data.json"),
            forget_edge=(edge,),
            factual_data=str(data / "factual_data.json"),
            reference_prompts=str(data / REFERENCE_FILES[reference]),
            reference_check=NEVER,  # as the published code
            evaluation_rows=EVALUATED_ROWS,
            fix=(f"master_dtype={master_dtype}",),
        )
        yield Worker(assemble(options)), list(group)


def direction_cosines(worker: Worker, golden: torch.Tensor) -> list[float]:
    """Return the cosine of each block's vector with the recorded one.

    Recorded row i lies at the input of block i, so it belongs to block i − 1; row 0 has none.
    """
    prepared = worker.prepared
    if not isinstance(prepared, PreparedLunar):
        raise TypeError(f"not prepared by LUNAR: {prepared!r}")
    mine = prepared.vectors[: len(golden) - 1].cpu()
    cosines = torch.nn.functional.cosine_similarity(mine, golden[1:].double())
    return [float(cosine) for cosine in cosines]


def measure(worker: Worker, setting: Setting, seeds: int) -> dict[str, float]:
    """Return ROUGE-1 of a setting, averaged over seeds."""
    parameters = {
        "layer": setting.layer,
        "coefficient": setting.coefficient,
        "learning_rate": setting.learning_rate,
    }
    runs = [worker.run(parameters, seed=seed).evaluation.scores for seed in range(seeds)]
    return _average([{name: run[f"{name}_rouge1"] for name in TOLERANCE} for run in runs])


def _average(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: mean(run[name] for run in runs) for name in runs[0]}


def _check_directions(console: Console, folder: Path, settings: Sequence[Setting]) -> bool:
    directions = load_file(folder / "directions.safetensors")
    conforms = True
    for worker, group in workers(folder, settings, "bfloat16"):
        key = _direction_key(directions, group[0])
        cosines = direction_cosines(worker, directions[key])
        conforms &= min(cosines) >= LEAST_COSINE
        console.print(f"directions {key}: least cosine {min(cosines):.5f}", highlight=False)
    return conforms


def _direction_key(directions: Mapping[str, torch.Tensor], setting: Setting) -> str:
    matching = [k for k in directions if setting.reference in k and k.endswith(setting.forget_edge)]
    if len(matching) != 1:
        raise KeyError(f"{setting.reference}, {setting.forget_edge}: one of {list(directions)}")
    return matching[0]


def check(folder: ExistingDirectory, /, *, seeds: PositiveInt = 3) -> None:
    """Compare with what the published code got on a small checkpoint.

    Args:
        folder: With `model/`, `data.json`, `directions.safetensors` and `results.json`.
        seeds: Runs to average over.
    """
    console = Console()
    golden = recorded(folder)
    settings = sorted(golden)
    conforms = _check_directions(console, folder, settings)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("setting", "set", "published", "bfloat16", "fp32", ""):
        table.add_column(column, justify="right" if column in MASTERS else "left", no_wrap=True)
    ours: dict[str, dict[Setting, dict[str, float]]] = {}
    for master_dtype in ("bfloat16", "float32"):
        ours[master_dtype] = {
            setting: measure(worker, setting, seeds)
            for worker, group in workers(folder, settings, master_dtype)
            for setting in group
        }
    for setting in settings:
        for name, tolerance in TOLERANCE.items():
            published, mine = golden[setting][name], ours["bfloat16"][setting][name]
            within = abs(mine - published) <= tolerance
            conforms &= within
            table.add_row(
                f"{setting.reference} {setting.forget_edge} L{setting.layer} "
                f"c{setting.coefficient:g} lr{setting.learning_rate:g}",
                name,
                f"{published:.3f}",
                f"{mine:.3f}",
                f"{ours['float32'][setting][name]:.3f}",
                "ok" if within else f"[red]off by {abs(mine - published):.3f}[/red]",
            )
    console.print(table)
    bars = ", ".join(f"{name} {tolerance}" for name, tolerance in TOLERANCE.items())
    console.print(f"ROUGE-1, means of {seeds} seeds; bfloat16 is judged, within: {bars}")
    console.print("[green]conforms[/green]" if conforms else "[red]does not conform[/red]")
    sys.exit(0 if conforms else 1)


if __name__ == "__main__":
    with reporting_errors(debug=False):
        cyclopts.run(check)
