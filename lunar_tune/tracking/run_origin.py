"""Where a run comes from: who started what, at which commit, with which versions.

Covers: tags with the names that MLflow's UI looks for; the current folder's git repository, and
that of this package, which need not be the same.
Does not cover: model and data; the search's own tags name them.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import sys
from contextlib import suppress
from pathlib import Path

import lunar_tune

__all__ = ["code_tags", "git_tags", "origin_tags"]

_PACKAGES = ("torch", "transformers", "ray", "optuna")


def origin_tags() -> dict[str, str]:
    """Return the tags of every run that is started here and now."""
    return {
        "mlflow.user": _user(),
        "mlflow.source.name": _command(),
        "mlflow.source.type": "LOCAL",
        **git_tags(Path.cwd()),
        **code_tags(Path(lunar_tune.__file__).parent),
        "version.lunar_tune": lunar_tune.__version__,
        **_versions(),
    }


def git_tags(folder: Path) -> dict[str, str]:
    """Return commit, branch and whether there are changes; empty where there is no repository.

    Files that git does not know are not looked for, which could take long.
    """
    try:
        import git
    except ImportError:  # it raises where there is no git to be run
        return {}
    tags: dict[str, str] = {}
    with (
        suppress(git.GitError, ValueError, OSError),
        git.Repo(folder, search_parent_directories=True) as repository,
    ):
        tags["mlflow.source.git.commit"] = repository.head.commit.hexsha
        tags["mlflow.source.git.dirty"] = str(repository.is_dirty()).lower()
        if not repository.head.is_detached:
            tags["mlflow.source.git.branch"] = repository.active_branch.name
    return tags


def code_tags(package: Path) -> dict[str, str]:
    """Return the commit of a package's own checkout; empty where it does not belong to one.

    An installed package may lie below the repository of something else, which does not have its
    files.

    Args:
        package: Its folder.
    """
    try:
        import git
    except ImportError:  # see above
        return {}
    with (
        suppress(git.GitError, KeyError, ValueError, OSError),
        git.Repo(package, search_parent_directories=True) as repository,
    ):
        commit = repository.head.commit
        place = package.resolve().relative_to(Path(repository.working_dir).resolve())
        commit.tree.join((place / "__init__.py").as_posix())  # KeyError: another's repository
        dirty = "-dirty" if repository.is_dirty(path=str(package.resolve())) else ""
        return {"lunar_tune.git.commit": f"{commit.hexsha}{dirty}"}
    return {}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        return "unknown"


def _command() -> str:
    """Return the module that was started, such as `lunar_tune.search`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = str(spec.name).removesuffix(".__main__") if spec is not None else ""
    return name if name.startswith("lunar_tune") else "lunar_tune"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[f"version.{package}"] = importlib.metadata.version(package)
    return found
