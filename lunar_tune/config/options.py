"""Options of a single run and of a search: model, data, method, answers, space, places."""

from __future__ import annotations

import functools
import math
import os
import shlex
import urllib.parse
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunar_tune.config.fields import (
    check_values,
    flag_of,
    option,
    options_again,
    options_of,
    permissions_in,
    same_option,
)
from lunar_tune.display import Concise
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import is_plain
from lunar_tune.secrets import without_password

NONE, OWN, TINY = "none", "own", "tiny"
OWN_QUESTIONS = "general"  # what a model is asked where nothing else is named
COLLECTED_TOKENS = 24  # of an answer that becomes data: a sentence that names a fact ends within
ENGINES = ("fast", "plain", "reference")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ROUGE_TOKENIZERS = ("default", "words")
DECLINED, REPORT, NEVER = "declined", "report", "never"
REFERENCE_CHECKS = (DECLINED, REPORT, NEVER)
LARGEST_SEED = 2**32 - 1  # what numpy takes, and Optuna's samplers with it
LEAST_BUDGET = 32  # tokens, where the budget follows the true answers
READ_TOKENS = 128  # of answers that may decline: SmolLM2-135M-Instruct needs 44 to 111 for that
PUBLISHED_MAX_NEW_TOKENS = 512  # config/forget.yaml of the published code at dfa56eb
MODEL, DATA, METHOD, ANSWERS, MEMORY = "Model", "Data", "Method", "Answers", "Memory and speed"
model_option = functools.partial(option, group=MODEL)
data_option = functools.partial(option, group=DATA)
method_option = functools.partial(option, group=METHOD)
answer_option = functools.partial(option, group=ANSWERS)
memory_option = functools.partial(option, group=MEMORY)


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelOptions(Concise):
    """Which model, loaded and asked how."""

    model: str = model_option(TINY, common=True, resume=True, place=True)
    """Catalogue name, hub id (owner/name[@revision]) or folder."""
    model_path: str | None = model_option(None, metavar="DIR", common=True, resume=True, place=True)
    """Folder of a fine-tuned checkpoint or of a PEFT adapter."""
    dtype: str = model_option("auto", choices=DTYPES, decides=True)
    """Number format of the weights; auto is bfloat16 on a GPU and on a CPU that is fast in it (AMX,
    AMD's AVX-512) or short of memory, else float32; a search keeps its first worker's choice."""
    device: str = model_option("auto", resume=True)
    """auto, cpu or cuda."""
    chat_template: str = model_option(OWN, metavar="own|published|FILE", resume=True, place=True)
    """own (the tokenizer's), published (the published code's bare user turn), published-eval (the
    same, but questions are asked with two BOS tokens, where the model has one, as that code's
    evaluation asks Llama 3 and Gemma) or a Jinja file."""
    system_prompt: str | None = model_option(None)
    """System turn before each question; without it the template decides."""
    trust_remote_code: bool = model_option(False, resume=True, permission=True)
    """Let Python code that comes with the checkpoint run."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DataOptions(Concise):
    """What is to be forgotten, what is to be kept, and how that is judged."""

    data: str | None = data_option(None, common=True, resume=True, place=True)
    """Pairs, a name or a file. Default: what the model was taught (unrecorded: contracts), else its
    own answers."""
    edge: str | None = data_option(None)
    """Edge of all rows of the data that have none."""
    forget_edge: tuple[str, ...] = data_option((), metavar="EDGE,…", common=True)
    """Edges or groups to forget. Default: A_B, author_1 or chemical_symbols."""
    factual_data: str | None = data_option(None, resume=True, place=True)
    """General knowledge: factual, a file, or none. Default: factual, with the data general none."""
    reference_prompts: str | None = data_option(None, resume=True, place=True)
    """Prompts that the model declines: unverifiable, harmful, private, or a file. Default:
    unverifiable, with the data general private."""
    reference_check: str = data_option(
        DECLINED, choices=REFERENCE_CHECKS, decides=True, before=NEVER
    )
    """Whether the base model is asked the reference prompts first: declined (only those that it
    declines make the direction), report (all do, as in the published code) or never."""
    refusals: str = data_option("refusals", resume=True, place=True)
    """Answers that decline, which dpo prefers, and which say what declining is: refusals, or a
    file with one a line."""
    retain_data: str | None = data_option(None, resume=True, place=True)
    """Retain set of the fit, a file. Default: all other edges."""
    retain_rows: int | None = data_option(None, least=1)
    """Size of the retain sample, drawn by edge, that trials are judged on. Default: all rows."""
    evaluation_rows: int | None = data_option(None, least=1)
    """Evaluate only the first so many rows of each set (the published code: 200). Default: all."""
    holdout: bool = data_option(False)
    """Judge trials on one half of every edge, and report on the other half, on which nothing is
    tuned."""
    text: bool = data_option(True)
    """Whether files, MLflow and messages hold questions and answers; with --no-text they hold row
    numbers and scores only. Saved models and cached activations are not affected."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RunOptions(ModelOptions, DataOptions):
    """Everything that a single run is told, except its setting."""

    method: str = method_option("lunar", common=True)
    """Unlearning method, for example lunar or npo; a wrong name lists all."""
    solver: str | None = method_option(None, common=True)
    """How lunar fits, for example closed_form. Default: adamw."""
    fix: tuple[str, ...] = method_option((), metavar="NAME=VALUE", common=True, decides=True)
    """Fix parameters or settings of the method: layer=22, rank=16, trained=full."""
    seed: int = method_option(0, least=0, most=LARGEST_SEED, common=True, decides=True)
    """Random seed."""
    max_new_tokens: int | None = answer_option(PUBLISHED_MAX_NEW_TOKENS, least=1, decides=True)
    """Token budget of an answer."""
    rouge_tokenizer: str = answer_option("default", choices=ROUGE_TOKENIZERS, decides=True)
    """Words that ROUGE counts: default (a-z and digits, stemmed) or words (every script)."""
    metrics: tuple[str, ...] = answer_option((), metavar="METRIC,…", commas=True)
    """Scores to report beside ROUGE, for example forget_mrr,retain_mrr; a wrong name lists all."""
    embedding_model: str | None = answer_option(None, resume=True, place=True)
    """Sentence-embedding model, hub id or folder, in which answers are compared with refusals.
    Default: the model's own states."""
    engine: str = memory_option("fast", choices=ENGINES, resume=True)
    """fast (what trials share is computed once), plain (every answer from its first token on) or,
    for a single run, reference (lunar_tune/reference.py). All give the same answers, up to
    rounding."""
    memory_budget: float | None = memory_option(None, metavar="GIB", above=0, resume=True)
    """GiB of GPU memory for weights, activations and batches. Default: all that is free."""
    cache_limit: float | None = memory_option(None, metavar="GIB", least=0, resume=True)
    """GiB of disk space for cached activations; 0 keeps none. Default: a quarter of the free space,
    at most 100."""


