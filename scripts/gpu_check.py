"""Checks all that needs a GPU, in at most eight minutes, for the day one can be had.

Covers: the tests marked gpu; a search on CUDA against its scores on a CPU; a trial and the steps of
gradient methods at the size of Qwen2.5-7B, with random weights; memory, estimated and measured; a
search on Ray. Each section has a process and a time limit of its own; what fails, fails alone.
After each one everything is written to one JSON, and docs/benchmarks.md has a section made of it.
Does not cover: what a machine without network needs before (`gpu_prepare`).

    scripts/gpu_check                                # a machine with a GPU
    scripts/gpu_check --rehearse                     # the same code on a CPU, at a small size
    scripts/gpu_check --section gpu_check.json [--into docs/benchmarks.md]
    scripts/gpu_check --prepare FOLDER               # for a machine without network
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter
from gpu_prepare import prepare
from gpu_report import into_page, section_of
from gpu_sections import SECTIONS, Plan

from lunar_tune.cli.main import reporting_errors
from lunar_tune.errors import InputError
from lunar_tune.files import cache_dir

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "numpy", "ray", "optuna", "mlflow")


def held(device: str) -> dict[str, float]:
    """Return GiB that this process held at most: of the GPU, or of the host for a CPU."""
    if device != "cuda":
        return {"measured_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {
        "measured_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "used_gib": (total - free) / 2**30,
        "total_gib": total / 2**30,
    }


def run_section(name: str, plan: Plan, limit: float) -> dict[str, Any]:
    """Run a section in a process of its own; return its state, seconds, figures and memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(name, plan, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    outcome: dict[str, Any] = {"state": "failed", "reason": f"took more than {limit:.0f} s"}
    try:
        if receiver.poll(limit):
            outcome = receiver.recv()
    except EOFError:
        process.join()
        outcome["reason"] = f"its process ended with exit code {process.exitcode}"
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started ends with it
            os.killpg(int(process.pid or 0), signal.SIGKILL)
        process.kill()
        process.join()
    return outcome | {"seconds": round(time.perf_counter() - start, 1)}


def _in_process(name: str, plan: Plan, sender: Connection) -> None:
    os.setsid()
    try:
        figures = SECTIONS[name].run(plan)
        problem = figures.pop("problem", None)
        memory = held(plan.device)
        outcome = {"state": "ok", "figures": figures, "memory": memory}
        if problem is not None:
            outcome |= {"state": "failed", "reason": problem}
        if "estimate_gib" in figures:
            memory["ratio"] = memory["measured_gib"] / figures["estimate_gib"]
    except BaseException as error:
        traceback.print_exc()
        outcome = {"state": "failed", "reason": f"{type(error).__name__}: {error}"[:600]}
    sender.send(outcome)


def header(plan: Plan) -> dict[str, Any]:
    """Say when, on what and with which versions."""
    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    on_gpu = plan.device == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if on_gpu else "a CPU",
        "rehearsal": not on_gpu,
        "size": plan.size,
        "cores": os.cpu_count(),
        "versions": versions,
    }


def check_all(plan: Plan, names: tuple[str, ...], minutes: float, json_file: Path) -> bool:
    """Run sections one after another; write the JSON after each; say whether all are well.

    Sections that an earlier run wrote into the same file stay.
    """
    deadline = time.monotonic() + 60 * minutes
    done = json.loads(json_file.read_text(encoding="utf-8")) if json_file.is_file() else {}
    sections = done.get("sections", {})
    document = header(plan) | {"sections": sections}
    for name in names:
        left = deadline - time.monotonic()
        print(f"--- {name}", flush=True)
        outcome = {"state": "failed", "reason": f"the {minutes:g} minutes were over", "seconds": 0}
        if left > 0:
            outcome = run_section(name, plan, min(plan.patience * SECTIONS[name].limit, left))
        sections[name] = outcome
        print(f"--- {name}: {outcome['state']} {outcome.get('reason', '')}", flush=True)
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(section_of(document))
    return all(sections[name]["state"] == "ok" for name in names)


def bring_tiny(folder: Path) -> None:
    """Put the tiny model that was built elsewhere where this machine's versions look for it."""
    from lunar_tune.finetuning.tiny import TinyRecipe, TinyText, tiny_key

    place = cache_dir() / "models" / f"tiny-{tiny_key(TinyRecipe(), TinyText.shipped())}"
    if not place.is_dir():
        shutil.copytree(folder / "tiny", place)


app = cyclopts.App(name="gpu_check", help_format="plaintext")
app.command(prepare, name="--prepare")
JsonFile = Annotated[Path, Parameter(name="--json")]


@app.default
def check(
    *,
    only: str = ",".join(SECTIONS),
    brought: Path | None = None,
    minutes: float = 8,
    json_file: JsonFile = Path("gpu_check.json"),
) -> int:
    """Check all sections on this machine's GPU; exit code 1 where one failed.

    Args:
        only: Sections, with commas between.
        brought: Folder with what --prepare made. Default: tiny instead of SmolLM2.
        minutes: In all.
        json_file: Written after each section; what it has already stays.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            f"gpu_check: torch {torch.__version__} sees no GPU here. Use a machine that has one, "
            "or --rehearse, which runs the same on a CPU."
        )
    return _check(Plan(brought=brought), only, minutes, json_file)


@app.command(name="--rehearse")
def rehearse(
    *,
    only: str = ",".join(SECTIONS),
    brought: Path | None = None,
    minutes: float = 30,
    json_file: JsonFile = Path("gpu_rehearsal.json"),
) -> int:
    """Run the same on a CPU, with random weights of a few million parameters.

    Args:
        only: As without --rehearse.
        brought: As without --rehearse.
        minutes: As without --rehearse.
        json_file: As without --rehearse.
    """
    plan = Plan(
        device="cpu", size="rehearsal", threads=1, evaluation_rows=16, patience=10, brought=brought
    )
    return _check(plan, only, minutes, json_file)


def _check(plan: Plan, only: str, minutes: float, json_file: Path) -> int:
    names = tuple(only.split(","))
    if unknown := [name for name in names if name not in SECTIONS]:
        raise InputError(f"--only {', '.join(unknown)}: there are {', '.join(SECTIONS)}.")
    if plan.brought is not None:
        bring_tiny(plan.brought)
    return 0 if check_all(plan, names, minutes, json_file) else 1


@app.command(name="--section")
def section(file: Path, *, into: Path | None = None) -> None:
    """Print the section of docs/benchmarks.md, or put it between its marks.

    Args:
        file: JSON of a check or a rehearsal.
        into: The page.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        text = section_of(document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--section {file}: is no JSON of gpu_check ({error}).") from error
    if into is None:
        print(text)
    else:
        into_page(text, into)


if __name__ == "__main__":
    with reporting_errors(debug=False):
        raise SystemExit(app())
