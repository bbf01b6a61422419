"""One trial, stage by stage: plain, as the published pipeline runs it, and as the engine does.

Covers: tiny, any model folder, or random weights of a named size; CPU or CUDA; both solvers; the
first trial with its captures and warm ones; scores compared row by row at equal token budgets; peak
memory; on CUDA the distance to the floor that operations and memory traffic set, both measured on
the spot. Plain is a fresh load and the steps of `lunar_tune.reference`; plain and engine take turns
in one process. No Ray.
Does not cover: whole searches (`bench_search`); quality of random weights, which know nothing.

    scripts/bench_trial.py --model FOLDER --data FILE --forget-edge A_B --json FILE
    scripts/bench_trial.py --size qwen2.5-7b --device cuda --memory-budget auto
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import cyclopts
import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from device_floor import Floor, measure_device, trial_floor
from random_weights import NEW_TOKENS, SIZES, random_model, random_options
from rich.console import Console
from rich.table import Table
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM

from lunar_tune import reference
from lunar_tune.cli.main import reporting_errors
from lunar_tune.config.options import NEVER, PUBLISHED_MAX_NEW_TOKENS, RunOptions
from lunar_tune.data.records import Record
from lunar_tune.errors import InputError
from lunar_tune.models.device import GIB, limit_threads
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.trial.assemble import answered, assemble, materialise
from lunar_tune.trial.worker import TrialResult, Worker

OWN = {"adamw": "learning_rate", "closed_form": "ridge"}
SOLVERS = tuple(OWN)  # the reference has these
FITS: dict[str, Callable[..., torch.Tensor]] = {
    "adamw": reference.fit_adamw,
    "closed_form": reference.fit_closed_form,
}
BEFORE = (1.2, 0.8, 1.1)  # a warm trial follows others, with so many times its coefficient
AUTO_BUDGET = 1.25  # of the weights


@dataclasses.dataclass(kw_only=True)
class PlainTrial:
    """Answers of a plain trial, and where its time went."""

    device: torch.device
    tokens: list[list[int]] = dataclasses.field(default_factory=list)
    """New tokens of each evaluated prompt, cut before the first end-of-sequence token."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note the seconds spent inside."""
        start = self._clock()
        yield
        self.seconds[name] = self._clock() - start

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def recalls(truths: Sequence[str], answers: Sequence[str]) -> tuple[list[float], list[float]]:
    """Return ROUGE-1 and ROUGE-L recall of each answer, by the package rouge_score."""
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(truth, answer) for truth, answer in zip(truths, answers, strict=True)]
    return (
        [float(score["rouge1"].recall) for score in scores],
        [float(score["rougeL"].recall) for score in scores],
    )


@dataclasses.dataclass(kw_only=True)
class Figures:
    """What was measured with one solver."""

    plain: list[PlainTrial] = dataclasses.field(default_factory=list)
    baseline: float = 0.0
    """Seconds of the base model's evaluation, once per worker."""
    first: dict[str, float] = dataclasses.field(default_factory=dict)
    warm: list[dict[str, float]] = dataclasses.field(default_factory=list)
    full: float | None = None
    """Seconds of a full evaluation after a fit, with the published token budget."""
    peak_gib: float | None = None
    budget: int = 0
    differing: dict[str, float] = dataclasses.field(default_factory=dict)
    """Share of rows whose ROUGE differs from the plain trial's, by token budget."""
    floor: Floor | None = None

    def seconds(self, stage: str) -> float:
        """Return the median of a warm trial's stage."""
        return median(trial[stage] for trial in self.warm)

    @property
    def plain_seconds(self) -> float | None:
        """Seconds of a plain trial, median."""
        return median(one.seconds["total"] for one in self.plain) if self.plain else None

    @property
    def ratio(self) -> float | None:
        """How many warm trials fit into a plain one."""
        plain = self.plain_seconds
        return None if plain is None else plain / self.seconds("trial")


