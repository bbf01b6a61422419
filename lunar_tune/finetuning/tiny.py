"""The `tiny` model: small enough to be made on first use, on a laptop, without a download.

folder = ensure_tiny()          # about a minute the first time, nothing after that
AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from lunar_tune.files import cache_dir
from lunar_tune.finetuning.tiny_recipe import TinyRecipe
from lunar_tune.finetuning.tiny_text import TinyText, read_text

__all__ = ["TinyRecipe", "ensure_tiny", "tiny_key"]

_FORMAT = 1  # raise it when the code changes what is built and recipe and text do not say so
_KEY_CHARACTERS = 12


def ensure_tiny(
    recipe: TinyRecipe | None = None, *, on_progress: Callable[[int, int], None] | None = None
) -> Path:
    """Return the folder of the `tiny` checkpoint; build it if it is not there.

    Processes that ask at once: one builds, the others wait. A build that was cut short leaves
    nothing that looks like a checkpoint.

    Args:
        recipe: The shipped one if None.
        on_progress: Called while building with the epochs done and their total.

    Raises:
        LunarTuneError: The training failed, which the model's own check says.
    """
    recipe = recipe or TinyRecipe()
    text = read_text()
    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = models / f"tiny-{tiny_key(recipe, text)}"
    if folder.is_dir():
        return folder
    with FileLock(models / f"{folder.name}.lock"):
        if not folder.is_dir():
            _build_beside(folder, recipe, text, on_progress)
    return folder


def tiny_key(recipe: TinyRecipe, text: TinyText) -> str:
    """Return the name of a build: same recipe, text and library versions, same key.

    Of torch and transformers the first two parts of the version count.
    """
    libraries = {
        name: ".".join(version(name).split(".")[:2])
        for name in ("torch", "transformers", "tokenizers")
    }
    parts = [_FORMAT, asdict(recipe), text.digest(), libraries]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii"))
    return digest.hexdigest()[:_KEY_CHARACTERS]


def _build_beside(
    folder: Path,
    recipe: TinyRecipe,
    text: TinyText,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    from lunar_tune.finetuning.tiny_model import build_tiny  # loads torch

    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build_tiny(unfinished, recipe, text, on_progress=on_progress)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
