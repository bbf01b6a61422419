"""Records a surface: what a model answers at each setting of a grid, and how that scores.

Covers: any number of processes on one folder, of which no two take one setting; going on after a
kill; scoring again without the model, when a metric has changed. A folder holds `about.json`
(model, data, method, axes) and a file a setting: its parameters, seconds, scores that take the
model, and answers (rows of `ROW`): to all questions as a trial by ROUGE alone has them, and to the
forget questions as one has them that judges whether they decline.
Does not cover: what the surface says (`surfaces`), Ray, other machines.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from surfaces import Scores, Setting, Surface

from lunar_tune.config.options import READ_TOKENS, RunOptions
from lunar_tune.display import build_progress
from lunar_tune.errors import InputError, TrialError
from lunar_tune.files import safe_name, write_atomically
from lunar_tune.metrics.declining import judged_row, verdict_means
from lunar_tune.metrics.evaluate import AnswerRow, row_means
from lunar_tune.metrics.rouge import rouge_recall
from lunar_tune.models.fingerprint import identity_of
from lunar_tune.trial.spec import TrialSpec, read_prompts_of
from lunar_tune.trial.worker import Worker

ABOUT = "about.json"
BY_MODEL = ("forget_answer_log_prob", "forget_extraction_strength")
"""Metrics that answers alone do not give: one forward over the forget questions."""
BY_ANSWERS = ("forget_refused", "forget_degenerate")
ROW = ("set_name", "edge", "question", "truth", "answer", "ended", "typicality")
PASSING = ("date", "lunar_tune")  # what may differ between two recordings of one surface
DIGITS = 4


def record(spec: TrialSpec, axes: Mapping[str, Setting], folder: Path, console: Console) -> None:
    """Record the settings of a grid that nobody has recorded, or is recording.

    Raises:
        InputError: The folder holds the answers of something else.
    """
    metrics = (*BY_ANSWERS, *BY_MODEL)
    layers = tuple(map(int, axes["layer"]))  # what their trials need is captured in one sweep
    worker = Worker(dataclasses.replace(spec, early_exit=True, metrics=metrics, layers=layers))
    scores = worker.baseline().evaluation.scores  # its answers are the trials' drafts
    console.print(
        f"base model: forget {scores['forget_rouge1']:.3f}, retain {scores['retain_rouge1']:.3f}"
    )
    describe(folder, about(worker), axes)
    with build_progress(console) as bar:
        task = bar.add_task("recording", total=math.prod(map(len, axes.values())), note="")
        for file, parameters in unrecorded(folder, axes):
            bar.update(task, completed=len(list(folder.glob("*.json"))) - 1, note=file.stem)
            answers = json.dumps(answers_at(worker, parameters), ensure_ascii=False)
            write_atomically(file, answers.encode(errors="surrogatepass"))


def unrecorded(
    folder: Path, axes: Mapping[str, Setting]
) -> Iterator[tuple[Path, dict[str, int | float]]]:
    """Yield file and parameters of settings that no process has recorded; each is this one's.

    The first axis is gone along first, then the next: with the first values of the last one a
    recording that was left is whole.
    """
    for values in product(*reversed(list(axes.values()))):
        parameters = dict(zip(axes, reversed(values), strict=True))
        name = safe_name("-".join(f"{one}={value}" for one, value in parameters.items()))
        file = folder / f"{name}.json"
        # The system takes a lock back from a process that dies.
        with suppress(Timeout), FileLock(folder / f".{name}.lock", timeout=0):
            if not file.exists():
                yield file, parameters


def about(worker: Worker) -> dict[str, Any]:
    """Return what a recording is of, in plain words and digests."""
    spec, model = worker.spec, worker.loaded.model
    (number_format, weights), *_ = identity_of(worker.loaded, spec.chat).values()
    digests = spec.data.digests()
    return {
        "model": spec.model.name,
        "blocks": worker.loaded.n_layers,
        "weights": weights,
        "number_format": number_format,
        "data": spec.data.name,
        "forget_edge": ",".join(spec.data.forget_edges),
        "questions": {name: len(some) for name, some in spec.data.asked(full=False).items()},
        "reference_prompts": len(worker.reference_prompts),
        "digests": {name: digests[name][:16] for name in digests},
        "method": spec.method.name,
        "solver": spec.method.variant,
        "max_new_tokens": worker.judge.max_new_tokens,
        "whole_answers": max(READ_TOKENS, worker.judge.max_new_tokens),
        "seed": spec.seed,
        "device": str(model.device),
        "date": time.strftime("%Y-%m-%d"),
        "lunar_tune": version("lunar-tune"),
    }


def describe(folder: Path, found: Mapping[str, Any], axes: Mapping[str, Setting]) -> None:
    """Write what a folder is about; settings in it that are not on the axes are left alone.

    Raises:
        InputError: It is about something else.
    """
    file, before = folder / ABOUT, dict(found)
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))["surface"]
    wrong = [
        f"{part}: {before.get(part)}, not {value}"
        for part, value in found.items()
        if part not in PASSING and before.get(part) != value
    ]
    if wrong:
        raise InputError(
            f"--answers {folder}: was recorded for something else. {'; '.join(wrong)}. Name "
            "another folder."
        )
    document = {"surface": before, "axes": {name: list(axes[name]) for name in axes}}
    write_atomically(file, json.dumps(document, indent=1).encode())


def answers_at(worker: Worker, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answers and seconds of one trial, or why it failed."""
    try:
        result = worker.run(parameters, bounded=False)
    except TrialError as error:
        return {"parameters": dict(parameters), "failure": str(error)}
    rows = result.evaluation.rows
    whole = [row for row in rows if row.set_name == "forget"]
    prompts = worker.encoder.prompts([row.question for row in whole])
    tokens = [result.evaluation.tokens[row] for row in worker.activations.rows_of(prompts)]
    budget = worker.judge.max_new_tokens
    texts = worker.loaded.tokenizer.batch_decode(
        [list(answer[:budget]) for answer in tokens], skip_special_tokens=True
    )
    cut = [
        dataclasses.replace(row, answer=text, ended=len(answer) < budget, typicality=None)
        for row, text, answer in zip(whole, texts, tokens, strict=True)
    ]
    return {
        "parameters": dict(parameters),
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
        "scores": {name: result.evaluation.scores[name] for name in BY_MODEL},
        "rows": lists_of([*cut, *(row for row in rows if row.set_name != "forget")]),
        "whole": lists_of(whole),
    }