class Bench:
    """One solver on one model.

    Args:
        options: Model and data.
        solver: adamw or closed_form.
        setting: Layer, coefficient and the solver's parameter.
        loaded: Random weights; None loads what the options name.
        build: Builds the same weights again, for plain trials.
    """

    def __init__(
        self,
        options: RunOptions,
        solver: str,
        setting: Mapping[str, Any],
        *,
        loaded: LoadedModel | None,
        build: Callable[[], Any] | None,
    ) -> None:
        options = dataclasses.replace(options, solver=solver)
        spec = materialise(answered(options, assemble(options)))
        # As in a search, but for random weights, whose answers all have the whole budget.
        exits = loaded is None
        self._spec = dataclasses.replace(spec, layers=(setting["layer"],), early_exit=exits)
        self._solver, self._setting = solver, dict(setting)
        self._loaded = loaded if loaded is not None else load_model(spec.model, spec.chat)
        self._build, self._random = build, loaded is not None
        self.figures = Figures()

    def begin(self) -> None:
        """Make the worker, evaluate the base model, run the first trial with its captures."""
        self._folder = tempfile.TemporaryDirectory()
        self._worker = self._new_worker()
        if self._loaded.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.figures.baseline = self._worker.baseline().seconds["trial"]
        self.figures.first = dict(self._worker.run(self._setting, bounded=False).seconds)

    def warm(self, repeats: int) -> TrialResult:
        """Time warm trials, each after some with other coefficients; return the last.

        A worker remembers what trials answered, so none is timed on a setting that it has seen.
        """
        for _ in range(repeats):
            drafts = self._worker.drafts
            self._worker = self._new_worker()
            self._worker.draft(drafts)
            for factor in BEFORE:
                coefficient = factor * self._setting["coefficient"]
                self._worker.run({**self._setting, "coefficient": coefficient}, bounded=False)
            result = self._worker.run(self._setting, bounded=False)
            self.figures.warm.append(dict(result.seconds))
        self.figures.budget = result.max_new_tokens
        return result

    def _new_worker(self) -> Worker:
        threads = torch.get_num_threads()
        worker = Worker(self._spec, self._loaded, cache_root=Path(self._folder.name))
        torch.set_num_threads(threads)  # it makes them one for a small model
        return worker

    def end(self) -> None:
        """Note the peak of memory; evaluate in full where that means something."""
        if self._loaded.device.type == "cuda":
            self.figures.peak_gib = torch.cuda.max_memory_allocated() / GIB
        if not self._random:
            self._full = self._worker.run(self._setting, full=True, bounded=False)
            self.figures.full = self._full.seconds["evaluate"]
        self._folder.cleanup()

    def plain(self) -> None:
        """Run one plain trial: a fresh load, the reference's steps in their order, scores."""
        trial, setting = PlainTrial(device=self._loaded.device), self._setting
        layer, data = setting["layer"], self._spec.data
        own = OWN[self._solver]
        fit = partial(FITS[self._solver], **{own: setting[own]})
        forget, retain = (self._prompts(one) for one in (data.fit_forget, data.fit_retain))
        declined = self._worker.encoder.prompts(data.reference_prompts)
        evaluated = [one for one in (data.forget, data.retain, data.factual) if one]
        questions = [self._prompts(one) for one in evaluated]
        with trial.stage("load"):
            model = self._fresh_model()
        with trial.stage("directions"):
            vector = reference.unlearning_vector(model, layer, declined, forget)
            shift = setting["coefficient"] * vector
        with trial.stage("activations"):
            inputs = [reference.mlp_inputs(model, layer, prompts) for prompts in (forget, retain)]
        with trial.stage("copy"):
            unlearned = copy.deepcopy(model)
        h = torch.cat(inputs)
        is_forget = torch.arange(len(h), device=h.device) < len(inputs[0])
        with trial.stage("fit"):
            reference.add_difference(unlearned, layer, fit(h, is_forget, shift))
        with trial.stage("generate"):
            for prompts in questions:
                trial.tokens += self._plain_answers(unlearned, prompts)
        with trial.stage("score"):
            texts = self._loaded.tokenizer.batch_decode(trial.tokens, skip_special_tokens=True)
            recalls([record.answer for one in evaluated for record in one], texts)
        trial.seconds["total"] = sum(trial.seconds.values())
        self.figures.plain.append(trial)

    def compare(self, result: TrialResult) -> None:
        """Compare rows with the plain trial's, cut to the budget that the engine had."""
        if not self.figures.plain:
            return
        self._differing(result)
        if not self._random:
            self._differing(self._full)

    def distance(self) -> None:
        """Compute the floor of a trial on this device."""
        if self._loaded.device.type == "cuda":
            device = measure_device(self._loaded.model.dtype)
            self.figures.floor = trial_floor(
                device, self._worker, self._setting["layer"], self._solver, self.figures.budget
            )

    def _differing(self, result: TrialResult) -> None:
        budget, rows = result.max_new_tokens, result.evaluation.rows
        tokens = [row[:budget] for row in self.figures.plain[-1].tokens]
        texts = self._loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        rouge1, rouge_l = recalls([row.truth for row in rows], texts)
        differ = [
            (row.rouge1, row.rouge_l) != pair
            for row, pair in zip(rows, zip(rouge1, rouge_l, strict=True), strict=True)
        ]
        self.figures.differing[f"{budget} tokens"] = sum(differ) / len(differ)

    def _prompts(self, records: Sequence[Record]) -> Sequence[Sequence[int]]:
        return self._worker.encoder.prompts([record.question for record in records])

    def _fresh_model(self) -> Any:
        if self._build is not None:
            return self._build()
        folder, dtype = self._spec.model.checkpoint, self._loaded.model.dtype
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.to(self._loaded.device).eval()

    def _plain_answers(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return answers; those of random weights end with their budget only."""
        return reference.greedy_answers(
            model,
            prompts,
            eos_ids=() if self._random else self._loaded.eos_ids,
            max_new_tokens=NEW_TOKENS if self._random else PUBLISHED_MAX_NEW_TOKENS,
        )


def bench(
    *,
    model: str = "tiny",
    size: str | None = None,
    solvers: str = ",".join(SOLVERS),
    data: str | None = None,
    forget_edge: str = "A_B",
    factual_data: str = "factual",
    reference_prompts: str = "unverifiable",
    layer: NonNegativeInt | None = None,
    coefficient: float = 2.0,
    learning_rate: float = 0.003,
    ridge: float = 0.1,
    device: str = "auto",
    dtype: str = "auto",
    threads: PositiveInt | None = None,
    repeats: PositiveInt = 5,
    plain_repeats: NonNegativeInt = 2,
    memory_budget: str | None = None,
    evaluation_rows: PositiveInt | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Time one trial, plain against engine.

    Args:
        model: Catalogue name, hub id or folder.
        size: Random weights of this size instead: qwen2.5-7b, small or rehearsal.
        solvers: With commas between.
        data: As in the search.
        forget_edge: As in the search.
        factual_data: As in the search.
        reference_prompts: As in the search.
        layer: Default: 0; random weights: middle.
        coefficient: Of both solvers.
        learning_rate: Of adamw.
        ridge: Of closed_form.
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        threads: Of torch, for both. Default: all cores.
        repeats: Warm trials that are timed.
        plain_repeats: Plain trials; 0 for none.
        memory_budget: GiB, or auto: weights and a quarter; runs once more.
        evaluation_rows: As in the search.
        json_file: Write the figures.
    """
    if size is not None and size not in SIZES:
        raise InputError(f"--size {size}: there are {', '.join(SIZES)}.")
    if unknown := {*solvers.split(",")} - {*SOLVERS}:
        raise InputError(f"--solvers {', '.join(unknown)}: there are {', '.join(SOLVERS)}.")
    console = Console()
    options = RunOptions(
        model=model,
        data=data,
        forget_edge=(forget_edge,),
        factual_data=factual_data,
        reference_prompts=reference_prompts,
        reference_check=NEVER,
        device=device,
        dtype=dtype,
        max_new_tokens=None if size is None else NEW_TOKENS,
        evaluation_rows=evaluation_rows,
    )
    loaded = build = None
    if size is not None:
        options = random_options(options)
        loaded, build = random_model(size, options)
    chosen = layer if layer is not None else 0 if loaded is None else loaded.n_layers // 2
    results = {}
    for solver in solvers.split(","):
        value = {"adamw": learning_rate, "closed_form": ridge}[solver]
        setting = {"layer": chosen, "coefficient": coefficient, OWN[solver]: value}
        one = Bench(options, solver, setting, loaded=loaded, build=build)
        result = _in_turns(one, repeats, plain_repeats, threads)
        one.compare(result)
        one.distance()
        results[solver] = one.figures
        _print(console, solver, setting, one.figures)
    under = None
    if memory_budget is not None and loaded is not None:
        setting = {"layer": chosen, "coefficient": coefficient, "ridge": ridge}
        under = _under_budget(options, loaded, setting, memory_budget)
        console.print(f"under a memory budget: {json.dumps(under)}", highlight=False)
    document = _document(results, under)
    console.print(
        f"identical scores: {document['identical_scores']}; "
        + ", ".join(f"{s} {document[f'ratio_{s}']}" for s in results),
        highlight=False,
    )
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1) + "\n")


