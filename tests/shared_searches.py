"""Two searches through the command line, made once in-process for all test processes.

Read-only for all: a test that changes one takes a copy, which works as a moved search does.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from command_lines import Result, small_options, without_ray
from made_once import copy_store, made_once, make_store
from random_models import build_model, build_tokenizer

from lunar_tune.cli.search import search as COMMAND

NAME = "four"
TRIALS = 4
SAMPLER, SEED = "random", 73
"""With these trial 2 loses the retain floor, and is stopped there; the others are feasible."""
FULL_BUDGET = 12
"""Tokens of a full evaluation of a random model, which never ends an answer."""
HELD_OUT = "held-out"
NPO_SPACE = """
npo:
  lora:
    parameters:
      learning_rate: {type: choice, values: [1.0e-3, 1.0e-2, 1.0e+30]}
    starting_points:
      - {learning_rate: 1.0e-3}
      - {learning_rate: 1.0e+30}
      - {learning_rate: 1.0e-2}
"""


@dataclass(frozen=True)
class SharedSearch:
    """A search that has ended."""

    place: Path
    name: str

    @property
    def cwd(self) -> Path:
        """Where it was started."""
        return self.place / "elsewhere"

    @property
    def output(self) -> Path:
        """Folder of all searches."""
        return self.place / "runs"

    @property
    def folder(self) -> Path:
        """The search's own."""
        return self.output / self.name

    @property
    def result(self) -> Result:
        """How it ended and what it printed."""
        return Result(**json.loads((self.place / "result.json").read_text(encoding="utf-8")))

    def copied(self, output: Path) -> Path:
        """Return the folder of a copy that a test may change, without the store."""
        return Path(shutil.copytree(self.folder, output / self.name))

    def run(self, options: Sequence[object]) -> None:
        """Make it."""
        self.cwd.mkdir()
        self.output.mkdir(exist_ok=True)
        before = signal.getsignal(signal.SIGTERM)
        with chdir(self.cwd):
            result = without_ray(
                COMMAND, *options, "--in-process", "--output", self.output, "--name", self.name
            )
        signal.signal(signal.SIGTERM, before)
        told = json.dumps(asdict(result))
        (self.place / "result.json").write_text(told, encoding="utf-8")


def finished_search(shared: Path) -> SharedSearch:
    """Return a search of LUNAR on the tiny model, feasible and confirmed."""

    def make(place: Path) -> None:
        SharedSearch(place, NAME).run(
            ["--num-trials", TRIALS, "--sampler", SAMPLER, "--seed", SEED]
        )

    return SharedSearch(made_once(shared / "finished-search", make), NAME)


def held_out_search(shared: Path) -> SharedSearch:
    """Return a search of NPO on a random model with held-out questions and a failed trial.

    All three trials are starting points: 0 is confirmed, the loss of 1 is NaN, 2 is as good as 0.
    """

    def make(place: Path) -> None:
        model = place / "model"
        build_model("qwen2").save_pretrained(model)
        build_tokenizer().save_pretrained(model)
        options = small_options(model, place)
        store = made_once(shared / "empty-store", make_store)
        copy_store(store / "mlflow.db", place / "runs" / "mlflow.db")
        (place / "space.yaml").write_text(NPO_SPACE, encoding="utf-8")
        options += ["--method", "npo", "--space", str(place / "space.yaml"), "--holdout"]
        options += ["--constrain", "retain_rouge1>=0", "--sampler", "random", "--force"]
        with pytest.MonkeyPatch.context() as changes:
            changes.setattr("lunar_tune.trial.evaluator.PUBLISHED_MAX_NEW_TOKENS", FULL_BUDGET)
            SharedSearch(place, HELD_OUT).run([*options, "--num-trials", 3, "--seed", 0])

    return SharedSearch(made_once(shared / "held-out-search", make), HELD_OUT)