def recorded(folder: Path) -> Surface:
    """Return the surface that the answers of a folder make, by the metrics of today.

    Raises:
        InputError: Nothing was recorded in it.
    """
    file = folder / ABOUT
    if not file.exists():
        raise InputError(f"--answers {folder}: has no {ABOUT}, so nothing was recorded in it.")
    document = json.loads(file.read_text(encoding="utf-8"))
    axes = {name: tuple(sorted(values)) for name, values in document["axes"].items()}
    points = {}
    for one in folder.glob("*.json"):
        if one.name != ABOUT:
            answers = json.loads(one.read_text(encoding="utf-8", errors="surrogatepass"))
            points[tuple(answers["parameters"][name] for name in axes)] = scored(answers)
    surface = Surface(name=folder.name, about=document["surface"], axes=axes)
    ordered = {one: points[one] for one in surface.settings() if one in points}
    return dataclasses.replace(surface, points=ordered)


def scored(answers: Mapping[str, Any]) -> Scores:
    """Return the scores of one setting's answers, by the metrics of today."""
    if "failure" in answers:
        return {"failure": answers["failure"]}
    rows, whole = rows_of(answers["rows"]), rows_of(answers["whole"])
    refusals = read_prompts_of(RunOptions().refusals)
    judged = [judged_row(row, row.typicality or 0.0, refusals) for row in whole]
    means = row_means(rows, ("forget", "retain"))
    scores = {
        "forget": means["forget_rouge1"],
        "retain": means["retain_rouge1"],
        "seconds": answers["seconds"]["trial"],
        "forget_rouge1_se": means["forget_rouge1_se"],
        "retain_rouge1_se": means["retain_rouge1_se"],
        "forget_whole": row_means(whole, ("forget",))["forget_rouge1"],
        **verdict_means(judged),
        **answers["scores"],
    }
    return {name: round(value, DIGITS) for name, value in scores.items()}


def lists_of(rows: Sequence[AnswerRow]) -> list[list[Any]]:
    """Return answers as they are kept."""
    return [[getattr(row, name) for name in ROW] for row in rows]


def rows_of(lists: Sequence[Sequence[Any]]) -> list[AnswerRow]:
    """Return answers as they were, with today's ROUGE."""
    rows = []
    for values in lists:
        row = dict(zip(ROW, values, strict=True))
        recall = rouge_recall(row["truth"], row["answer"])
        rows.append(AnswerRow(**row, rouge1=recall.rouge1, rouge_l=recall.rouge_l))
    return rows