def _in_turns(one: Bench, repeats: int, plain_repeats: int, threads: int | None) -> TrialResult:
    """Let engine and plain trials take turns, so that a busy machine is busy for both."""
    limit_threads(threads)
    one.begin()
    result = one.warm(repeats)
    for _ in range(plain_repeats):
        one.plain()
        result = one.warm(repeats)
    one.end()
    return result


def _under_budget(
    options: RunOptions, loaded: LoadedModel, setting: Mapping[str, Any], budget: str
) -> dict[str, Any]:
    """Run the closed form once more with less memory; return seconds and the peak."""
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / GIB
    gib = AUTO_BUDGET * weights if budget == "auto" else float(budget)
    limited = dataclasses.replace(options, memory_budget=gib)
    one = Bench(limited, "closed_form", setting, loaded=loaded, build=None)
    one.begin()
    one.warm(1)
    one.end()
    return {
        "budget_gib": round(gib, 2),
        "weights_gib": round(weights, 2),
        "peak_gib": one.figures.peak_gib,
        "trial": one.figures.seconds("trial"),
    }


STAGES: Sequence[tuple[str, tuple[str, ...], str]] = (
    ("load", ("load",), ""),
    ("directions, activations", ("directions", "activations"), "prepare"),
    ("copy of the model", ("copy",), ""),
    ("fit", ("fit",), "fit"),
    ("answers, scores", ("generate", "score"), "evaluate"),
    ("trial", ("total",), "trial"),
)


