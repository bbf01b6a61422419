"""What `gpu_check` runs: each section a function of the plan that returns its figures.

A figure `problem` says why a section failed all the same; `estimate_gib` is held against the memory
that its process was seen to hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from lunar_tune.files import cache_dir

__all__ = ["SECTIONS", "Plan", "Section", "searched", "smollm2_options"]

ROOT = Path(__file__).resolve().parents[1]
TRIALS = 6  # of a search whose scores are compared
# A trial on SmolLM2 takes some 15 s of one core, and forget ROUGE-1 goes from 1 to 0 within these.
SETTINGS: dict[str, Any] = {
    "solver": "closed_form",
    "sampler": "random",  # proposes the same whatever the scores are
    "start_from": ("none",),
    "factual_data": "none",
    "seed": 0,
}
MIDDLE: dict[str, Any] = {"coefficient": 2.0, "ridge": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is checked, and on what."""

    device: str = "cuda"
    size: str = "qwen2.5-7b"
    """Of the random weights."""
    threads: int | None = None
    """Of torch, for the random weights. Default: all cores."""
    evaluation_rows: int | None = None
    """Of each set that the random weights are asked."""
    patience: float = 1
    """How many times its limit a section may take."""
    brought: Path | None = None
    """Folder with what was prepared elsewhere: tiny, and SmolLM2's data and scores on a CPU."""


def tests(plan: Plan) -> dict[str, Any]:
    """Run the tests marked gpu; a warning of another library version ends none."""
    import pytest

    os.environ["LUNAR_TUNE_GPU_TESTS_ON"] = plan.device
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a machine may have any
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-W", "default", "-p", "xdist.plugin", f"--junitxml={report}"]
        pytest.main([str(ROOT / "tests" / "gpu"), "-m", "gpu", f"--rootdir={ROOT}", *options])
        cases = [*ET.parse(report).iter("testcase")]  # noqa: S314  # pytest has just written it
    ended = {
        kind: [str(case.get("name")) for case in cases if case.find(kind) is not None]
        for kind in ("failure", "error", "skipped")
    }
    bad = [name for names in ended.values() for name in names]
    figures = {"tests": len(cases), "passed": len(cases) - len(bad), **ended}
    if bad or not cases:
        figures["problem"] = f"{len(bad)} of {len(cases)} tests did not pass: {', '.join(bad)}"
    return figures


