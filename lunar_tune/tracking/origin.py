"""Where a run comes from: who started what, with which versions, at which commit of the code."""

from __future__ import annotations

import getpass
import importlib.metadata
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import lunar_tune

__all__ = ["origin_tags"]

_PACKAGES = ("torch", "transformers", "ray", "optuna")


def origin_tags() -> dict[str, str]:
    """Return the tags of every run that is started here and now, some for MLflow's own columns."""
    user = "unknown"
    with suppress(KeyError, OSError, ImportError):  # a container's user may have no name
        user = getpass.getuser()
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    command = str(spec.name).removesuffix(".__main__") if spec is not None else ""
    tags = {
        "mlflow.user": user,
        "mlflow.source.name": command if command.startswith("lunar_tune") else "lunar_tune",
        "mlflow.source.type": "LOCAL",
        "version.lunar_tune": lunar_tune.__version__,
    }
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    commit = code_commit(Path(lunar_tune.__file__).parent)
    return tags if commit is None else {**tags, "mlflow.source.git.commit": commit}


def code_commit(package: Path) -> str | None:
    """Return the commit of a package's own checkout; None where no repository has its files."""
    git = ["git", "-C", str(package)]
    try:  # an installed package may lie below the repository of something else
        for asked in (["ls-files", "--error-unmatch", "__init__.py"], ["rev-parse", "HEAD"]):
            done = subprocess.run([*git, *asked], capture_output=True, text=True, check=True)  # noqa: S603 our own words
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
