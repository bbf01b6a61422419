"""What a search is told, as one frozen object, and its resolved form on disk.

Covers: the options that a search has beside a run's own; checks that need nothing but the values.
Does not cover: the search space (`space`), the data (`trial.assemble`).
"""

from __future__ import annotations

import dataclasses
import math
import urllib.parse
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError, Problems
from lunar_tune.paths import is_plain
from lunar_tune.secrets import without_password

__all__ = [
    "AUTO",
    "EXPERIMENT",
    "PAPER_METHODS",
    "RETAIN_FLOOR",
    "SAMPLERS",
    "SCHEDULERS",
    "SearchConfig",
    "config_document",
    "plain",
]

SAMPLERS = ("gp", "tpe", "random")
SCHEDULERS = ("none", "asha", "median")
FINETUNE = ("auto", "never")
AUTO = "auto"
"""Instead of a file of scored layers: the search scores them itself."""
PAPER_METHODS = ("lunar", "ga", "gd", "ukl", "dpo", "npo")
"""The methods of the paper's Table 5."""
EXPERIMENT = "lunar-tune"
"""The MLflow experiment of all searches, where no other is named."""
LONGEST_TIMEOUT = 1e8  # seconds, three years: what system clocks can add
LONGEST_NAME = 120  # files named after it stay below the usual limit of 255
RETAIN_FLOOR = 0.8  # the project's constraint: retain ROUGE-1 of at least 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """Everything that decides a search."""

    run: RunOptions = field(default_factory=RunOptions)
    """Model, data and method."""
    space: str | None = None
    """Search space: a file, a shipped name, or None for the model's own."""
    num_trials: int = 30
    """Trials that are to be completed."""
    time_budget: float | None = None
    """Seconds after which no trial is started any more."""
    minimise: str = "forget_rouge1"
    """The metric that is made as good as possible; one for which higher is better is maximised."""
    constrain: tuple[str, ...] = ()
    """Bounds that a feasible trial keeps, such as `retain_mrr>=0.5`; none is the retain floor."""
    retain_floor: float | None = None
    """Least retain ROUGE-1 of a feasible trial; None is 0.8 where nothing else is a bound."""
    bounded: bool = True
    """Whether a trial asks no more once it has missed the floor for certain."""
    sampler: str = "gp"
    """Who proposes: gp (constrained Gaussian process), tpe or random."""
    scheduler: str = "none"
    """Who ends gradient fits early by comparing them: none, asha or median."""
    starting_points: bool = True
    """Whether the space's known-good settings and tuned ones are tried first."""
    tuned: bool = True
    """Whether tuned settings of the model are among those; a comparison of methods is without."""
    layer_prior: str | None = None
    """Scored layers that narrow the space: a file, `auto` to score them first, or None."""
    keep: bool = False
    """Whether the best setting is kept for later searches."""
    output: Path = Path("runs")
    """Folder of all searches and of the default MLflow store."""
    name: str | None = None
    """The search's name and folder; None makes one from model, data, method and time."""
    resume: bool = False
    """Whether a search of that name is gone on with if there is one."""
    tracking_uri: str | None = None
    """MLflow tracking URI; None is a sqlite store in `output`."""
    experiment: str = EXPERIMENT
    """MLflow experiment of the search's runs; made if missing."""
    system_metrics: bool = False
    """Whether MLflow records the use of processor, memory, disk, network and GPU meanwhile."""
    gpus_per_trial: float | None = None
    """GPUs of a trial, fractions allowed; None is one where there are any."""
    cpus_per_trial: float | None = None
    """CPU cores of a trial; None shares them out."""
    concurrency: int | None = None
    """Trials at once; None is as many as the resources allow."""
    address: str | None = None
    """Address of a Ray cluster; None starts Ray on this machine."""
    trial_timeout: float | None = None
    """Seconds after which a trial counts as hanging: its worker is replaced and it runs again."""
    max_failures: int = 5
    """Failed trials in a row after which the search stops."""
    finetune: str = "auto"
    """auto (a model of the catalogue that does not know the data is fine-tuned first) or never."""
    force: bool = False
    """Whether to go on although the untouched model makes success impossible or pointless."""

    @property
    def bounds(self) -> tuple[str, ...]:
        """Every bound that a feasible trial keeps."""
        floor = self.retain_floor
        if floor is None and not self.constrain:
            floor = RETAIN_FLOOR
        own = () if floor is None else (f"retain_rouge1>={floor}",)
        return (*own, *self.constrain)

    def check(self) -> None:
        """Check the values that need nothing else to be known.

        Raises:
            InputError: Something is out of range; all of it is said at once.
        """
        problems = Problems()
        if self.retain_floor is not None and not 0 <= self.retain_floor <= 1:
            problems.add(f"--retain-floor {self.retain_floor}: a ROUGE score lies between 0 and 1.")
        for option, chosen, known in (
            ("--sampler", self.sampler, SAMPLERS),
            ("--scheduler", self.scheduler, SCHEDULERS),
            ("--finetune", self.finetune, FINETUNE),
        ):
            if chosen not in known:
                problems.add(f"{option} {chosen}: there are {', '.join(known)}.")
        for option, value in (
            ("--num-trials", self.num_trials),
            ("--concurrency", self.concurrency),
            ("--max-failures", self.max_failures),
        ):
            if value is not None and value < 1:
                problems.add(f"{option} {value}: at least 1.")
        for option, number, least in (
            ("--time-budget", self.time_budget, "more than 0 seconds"),
            ("--trial-timeout", self.trial_timeout, "more than 0 seconds"),
            ("--cpus-per-trial", self.cpus_per_trial, "more than 0"),
        ):
            if number is not None and not 0 < number < math.inf:
                problems.add(f"{option} {number}: {least}.")
        if self.trial_timeout is not None and LONGEST_TIMEOUT < self.trial_timeout < math.inf:
            problems.add(f"--trial-timeout {self.trial_timeout:g}: at most {LONGEST_TIMEOUT:g}.")
        if self.gpus_per_trial is not None and not 0 <= self.gpus_per_trial < math.inf:
            problems.add(f"--gpus-per-trial {self.gpus_per_trial}: 0 or more.")
        self._check_name(problems)
        self._check_place(problems)
        problems.raise_if_any(InputError)

    def _check_name(self, problems: Problems) -> None:
        """Note a name that is none of a folder."""
        if self.name is None:
            return
        if not is_plain(self.name):
            problems.add(f"--name {self.name}: a plain name, without folders.")
        elif not self.name.isprintable():
            problems.add(f"--name {self.name!r}: holds a control character.")
        elif len(self.name) > LONGEST_NAME:
            problems.add(f"--name {self.name[:20]}…: at most {LONGEST_NAME} characters.")

    def _check_place(self, problems: Problems) -> None:
        """Note places that have no name, and devices that Ray cannot give."""
        if not self.experiment.strip():
            problems.add("--experiment is empty: name an MLflow experiment, or leave it out.")
        elif not self.experiment.isprintable():
            problems.add(f"--experiment {self.experiment!r}: holds a control character.")
        if self.tracking_uri is not None and not _is_store(self.tracking_uri):
            problems.add(
                f"--tracking-uri {without_password(self.tracking_uri)}: an MLflow server such as "
                "http://host:5000, or a database such as sqlite:///runs/mlflow.db."
            )
        gpus = self.gpus_per_trial or 0.0
        if 1 < gpus < math.inf and not float(gpus).is_integer():
            problems.add(f"--gpus-per-trial {gpus:g}: above 1 a whole number of GPUs.")
        if self.run.device == "cpu" and gpus:
            problems.add(f"--device cpu contradicts --gpus-per-trial {gpus:g}: leave one out.")
        if self.run.device.startswith("cuda:"):
            problems.add(
                f"--device {self.run.device}: Ray hands out the GPUs; write --device cuda."
            )
        if self.address is not None and self.address.startswith("ray://"):
            problems.add(
                f"--address {self.address}: a search cannot run through Ray Client. Start it on a "
                "machine of the cluster with --address auto."
            )