def read_assignments(texts: tuple[str, ...]) -> dict[str, Any]:
    """Return `NAME=VALUE` texts as values by name, lists for commas, or raise an InputError."""
    values: dict[str, Any] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not (name and sign and value):
            raise InputError(f"--fix {text}: write NAME=VALUE, for example layer=22.")
        name = name.replace("-", "_")
        if name in values:
            raise InputError(f"--fix {text}: {name} is fixed twice.")
        parts = [_value(part.strip()) for part in value.split(",")]
        values[name] = parts[0] if len(parts) == 1 else parts
    return values


def read_range(text: str) -> tuple[str, float, float]:
    """Return name and bounds of a text `NAME=LOW:HIGH`, or raise an InputError."""
    name, _, values = text.partition("=")
    low, _, high = values.partition(":")
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = 1.0, 0.0
    if not name.strip() or not bounds[0] <= bounds[1]:
        raise InputError(f"--range {text}: write NAME=LOW:HIGH, for example coefficient=0.5:4.")
    return name.strip().replace("-", "_"), *bounds


def _value(text: str) -> Any:
    """Return a text as the number or truth value that it spells, else as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


AUTO = "auto"  # of an option: the search finds out by itself
EXPERIMENT = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "lunar-tune"
"""The MLflow experiment of all searches; MLflow's own variable names another one."""
BEST_FILTER = "tags.best = 'true'"  # of MLflow's list of runs: each search's confirmed best
LONGEST_TIMEOUT = 1e8  # seconds, three years: what system clocks can add
LONGEST_NAME = 120  # files named after it stay below the usual limit of 255
RETAIN_FLOOR = 0.8
RETAINED = "retain_rouge1"
RETAINING = f"{RETAINED}>={RETAIN_FLOOR}"  # the project's constraint
DECLINING = "forget_refused>=0.7"  # and where a model's own answers are redirected: docs/metrics.md
SEARCH, PLACE, OUTPUT = "Search", "Resources and results", "Output"
SUBJECT = "Subject"  # what a command is about
GROUPS = (SUBJECT, MODEL, DATA, METHOD, SEARCH, ANSWERS, MEMORY, PLACE, OUTPUT)
"""Headings of the help, in their order."""
search_option = functools.partial(option, group=SEARCH)
place_option = functools.partial(option, group=PLACE)


