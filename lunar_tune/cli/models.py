"""The command `lunar-tune models`: the models that have a name, and what each costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from lunar_tune.cli.commands import Command, CommonOptions, plain_table
from lunar_tune.config.fields import same_option
from lunar_tune.config.options import Reused
from lunar_tune.display import say
from lunar_tune.errors import Problems
from lunar_tune.files import write_json
from lunar_tune.models.catalog import CATALOG
from lunar_tune.models.device import GIB, memory_needed

_BYTES = 2  # of a parameter as bfloat16, the number format on a GPU


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(CommonOptions):
    """What the command takes."""

    json: Path | None = same_option(Reused, "json")
    """Write the list as JSON."""


@Command
def models(options: ModelsOptions, problems: Problems) -> None:
    """Show the models that `--model` knows by name.

    Any other Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 1 or Phi-3 is given by its hub id or its
    folder.

    Memory is what a GPU must have for the weights in bfloat16 and the work of a LUNAR trial.
    """
    problems.raise_if_any()
    console = options.console
    if options.json is not None:
        write_json(options.json, {name: asdict(entry) for name, entry in CATALOG.items()})
        say(console, f"written to {options.json}")
        return
    rows = [
        (
            name,
            f"{entry.billions:g} B",
            entry.n_layers,
            f"{memory_needed(entry.billions * 1e9, _BYTES) / GIB:.1f} GiB",
            entry.licence + " *" * entry.gated,
            entry.hub_id or "built on the spot",
        )
        for name, entry in CATALOG.items()
    ]
    columns = ("name", "parameters", "blocks", "memory", "licence", "hub")
    table = plain_table(columns, rows, left=("name",), folded=("licence", "hub"))
    table.collapse_padding = True
    console.print(table, highlight=False)
    say(console, "* The hub asks for this licence to be accepted on the model's page first.")