def memory(plan: Plan, *, limited: bool = False) -> dict[str, Any]:
    """Evaluate the base model and run a trial; with a quarter beside the weights, if limited.

    A trial's batches grow with what is free, so that without a limit it takes far more.
    """
    from bench_trial import AUTO_BUDGET, Bench
    from random_weights import NEW_TOKENS, random_model, random_options

    from lunar_tune.config.options import RunOptions
    from lunar_tune.models.device import GIB, limit_threads, memory_needed

    limit_threads(plan.threads)
    told = RunOptions(
        device=plan.device, max_new_tokens=NEW_TOKENS, evaluation_rows=plan.evaluation_rows
    )
    options = random_options(told)
    loaded, _ = random_model(plan.size, options)
    parameters = loaded.model.num_parameters()
    weights = parameters * loaded.model.dtype.itemsize
    budget = AUTO_BUDGET * weights / GIB if limited else None
    options = dataclasses.replace(options, memory_budget=budget)
    setting = {"layer": loaded.n_layers // 2, **MIDDLE}
    one = Bench(options, "closed_form", setting, loaded=loaded, build=None)
    one.begin()
    one.end()
    return {
        "parameters": parameters,
        "weights_gib": weights / GIB,
        "budget_gib": budget,
        "estimate_gib": memory_needed(parameters, loaded.model.dtype.itemsize) / GIB,
        "base_model_seconds": one.figures.baseline,
        "first_trial_seconds": one.figures.first["trial"],
    }


def memory_budget(plan: Plan) -> dict[str, Any]:
    """Do the same with a budget."""
    return memory(plan, limited=True)


def search(plan: Plan) -> dict[str, Any]:
    """Search in this process, in two number formats, and compare with the scores on a CPU."""
    if plan.brought is None:
        options: dict[str, Any] = {"model": "tiny"}
        expected = searched(options, device="cpu", dtype="float32")
    else:
        options = smollm2_options(plan.brought)
        expected = json.loads((plan.brought / "scores.json").read_text(encoding="utf-8"))
    figures: dict[str, Any] = {"model": Path(options["model"]).name}
    for dtype in ("float32", "bfloat16"):
        found = searched(options, device=plan.device, dtype=dtype)
        figures[dtype] = compared(found, expected)
    return figures


def smollm2_options(folder: Path) -> dict[str, Any]:
    """Return the options of a search on SmolLM2 with the data in a folder."""
    return {
        "model": str(cache_dir() / "models" / "smollm2-135m"),
        "data": str(folder / "pairs.json"),
        "reference_prompts": str(folder / "declined.json"),
        "forget_edge": json.loads((folder / "forget.json").read_text(encoding="utf-8")),
    }


def searched(options: Mapping[str, Any], *, device: str, dtype: str) -> dict[str, Any]:
    """Run a search in this process; return its best setting and each trial with its answers."""
    import lunar_tune as lt

    with tempfile.TemporaryDirectory() as folder:
        where: dict[str, Any] = {"device": device, "dtype": dtype, "output": Path(folder)}
        start = time.perf_counter()
        found = lt.search(
            **SETTINGS, **options, **where, num_trials=TRIALS, cache_limit=0, quiet=True
        )
        seconds = time.perf_counter() - start
        trials = [
            {
                "parameters": dict(row.parameters),
                "forget": row.scores["forget_rouge1"],
                "retain": row.scores["retain_rouge1"],
                "seconds": row.seconds["trial"],
                "answers": [one.answer for one in found.answer_rows(row.number)],
            }
            for row in found.rows
        ]
        best = None if found.best is None else found.best.number
    return {"seconds": seconds, "best": best, "trials": trials}


def compared(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Hold a search against another with the same settings; where they differ, say how far."""
    pairs = [*zip(found["trials"], expected["trials"], strict=True)]
    answers = [
        pair for new, old in pairs for pair in zip(new["answers"], old["answers"], strict=True)
    ]
    figures = {
        "trials": len(pairs),
        "forget": [[old["forget"], new["forget"]] for new, old in pairs],
        "retain": [[old["retain"], new["retain"]] for new, old in pairs],
        "answers": len(answers),
        "answers_that_differ": sum(new != old for new, old in answers),
        "best": [expected["best"], found["best"]],
        "seconds": [expected["seconds"], found["seconds"]],
        "seconds_of_trials": [sum(one[i]["seconds"] for one in pairs) for i in (1, 0)],
    }
    if any(new["parameters"] != old["parameters"] for new, old in pairs):
        figures["problem"] = "the two searches tried other settings"
    return figures


def trial_closed_form(plan: Plan) -> dict[str, Any]:
    """Time a trial in closed form, plain against engine."""
    return _trial(plan, "closed_form")


def trial_adamw(plan: Plan) -> dict[str, Any]:
    """Time a trial with AdamW; plain differs from that in closed form in its fit alone."""
    return _trial(plan, "adamw", plain_repeats=0)


def _trial(plan: Plan, solver: str, *, plain_repeats: int = 1) -> dict[str, Any]:
    from bench_trial import bench

    with _json_file() as file:
        bench(
            size=plan.size,
            solvers=solver,
            device=plan.device,
            threads=plan.threads,
            evaluation_rows=plan.evaluation_rows,
            repeats=1,
            plain_repeats=plain_repeats,
            json_file=file,
        )
        document = json.loads(file.read_text(encoding="utf-8"))
    figures: dict[str, Any] = document[solver] | {"ratio": document[f"ratio_{solver}"]}
    return figures


def steps(plan: Plan) -> dict[str, Any]:
    """Time steps of GA and NPO with an adapter."""
    return _steps(plan, "ga,npo", "lora")


def steps_full(plan: Plan) -> dict[str, Any]:
    """Time steps of GA with all weights trained."""
    return _steps(plan, "ga", "full")


def _steps(plan: Plan, methods: str, train: str) -> dict[str, Any]:
    from bench_methods import bench

    with _json_file() as file:
        bench(
            size=plan.size,
            methods=methods,
            train=train,
            epochs=2,
            device=plan.device,
            threads=plan.threads,
            evaluation_rows=plan.evaluation_rows,
            json_file=file,
        )
        rows = json.loads(file.read_text(encoding="utf-8"))
    return {"rows": rows, "estimate_gib": rows[-1]["estimate_gib"]}


@contextlib.contextmanager
def _json_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "figures.json"


def ray(plan: Plan) -> dict[str, Any]:
    """Search on Ray with two trials at once, which share a GPU if there is one."""
    import lunar_tune as lt

    share = 0.5 if plan.device == "cuda" else None
    with tempfile.TemporaryDirectory() as folder:
        found = lt.search(
            model="tiny",
            backend="ray",
            gpus_per_trial=share,
            num_trials=2,
            concurrency=2,
            output=Path(folder),
        )
        return {"states": [row.state for row in found.rows], "confirmed": found.best is not None}


@dataclasses.dataclass(frozen=True)
class Section:
    """Something to check, and the seconds that it may take."""

    run: Callable[[Plan], dict[str, Any]]
    limit: float


# In order of worth: a run that has to end early has begun with the first. Limits are about one and
# a half times what is expected of a GPU with 140 GiB; nothing of it has been measured.
SECTIONS = {
    section.run.__name__: section
    for section in (
        Section(tests, 150),
        Section(memory, 45),
        Section(memory_budget, 45),
        Section(search, 60),
        Section(trial_closed_form, 140),
        Section(trial_adamw, 75),
        Section(steps, 45),
        Section(steps_full, 45),
        Section(ray, 45),
    )
}
