"""Options of a search: a run's, what is searched and how long, where results go."""

from __future__ import annotations

import math
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from lunar_tune.config.fields import check_values, flag_of, option, same_option
from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import is_plain
from lunar_tune.secrets import without_password

__all__ = ["AUTO", "EXPERIMENT", "PAPER_METHODS", "RETAIN_FLOOR", "SearchConfig"]

AUTO = "auto"
"""Instead of a file of scored layers: the search scores them itself."""
PAPER_METHODS = ("lunar", "ga", "gd", "ukl", "dpo", "npo")
"""The methods of the paper's Table 5."""
EXPERIMENT = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "lunar-tune"
"""The MLflow experiment of all searches; MLflow's own variable names another one."""
LONGEST_TIMEOUT = 1e8  # seconds, three years: what system clocks can add
LONGEST_NAME = 120  # files named after it stay below the usual limit of 255
RETAIN_FLOOR = 0.8  # the project's constraint: retain ROUGE-1 of at least 0.8
SEARCH, PLACE = "Search", "Resources and results"


@dataclass(frozen=True, kw_only=True)
class SearchConfig(RunOptions):
    """Search configuration."""

    max_new_tokens: int | None = same_option(
        RunOptions,
        "max_new_tokens",
        default=None,
        help="Token budget of an answer in a trial; the confirmation has at least 512. Default: "
        "twice the longest true answer.",
    )
    num_trials: int = option(30, "Trials to run.", SEARCH, least=1, common=True, resume=True)
    minimise: str = option(
        "forget_rouge1",
        "Metric to make as good as possible.",
        SEARCH,
        metavar="METRIC",
        common=True,
        decides=True,
    )
    constrain: tuple[str, ...] = option(
        (f"retain_rouge1>={RETAIN_FLOOR}",),
        "Bounds that a feasible trial keeps.",
        SEARCH,
        metavar="'METRIC>=VALUE'",
        common=True,
        decides=True,
    )
    space: str | None = option(
        None,
        "YAML file or shipped name. Default: the model's own.",
        SEARCH,
        common=True,
        place=True,
    )
    range: tuple[str, ...] = option(
        (),
        "Narrow the space: coefficient=0.5:4.",
        SEARCH,
        metavar="NAME=LOW:HIGH",
        common=True,
        decides=True,
    )
    sampler: str = option(
        "gp",
        "Who proposes: gp (constrained Gaussian process), tpe or random.",
        SEARCH,
        decides=True,
    )
    start_from: tuple[str, ...] = option(
        (),
        "Try first what another search found: its folder or name, or a best.yaml. May be given "
        "several times. none leaves out the space's own starting points.",
        SEARCH,
        metavar="SEARCH",
    )
    layer_prior: str | None = option(
        None,
        "Search the layers that s1 - s2 recommends: a file of the command layers, or auto to score "
        "them first.",
        SEARCH,
        metavar="FILE|auto",
        place=True,
    )
    time_budget: float | None = option(
        None, "Start no trial after so many seconds.", SEARCH, least=0, common=True, resume=True
    )
    trial_timeout: float | None = option(
        None,
        "Seconds after which a trial counts as hanging: its worker is replaced, and the trial runs "
        "again, three times at most.",
        SEARCH,
        above=0,
        most=LONGEST_TIMEOUT,
        resume=True,
    )
    finetune: str = option(
        "auto",
        "Where the base model does not know the data: auto fine-tunes a model of the catalogue "
        "first, and keeps it for all later searches; never stops with the advice.",
        SEARCH,
        choices=("auto", "never"),
    )
    force: bool = option(False, "Skip the checks of the base model.", SEARCH, stored=False)
    output: Path = option(
        Path("runs"), "Folder of all searches.", PLACE, metavar="DIR", common=True, resume=True
    )
    name: str | None = option(
        None,
        "Of the search. Default: model, data, method, time.",
        PLACE,
        common=True,
        stored=False,
    )
    resume: str | None = option(
        None,
        "Resume a search; it knows its options.",
        PLACE,
        metavar="SEARCH",
        common=True,
        stored=False,
    )
    tracking_uri: str | None = option(
        None,
        "MLflow tracking URI. Default: a sqlite file in the output folder.",
        PLACE,
        metavar="URI",
        resume=True,
    )
    in_process: bool = option(
        False,
        "Run trials in this process, one after another, without Ray.",
        PLACE,
        common=True,
        resume=True,
    )
    gpus_per_trial: float | None = option(
        None,
        "GPUs of a trial, fractions allowed. Default: 1 where there are any.",
        PLACE,
        least=0,
        resume=True,
    )
    concurrency: int | None = option(
        None, "Trials at once. Default: as many as fit.", PLACE, least=1, resume=True
    )
    address: str | None = option(
        None,
        "Address of a Ray cluster. Default: Ray is started here.",
        PLACE,
        metavar="HOST:PORT|auto",
        resume=True,
    )

    def check(self) -> None:
        """Check the values that need nothing else to be known.

        Raises:
            InputError: Something is out of range; all of it is said at once.
        """
        problems = Problems()
        check_values(self, problems)
        if self.engine == "reference":
            problems.add("--engine reference: is for a single run (the command unlearn).")
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
        """Note stores that are none, and devices that Ray cannot give."""
        if self.tracking_uri is not None and not _is_store(self.tracking_uri):
            problems.add(
                f"--tracking-uri {without_password(self.tracking_uri)}: an MLflow server such as "
                "http://host:5000, or a database such as sqlite:///runs/mlflow.db."
            )
        if self.in_process:
            needless = ("address", "concurrency", "gpus_per_trial")
            for name in (*needless, "trial_timeout"):
                if getattr(self, name) is not None:
                    problems.add(f"{flag_of(name)} is Ray's: leave it out, or --in-process.")
        gpus = self.gpus_per_trial or 0.0
        if 1 < gpus < math.inf and not float(gpus).is_integer():
            problems.add(f"--gpus-per-trial {gpus:g}: above 1 a whole number of GPUs.")
        if self.device == "cpu" and gpus:
            problems.add(f"--device cpu contradicts --gpus-per-trial {gpus:g}: leave one out.")
        if self.device.startswith("cuda:"):
            problems.add(f"--device {self.device}: Ray hands out the GPUs; write --device cuda.")
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