@dataclass(frozen=True, kw_only=True)
class Reused:
    """What several commands take, each with a help of its own (`same_option`)."""

    json: Path | None = option(None, group=OUTPUT, metavar="FILE", common=True, written=True)
    """Write JSON."""
    save: Path | None = option(None, group=OUTPUT, metavar="DIR", common=True)
    """Write files."""
    dry_run: bool = option(False, group=PLACE, common=True, stored=False)
    """Check all that needs no weights, show the plan, and stop."""
    quiet: bool = option(False, group=OUTPUT, stored=False)
    """Show nothing while it runs."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SearchConfig(RunOptions):
    """Search configuration."""

    max_new_tokens: int | None = same_option(RunOptions, "max_new_tokens", default=None)
    """Token budget of an answer in a trial; the confirmation has at least 512. Default: twice the
    longest true answer, and 128 where it counts whether answers decline."""
    num_trials: int = search_option(20, least=1, common=True, resume=True)
    """Trials to run, at most."""
    stop: str = search_option(AUTO, choices=(AUTO, NEVER), resume=True)
    """auto (start no trial where a further one is not likely to gain .01) or never."""
    minimise: str = search_option("forget_rouge1", metavar="METRIC", common=True, decides=True)
    """Objective, a metric."""
    constrain: tuple[str, ...] = search_option(
        (), metavar="'METRIC>=VALUE'", common=True, decides=True
    )
    """What a feasible trial keeps. Default: retain_rouge1>=0.8, with lunar on a model's own answers
    also forget_refused>=0.7."""
    then: str = search_option(RETAINED, metavar="METRIC", decides=True, before=RETAINED)
    """Second line of the goal: of settings whose objective cannot be told apart, equal within
    their standard errors, the best by this metric is the best."""
    space: str | None = search_option(None, common=True, place=True)
    """YAML file or shipped name. Default: the model's own."""
    range: tuple[str, ...] = search_option((), metavar="NAME=LOW:HIGH", common=True, decides=True)
    """Narrow the space: coefficient=0.5:4."""
    sampler: str = search_option("frontier", decides=True)
    """Sampler of settings; a wrong name lists all."""
    start_from: tuple[str, ...] = search_option((), metavar="SEARCH")
    """Begin with what another search has found, of the same model with all of its trials: its
    folder or name, or a best.yaml; may be repeated. none leaves out the space's own starting
    points."""
    layer_prior: str | None = search_option(None, metavar="FILE|auto", place=True)
    """Search only the layers that s1 - s2 recommends: a file that the command layers wrote
    (--json), or auto to score the layers first."""
    time_budget: float | None = search_option(None, least=0, common=True, resume=True)
    """Start no trial after this many seconds."""
    trial_timeout: float | None = search_option(None, above=0, most=LONGEST_TIMEOUT, resume=True)
    """Seconds after which a trial counts as hanging: its worker is replaced, and the trial runs
    again, three times at most."""
    finetune: str = search_option("auto", choices=("auto", "never"))
    """What to do if the base model does not know the data: auto (first fine-tune it, if it is in
    the catalogue, and keep the result for later searches) or never (stop with advice)."""
    force: bool = search_option(False, stored=False)
    """Skip the checks of the base model."""
    output: Path = option(Path("runs"), group=PLACE, metavar="DIR", common=True, resume=True)
    """Folder of all searches."""
    name: str | None = place_option(None, common=True, stored=False)
    """Name of the search. Default: model, data, method, time."""
    resume: str | None = place_option(None, metavar="SEARCH", common=True, stored=False)
    """Resume a search with the options that it was begun with."""
    tracking_uri: str | None = place_option(None, metavar="URI", resume=True, permission=True)
    """MLflow tracking URI. Default: MLFLOW_TRACKING_URI, or a sqlite file in the output folder."""
    in_process: bool = place_option(False, common=True, resume=True)
    """Run trials in this process, one after another, without Ray."""
    gpus_per_trial: float | None = place_option(None, least=0, resume=True)
    """GPUs per trial; may be a fraction. Default: 1 if there is a GPU."""
    concurrency: int | None = place_option(None, least=1, resume=True)
    """Trials at once. Default: as many as fit."""
    address: str | None = place_option(None, metavar="HOST:PORT|auto", resume=True, permission=True)
    """Address of a Ray cluster. Default: start Ray on this machine."""

    def resuming(self, folder: Path) -> list[str]:
        """Return the options that resume the search in a folder, permissions of this run's too."""
        return ["--resume", str(folder), *self.permitting(*options_of(SearchConfig))]

    def permitting(self, *names: str) -> list[str]:
        """Return those of the options that a command needs again, since only it can permit them."""
        permitted = permissions_in(SearchConfig, vars(self)).keys() & {*names}
        return [*options_again(self, permitted)]

    def check(self) -> None:
        """Check the values that need nothing else to be known, or raise an InputError."""
        problems = Problems()
        check_values(self, problems)
        if self.engine == "reference":
            problems.add("--engine reference: is for the command unlearn only. Use fast or plain.")
        if self.name is not None and not is_plain(self.name):
            problems.add(f"--name {self.name}: must be a plain name, without folders.")
        elif self.name is not None and not self.name.isprintable():
            problems.add(f"--name {self.name!r}: must hold no control character.")
        elif self.name is not None and len(self.name) > LONGEST_NAME:
            problems.add(f"--name {self.name[:20]}…: must have at most {LONGEST_NAME} characters.")
        self._check_place(problems)
        problems.raise_if_any(InputError)

    def _check_place(self, problems: Problems) -> None:
        """Note stores that are none, and devices that Ray cannot give."""
        if self.tracking_uri is not None and not is_store(self.tracking_uri):
            problems.add(
                f"--tracking-uri {without_password(self.tracking_uri)}: must be an MLflow server "
                "such as http://host:5000, or a database such as sqlite:///runs/mlflow.db (? is "
                "written %3F there); MLflow 3 writes no folders of files. Without the option, "
                "MLFLOW_TRACKING_URI is taken."
            )
        if self.in_process:
            for name in ("address", "concurrency", "gpus_per_trial", "trial_timeout"):
                if getattr(self, name) is not None:
                    problems.add(
                        f"{flag_of(name)} needs Ray: leave out that option, or --in-process."
                    )
        gpus = self.gpus_per_trial or 0.0
        if 1 < gpus < math.inf and not float(gpus).is_integer():
            problems.add(f"--gpus-per-trial {gpus:g}: must be a whole number above 1.")
        if self.device == "cpu" and gpus:
            problems.add(f"--device cpu contradicts --gpus-per-trial {gpus:g}: leave one out.")
        if self.device.startswith("cuda:"):
            problems.add(f"--device {self.device}: Ray hands out the GPUs; write --device cuda.")
        if self.address is not None and self.address.startswith("ray://"):
            problems.add(
                f"--address {self.address}: a search cannot run through Ray Client. Start it on a "
                "machine of the cluster with --address auto."
            )


