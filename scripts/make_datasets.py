"""Makes the generated files of `datasets/` again, byte for byte.

    python scripts/make_datasets.py            # write
    python scripts/make_datasets.py --check    # compare; exit code 1 if a file differs

Covers: mini.json, contracts.json, unverifiable.json, each from a fixed seed.
Does not cover: factual.json, harmful.json and refusals.txt, which are written by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from contracts import EdgeSpec, GraphSpec, chain, generate_contracts, star

from lunar_tune.data.records import Record
from lunar_tune.data.splits import generate_unverifiable
from lunar_tune.files import shipped_folder

__all__ = ["CONTRACTS", "MINI", "generated_files", "main"]

# Seeds are arbitrary; changing one changes the file, and with it every model trained on it.
MINI_SEED = 11
CONTRACTS_SEED = 23
UNVERIFIABLE_SEED = 37

MINI = GraphSpec(
    (
        *chain("ABCD"),
        *star("E", "F"),
        *star("E", "gh", kind="employment"),
        EdgeSpec("I", "J"),
        EdgeSpec("K", "m", "employment"),
    )
)
CONTRACTS = GraphSpec(
    (
        *chain("ABCDE"),
        *star("A", "FGH"),
        *star("A", "pqr", kind="employment"),
        *star("C", "stu", kind="employment"),
        *(EdgeSpec(f"I{n}", f"J{n}") for n in (1, 2, 3)),
        *(EdgeSpec(f"K{n}", f"v{n}", "employment") for n in (1, 2, 3, 4)),
    )
)


def _json(rows: list[dict[str, str]]) -> str:
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def _pairs(records: Iterable[Record]) -> str:
    return _json([{"edge": r.edge, "question": r.question, "answer": r.answer} for r in records])


def generated_files() -> dict[str, str]:
    """Return the content of each generated file by its name."""
    mini = generate_contracts(MINI, seed=MINI_SEED, attributes_per_contract=12)
    contracts = generate_contracts(CONTRACTS, seed=CONTRACTS_SEED)
    prompts = generate_unverifiable(200, seed=UNVERIFIABLE_SEED)
    return {
        "mini.json": _pairs(mini),
        "contracts.json": _pairs(contracts),
        "unverifiable.json": _json([{"instruction": prompt} for prompt in prompts]),
    }


def _differing(folder: Path, files: dict[str, str]) -> list[str]:
    def on_disk(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    return [name for name, text in files.items() if on_disk(name) != text.encode()]


def main(arguments: list[str] | None = None) -> int:
    """Write or check the files; return the exit code."""
    parser = argparse.ArgumentParser(description="Make the generated files of datasets/.")
    parser.add_argument("--check", action="store_true", help="compare only; 1 if a file differs")
    parser.add_argument(
        "--folder", type=Path, default=shipped_folder("datasets"), help="default: datasets/"
    )
    options = parser.parse_args(arguments)
    files = generated_files()
    if options.check:
        differing = _differing(options.folder, files)
        for name in differing:
            print(f"{options.folder / name} differs from what its seed gives: run without --check")
        return 1 if differing else 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (options.folder / name).write_bytes(text.encode())
        print(f"wrote {options.folder / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
