"""Time and memory of every gradient method's fit, as a ratio to the first one's.

    python scripts/bench_methods.py                                # tiny, on this machine
    python scripts/bench_methods.py --size qwen2.5-7b --device cuda --methods ga,npo

Covers: seconds of a step (batches of 4 answers), of the reference model's numbers and of a look at
the model between two epochs; peak memory on a GPU. The first epoch warms up and is left out.
Does not cover: whole trials and LUNAR (`bench_trial`), what a method reaches (the table does that).
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from cyclopts import Parameter
from cyclopts.types import PositiveInt
from cyclopts.validators import Number
from random_weights import SIZES, random_model, random_options
from rich.console import Console
from rich.table import Table

from lunar_tune.cli.main import reporting_errors
from lunar_tune.config.options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.methods.contract import METHODS
from lunar_tune.models.device import GIB, TRAINED_BYTES, limit_threads, memory_needed
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.trial.assemble import assemble, materialise
from lunar_tune.trial.worker import Worker

ALL = tuple(sorted({*METHODS} - {"lunar"}))


@dataclass(frozen=True, slots=True)
class Figures:
    """What one method's fit takes."""

    method: str
    variant: str
    step: float
    """Seconds of a step: four answers to forget, and what else the loss asks for."""
    first_epoch: float
    """Seconds of the first epoch, with the reference's numbers and the adapter's making."""
    check: float
    """Seconds of a look at the model between two epochs."""
    peak_gib: float | None
    """Most memory that torch held on the GPU, weights included; None on a CPU."""
    estimate_gib: float
    """What a search asks of a GPU before it loads such a model."""


def measured(worker: Worker, parameters: dict[str, float], epochs: int) -> Figures:
    """Time a fit epoch by epoch."""
    method, device = worker.spec.method, worker.loaded.device
    prepared = worker.prepared
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    checks: list[float] = []
    start = clock(device)
    with prepared.unlearning(parameters, seed=0) as fit:
        for done in fit:
            times.append(clock(device) - start)
            if done == 1:
                before = clock(device)
                worker.judge.check(fit, done)
                checks.append(clock(device) - before)
            start = clock(device)
        fit.finish()
    steps = -(-len(worker.spec.data.fit_forget) // method.settings.batch_size)
    on_gpu, model = device.type == "cuda", worker.loaded.model
    each = TRAINED_BYTES if method.variant == "full" else model.dtype.itemsize
    return Figures(
        method=method.name,
        variant=method.variant,
        step=sum(times[1:]) / (steps * (epochs - 1)),
        first_epoch=times[0],
        check=checks[0],
        peak_gib=torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        estimate_gib=memory_needed(model.num_parameters(), each) / GIB,
    )


def clock(device: torch.device) -> float:
    """Return seconds, after all work on the device has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bench(
    *,
    model: str = "tiny",
    size: str | None = None,
    methods: str = ",".join(ALL),
    train: str = "lora",
    checkpointing: bool = False,
    epochs: Annotated[int, Parameter(validator=Number(gte=2))] = 3,
    device: str = "auto",
    threads: PositiveInt | None = None,
    evaluation_rows: PositiveInt | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Measure the fits, one after the other on one model.

    Args:
        model: Catalogue name, hub id or folder.
        size: Random weights of this size instead: qwen2.5-7b, small or rehearsal.
        methods: With commas between.
        train: lora or full.
        checkpointing: Compute activations again in the backward pass.
        epochs: The first one is left out.
        device: auto, cpu or cuda.
        threads: Of torch. Default: all cores.
        evaluation_rows: As in the search.
        json_file: Write the figures.
    """
    console = Console()
    base = RunOptions(
        model=model,
        device=device,
        method=methods.split(",", maxsplit=1)[0],
        fix=(f"trained={train}", f"epochs={epochs}", f"checkpointing={checkpointing}"),
        max_new_tokens=32,
        evaluation_rows=evaluation_rows,
        cache_limit=0,
    )
    if size is not None and size not in SIZES:
        raise InputError(f"--size {size}: there are {', '.join(SIZES)}.")
    options = random_options(base) if size is not None else base
    loaded = _model(options, size)
    rows = []
    for name in methods.split(","):
        spec = materialise(assemble(dataclasses.replace(options, method=name)))
        worker = Worker(dataclasses.replace(spec, early_exit=True), loaded)
        limit_threads(threads)
        rate = {"learning_rate": 1e-5}
        middle = {"layer": loaded.n_layers // 3, "coefficient": 6.5}
        rows.append(measured(worker, (middle if name == "rmu" else {}) | rate, epochs))
    _print(console, rows, loaded)
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def _model(options: RunOptions, size: str | None) -> LoadedModel:
    if size is None:
        spec = materialise(assemble(options))
        return load_model(spec.model, spec.chat)
    loaded, _ = random_model(size, options)
    # An answer ends with a token that has an embedding.
    return dataclasses.replace(loaded, eos_ids=(loaded.model.config.vocab_size - 1,))


def _print(console: Console, rows: list[Figures], loaded: LoadedModel) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "method",
        "step",
        "of the first",
        "first epoch",
        "a look",
        "peak GiB",
        "estimate",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        cells: list[Any] = [
            f"{row.method} ({row.variant})",
            f"{1000 * row.step:.1f} ms",
            f"{row.step / rows[0].step:.2f}",
            f"{row.first_epoch:.2f} s",
            f"{row.check:.2f} s",
            "-" if row.peak_gib is None else f"{row.peak_gib:.1f}",
            f"{row.estimate_gib:.1f}",
        ]
        table.add_row(*cells)
    console.print(table)
    console.print(
        f"{loaded.model.num_parameters() / 1e6:.0f} million parameters, {loaded.model.dtype}, "
        f"{loaded.device}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        highlight=False,
    )


if __name__ == "__main__":
    with reporting_errors(debug=False):
        cyclopts.run(bench)
