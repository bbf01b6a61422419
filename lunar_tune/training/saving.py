"""Writing a model, edited or not, as a checkpoint that loads elsewhere and answers the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.files import check_writable
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training.adapting import plain_weights

__all__ = ["check_save_folder", "save_checkpoint"]


def check_save_folder(folder: Path, option: str = "--save") -> None:
    """Check that a checkpoint can be written, before anything is computed; the option is named.

    Raises:
        InputError: The folder holds something already, or is a file.
    """
    if folder.is_file():
        raise InputError(f"{option} {folder}: is a file, not a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{option} {folder}: the folder is not empty; choose another.")
    check_writable(folder, f"{option} {folder}")


def save_checkpoint(
    loaded: LoadedModel, folder: Path, *, texts: Iterable[str], option: str = "--save"
) -> None:
    """Write the model as it is now, with its tokenizer; an adapter that is on becomes part of it.

    Args:
        loaded: The model.
        folder: Made if missing.
        texts: On which the written tokenizer is compared with the one in memory.
        option: What named the folder.

    Raises:
        InputError: The folder is not empty or cannot be written.
        LunarTuneError: The written tokenizer encodes differently.
    """
    from transformers import AutoTokenizer

    check_save_folder(folder, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        loaded.model.save_pretrained(folder, state_dict=plain_weights(loaded.model))
        loaded.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise InputError(f"{option} {folder}: cannot be written ({error}).") from error
    reloaded = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        before = loaded.tokenizer(text)["input_ids"]
        after = reloaded(text)["input_ids"]
        if before != after:
            raise LunarTuneError(
                f"the tokenizer written to {folder} encodes a question differently after loading: "
                f"{type(loaded.tokenizer).__name__} came back as {type(reloaded).__name__}."
            )