def _print(console: Console, solver: str, setting: Mapping[str, Any], figures: Figures) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (f"{solver}, seconds", "plain", "first", "warm", "plain / warm"):
        table.add_column(column, justify="left" if "," in column else "right")
    for name, plain, engine in STAGES:
        before = (
            median(sum(one.seconds[stage] for stage in plain) for one in figures.plain)
            if figures.plain
            else None
        )
        first = figures.first.get(engine) if engine else None
        warm = figures.seconds(engine) if engine else None
        ratio = before / warm if before and warm and warm > 1e-3 else None
        cells = (before, first, warm, ratio)
        table.add_row(name, *("-" if cell is None else f"{cell:.3g}" for cell in cells))
    where = ", ".join(f"{name} {value:g}" for name, value in setting.items())
    console.print(f"\n{where}; answers of up to {figures.budget} tokens", highlight=False)
    console.print(table)
    console.print(
        f"once per worker: the base model {figures.baseline:.2f} s"
        + (f"; full evaluation {figures.full:.2f} s" if figures.full is not None else "")
        + (f"; peak {figures.peak_gib:.1f} GiB" if figures.peak_gib is not None else ""),
        highlight=False,
    )
    for budget, share in figures.differing.items():
        console.print(f"rows that differ from plain at {budget}: {share:.1%}", highlight=False)
    if figures.floor is not None:
        floor = figures.floor
        console.print(
            f"floor {floor.seconds:.2f} s ({floor.describe()}); the trial takes "
            f"{figures.seconds('trial') / floor.seconds:.2f} times that",
            highlight=False,
        )


def _document(results: Mapping[str, Figures], under: dict[str, Any] | None) -> dict[str, Any]:
    shares = [share for figures in results.values() for share in figures.differing.values()]
    document: dict[str, Any] = {
        "identical_scores": not any(shares) if shares else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%d"),
        "under_memory_budget": under,
    }
    for solver, figures in results.items():
        ratio = figures.ratio
        document[f"ratio_{solver}"] = None if ratio is None else math.floor(ratio * 10) / 10
        document[solver] = {
            "plain": [one.seconds for one in figures.plain],
            "baseline": figures.baseline,
            "first": figures.first,
            "warm": figures.warm,
            "full_evaluation": figures.full,
            "differing": figures.differing,
            "peak_gib": figures.peak_gib,
            "floor": dataclasses.asdict(figures.floor) if figures.floor else None,
        }
    return document


if __name__ == "__main__":
    with reporting_errors(debug=False):
        cyclopts.run(bench)