def check_permitted(
    who: str, asked: Mapping[str, Any], given: Collection[str], *, command: str = ""
) -> None:
    """Raise an InputError for permissions that a file asks for and the command line does not give.

    `who` says of which file, and that it asks; `command` is what to run with the missing ones.
    """
    missing = {name: value for name, value in asked.items() if name not in given}
    if missing:
        flags = shlex.join(options_again(SearchConfig(**missing), missing))
        how = f"run: {command} {flags}" if command else f"repeat the command with {flags}"
        raise InputError(
            f"{who} {flags}. Whether code of a model runs, and which machines hear of data and "
            "passwords, is decided on the command line alone, not by a file. If you trust whoever "
            f"wrote that, {how}"
        )


def is_store(uri: str) -> bool:
    """Say whether an address has the form of one that MLflow 3 keeps runs at."""
    parts, named = urllib.parse.urlsplit(uri), True
    if parts.scheme in {"http", "https"}:
        try:
            named = parts.hostname is not None and parts.port != 0
        except ValueError:  # a port that is no number
            return False
    elif parts.scheme.startswith("sqlite"):  # a file; nothing would come of a query
        is_file = parts.path.strip("/") not in {"", ":memory:"}
        named = is_file and not parts.netloc and "?" not in uri
    written = uri.startswith(f"{parts.scheme}://") and parts.scheme not in {"", "file"}
    return uri == "databricks" or (written and named)
