"""Where tuned settings are kept: a file for each model, in shipped and own folders.

Covers: finding, listing, keeping; one writer at a time, and readers that see whole files.
Does not cover: what a file says (`tuned_settings`), which settings a search uses
(`starting_points`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.files import write_atomically
from lunar_tune.paths import cache_dir, safe_name, tuned_dir_to_write, tuned_dirs
from lunar_tune.search.tuned.tuned_settings import (
    TunedFile,
    TunedSetting,
    no_better,
    read_tuned,
    tuned_text,
)

__all__ = ["KeptSetting", "file_name", "keep_setting", "kept_settings", "tuned_settings"]

SECONDS_TO_WAIT = 60  # for another writer, whose work takes milliseconds


@dataclass(frozen=True, slots=True)
class KeptSetting:
    """A tuned setting and where it is kept."""

    model: str
    setting: TunedSetting
    file: Path


def file_name(model: str) -> str:
    """Return the name of a model's file; names that differ have different files."""
    name = safe_name(model)
    if name == model:
        return f"{name}.yaml"
    return f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.yaml"


def kept_settings(model: str | None = None) -> list[KeptSetting]:
    """Return what is kept, by model and key; of two for the same key the user's own.

    Args:
        model: Name of one model; None takes all.

    Raises:
        InputError: A file is wrong; the message says where.
    """
    found: dict[tuple[object, ...], KeptSetting] = {}
    for folder in tuned_dirs():
        for path in sorted(folder.glob("*.yaml" if model is None else file_name(model))):
            content = read_tuned(path)
            if path.name != file_name(content.model):
                raise InputError(
                    f"{path}: model is {content.model!r}, whose file is named "
                    f"{file_name(content.model)}. Rename the file, or correct model."
                )
            for setting in content.entries:
                found[content.model, *setting.key] = KeptSetting(content.model, setting, path)
    return sorted(found.values(), key=lambda one: (one.model, one.setting.key))


def tuned_settings(model: str) -> list[TunedSetting]:
    """Return what is kept of one model.

    Raises:
        InputError: A file is wrong.
    """
    return [kept.setting for kept in kept_settings(model)]


def keep_setting(model: str, setting: TunedSetting, *, replace: bool = False) -> Path:
    """Keep a setting, unless what is kept for the same key is as good; return the file.

    Args:
        model: Name of the model.
        setting: What to keep.
        replace: Whether it takes the place of a better one, too.

    Raises:
        InputError: The one that is kept is as good or does not compare, or the file is wrong.
        LunarTuneError: It cannot be written.
    """
    # The lock lies in the cache, so that no folder that is shipped or shared has stray files.
    try:
        with FileLock(cache_dir() / "tuned.lock", timeout=SECONDS_TO_WAIT):
            return _keep(model, setting, replace=replace)
    except Timeout as error:
        raise LunarTuneError(f"Another process is writing tuned settings ({error}).") from error
    except OSError as error:
        raise LunarTuneError(f"The setting cannot be kept: {error}.") from error


def _keep(model: str, setting: TunedSetting, *, replace: bool) -> Path:
    older = {kept.setting.key: kept for kept in kept_settings(model)}.get(setting.key)
    if older is not None and not replace:
        reason = no_better(setting, older.setting)
        if reason is not None:
            raise InputError(
                f"{model}: a setting for {setting.about} is kept in {older.file}; it {reason}. "
                "Keep this one all the same with: python -m lunar_tune.tuned --keep FOLDER "
                "--replace"
            )
    folder = tuned_dir_to_write()
    if older is not None and older.file.parent == tuned_dirs()[-1]:
        folder = older.file.parent  # what is kept there hides entries elsewhere
    path = folder / file_name(model)
    content = read_tuned(path) if path.exists() else TunedFile(model=model, entries=())
    write_atomically(path, tuned_text(content.with_setting(setting)).encode())
    return path
