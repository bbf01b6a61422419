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

import torch
import typer
from random_weights import SIZES, random_model, random_options
from rich.console import Console
from rich.table import Table

from lunar_tune.config.decoding_settings import DecodingSettings
from lunar_tune.config.gradient_settings import GradientSettings
from lunar_tune.config.run_options import EngineSettings, RunOptions
from lunar_tune.methods.objectives import OBJECTIVES
from lunar_tune.models.device import limit_threads
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.trial.assemble import assemble, materialise
from lunar_tune.trial.worker import Worker

ALL = (*OBJECTIVES, "rmu")


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


def measured(worker: Worker, parameters: dict[str, float], epochs: int) -> Figures:
    """Time a fit epoch by epoch."""
    method, device = worker.spec.method, worker.loaded.device
    preparation = worker.preparation
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    checks: list[float] = []
    start = clock(device)
    with preparation.unlearning(parameters, seed=0) as fit:
        for done in fit:
            times.append(clock(device) - start)
            if done == 1:
                before = clock(device)
                worker.judge.check(fit, done)
                checks.append(clock(device) - before)
            start = clock(device)
        fit.finished()
    steps = -(-len(worker.spec.data.fit_forget) // method.settings.batch_size)  # type: ignore[attr-defined]
    on_gpu = device.type == "cuda"
    return Figures(
        method=method.name,
        variant=method.variant,
        step=sum(times[1:]) / (steps * (epochs - 1)),
        first_epoch=times[0],
        check=checks[0],
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    )


def clock(device: torch.device) -> float:
    """Return seconds, after all work on the device has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bench(  # noqa: PLR0917 options of a command
    model: Annotated[str, typer.Option(help="Catalogue name, hub id or folder.")] = "tiny",
    size: Annotated[
        str | None, typer.Option(help=f"Random weights instead: {', '.join(SIZES)}.")
    ] = None,
    methods: Annotated[str, typer.Option(help="With commas between.")] = ",".join(ALL),
    train: Annotated[str, typer.Option(help="lora or full.")] = "lora",
    checkpointing: Annotated[bool, typer.Option("--checkpointing")] = False,
    epochs: Annotated[int, typer.Option(min=2, help="The first one is left out.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Of torch. Default: all cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Measure the fits, one after the other on one model."""
    console = Console()
    settings = GradientSettings(trained=train, epochs=epochs, checkpointing=checkpointing)
    base = RunOptions(
        model=model,
        device=device,
        gradient=settings,
        decoding=DecodingSettings(max_new_tokens=32),
        engine=EngineSettings(early_exit=True, cache_limit=0),
    )
    if size is not None and size not in SIZES:
        raise typer.BadParameter(f"{size}: there are {', '.join(SIZES)}")
    options = random_options(base) if size is not None else base
    loaded = _model(options, size)
    rows = []
    for name in methods.split(","):
        spec = materialise(assemble(dataclasses.replace(options, method=name)))
        worker = Worker(spec, loaded)
        limit_threads(threads)
        rate = {"learning_rate": 1e-5}
        middle = {"layer": loaded.n_layers // 3, "coefficient": 6.5}
        rows.append(measured(worker, (middle if name == "rmu" else {}) | rate, epochs))
    _print(console, rows, loaded)
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def _model(options: RunOptions, size: str | None) -> LoadedModel:
    if size is None:
        return load_model(materialise(assemble(options)).model)
    loaded, _ = random_model(size, options)
    # An answer ends with a token that has an embedding.
    return dataclasses.replace(loaded, eos_ids=(loaded.model.config.vocab_size - 1,))


def _print(console: Console, rows: list[Figures], loaded: LoadedModel) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "step", "of the first", "first epoch", "a look", "peak GiB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        cells: list[Any] = [
            f"{row.method} ({row.variant})",
            f"{1000 * row.step:.1f} ms",
            f"{row.step / rows[0].step:.2f}",
            f"{row.first_epoch:.2f} s",
            f"{row.check:.2f} s",
            "-" if row.peak_gib is None else f"{row.peak_gib:.1f}",
        ]
        table.add_row(*cells)
    console.print(table)
    console.print(
        f"{loaded.n_parameters / 1e6:.0f} million parameters, {loaded.model.dtype}, "
        f"{loaded.device}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(bench)
