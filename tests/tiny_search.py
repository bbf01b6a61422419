"""One plain search of the tiny model through the command line, made once for all test processes."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from command_lines import run_command
from made_once import made_once

NAME = "six"
TRIALS = 6
SEED = 3


@dataclass(frozen=True)
class TinySearch:
    """A search that has ended."""

    place: Path

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
        return self.output / NAME

    @property
    def done(self) -> subprocess.CompletedProcess[str]:
        """How it ended and what it printed."""
        return subprocess.CompletedProcess(**json.loads((self.place / "done.json").read_text()))


def tiny_search(shared: Path) -> TinySearch:
    """Return the search, made below the folder that all test processes share."""
    return TinySearch(made_once(shared / "tiny-search", _search))


def _search(place: Path) -> None:
    search = TinySearch(place)
    search.cwd.mkdir()
    search.output.mkdir()
    options = ["--num-trials", str(TRIALS), "--seed", str(SEED)]
    options += ["--output", str(search.output), "--name", NAME]
    done = run_command("search", *options, cwd=search.cwd)
    told = {
        "args": done.args,
        "returncode": done.returncode,
        "stdout": done.stdout,
        "stderr": done.stderr,
    }
    (place / "done.json").write_text(json.dumps(told), encoding="utf-8")
