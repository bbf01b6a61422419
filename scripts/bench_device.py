"""One trial at a model's full size with random weights: seconds and peak memory, stage by stage.

Covers: building the model on the device, the capture sweep, a fit by each solver, an evaluation of
the shipped contracts set (20 forget, 380 retain, 81 factual questions, 32 new tokens each), CPU or
CUDA, without Ray and without a download: prompts are encoded with the tiny model's tokenizer.
Does not cover: quality; random weights know nothing.

    scripts/bench_device.py --size qwen2.5-7b --device cuda --json FILE
    scripts/bench_device.py --size small --device cpu
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from lunar_tune.evaluation.settings import DecodingSettings
from lunar_tune.finetuning.tiny import ensure_tiny
from lunar_tune.methods.lunar_settings import SOLVERS, LunarSettings
from lunar_tune.models.layout import layout_of
from lunar_tune.models.loading import LoadedModel
from lunar_tune.runtime import resolve_device, resolve_dtype
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.options import RunOptions
from lunar_tune.trial.worker import Worker

# Sizes of Qwen2.5-7B: its config.json on the hub.
SIZES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
}
NEW_TOKENS = 32
SETTINGS = {
    "adamw": {"coefficient": 2.0, "learning_rate": 0.01},
    "closed_form": {"coefficient": 2.0, "ridge": 0.01},
}


def random_model(size: str, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Return a model of the given sizes with random weights; nothing is read or written."""
    tokenizer = AutoTokenizer.from_pretrained(ensure_tiny())
    config = Qwen2Config(**SIZES[size], tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.eval().requires_grad_(requires_grad=False)
    spec = assemble(RunOptions(device=device.type)).model
    end = SIZES[size]["vocab_size"] - 1  # hardly ever the likeliest: every row is decoded in full
    return LoadedModel(
        spec=spec,
        model=model,
        tokenizer=tokenizer,
        layout=layout_of(config),
        eos_ids=(end,),
        pad_id=0,
    )


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float, float | None]:
    """Return what the work returns, its seconds, and the peak of device memory in GiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return result, seconds, peak


def bench(
    size: Annotated[str, typer.Option(help=f"Model size: {', '.join(SIZES)}.")] = "small",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    layer: Annotated[int | None, typer.Option(help="Block to edit; default: the middle.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Time one trial with random weights at a model's full size."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size}: there are {', '.join(SIZES)}")
    place = resolve_device(device)
    rows: list[dict[str, Any]] = []

    def stage(name: str, work: Callable[[], Any]) -> Any:
        result, seconds, peak = timed(place, work)
        rows.append({"stage": name, "seconds": seconds, "peak_gib": peak})
        return result

    loaded = stage("build", lambda: random_model(size, place, resolve_dtype(dtype, place)))
    chosen = loaded.n_layers // 2 if layer is None else layer
    for solver in SOLVERS:
        options = RunOptions(
            data="contracts",
            device=place.type,
            lunar=LunarSettings(solver=solver),
            decoding=DecodingSettings(max_new_tokens=NEW_TOKENS),
        )
        worker = Worker(assemble(options), loaded)
        stage(f"capture ({solver})", partial(getattr, worker, "preparation"))
        for run in ("first", "second"):
            parameters = {"layer": chosen, **SETTINGS[solver]}
            result = stage(f"{run} trial ({solver})", partial(worker.run, parameters))
            rows[-1] |= {name: result.seconds[name] for name in ("fit", "evaluate")}
    table = Table("stage", "seconds", "fit", "evaluate", "peak GiB", box=None, pad_edge=False)
    for row in rows:
        cells = (row["seconds"], row.get("fit"), row.get("evaluate"), row["peak_gib"])
        table.add_row(row["stage"], *("-" if c is None else f"{c:.2f}" for c in cells))
    console = Console()
    name = torch.cuda.get_device_name() if place.type == "cuda" else "CPU"
    console.print(
        f"{size}, {loaded.model.dtype}, {name}, torch {torch.__version__}, layer {chosen}"
    )
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(bench)