def _is_store(uri: str) -> bool:
    """Say whether an address has the form of one that MLflow 3 keeps runs at."""
    if uri == "databricks":
        return True
    try:
        parts = urllib.parse.urlsplit(uri)
        is_server = parts.scheme in {"http", "https"}
        named = parts.hostname is not None and parts.port != 0 if is_server else True
    except ValueError:  # a port that is no number
        return False
    return "://" in uri and parts.scheme not in {"", "file"} and named


def config_document(
    config: SearchConfig,
    *,
    given: Mapping[str, str],
    derived: Mapping[str, Any],
    resolved: Mapping[str, Any],
) -> str:
    """Return `config.yaml`: every value with its origin.

    Args:
        config: The search's configuration.
        given: Origin of the options that were not left at their default, by field name.
        derived: Values that stand for an option left open, by field name.
        resolved: What there is beside options: the space, the model's source, data digests.
    """
    document: dict[str, Any] = {
        "search": _with_origin(config, given, derived, skip={"run"}),
        "run": _with_origin(config.run, given, derived),
        "resolved": plain(resolved),
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _with_origin(
    part: Any,
    given: Mapping[str, str],
    derived: Mapping[str, Any],
    *,
    skip: Collection[str] = (),
) -> dict[str, Any]:
    document = {}
    for entry in dataclasses.fields(part):
        if entry.name in skip:
            continue
        value, origin = getattr(part, entry.name), given.get(entry.name, "default")
        if value in (None, ()) and entry.name in derived:
            value, origin = derived[entry.name], "derived"
        document[entry.name] = {"value": plain(value), "origin": origin}
    return document


def plain(value: Any) -> Any:
    """Return a value as YAML can write it safely."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
