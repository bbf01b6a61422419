"""Checkpoints: a model as it is written, and what a training that was cut short left behind.

OUTPUT/.training/state.safetensors    the job, losses so far, trained weights, AdamW's moments
"""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

import lunar_tune
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.files import check_writable, replacing
from lunar_tune.training.adapting import merged_weights
from lunar_tune.training.gradient_loop import LoopState

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lunar_tune.models.loading import LoadedModel

_FOLDER = ".training"
# The state of all weights of a large model is three times as large as the model in float32: it is
# kept after an epoch as long as keeping takes no more than this share of the time.
_SHARE = 0.1


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights by the names they have without an adapter, which is added to them.

    The sum is rounded to the weight's number format, which an adapter that is on does not do.
    """
    plain = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    return plain | merged_weights(model)


def check_save_folder(folder: Path, *, resumable: bool = False) -> None:
    """Check that a checkpoint can be written into `--save`, before anything is computed.

    With `resumable` it may hold an unfinished fine-tuning.
    """
    begun = resumable and (folder / _FOLDER).is_dir()
    if not begun and folder.is_dir() and any(folder.iterdir()):
        what = " and holds no unfinished fine-tuning" if resumable else ""
        raise InputError(f"--save {folder}: the folder is not empty{what}; choose another.")
    check_writable(folder, f"--save {folder}")


def save_checkpoint(loaded: LoadedModel, folder: Path, *, texts: Iterable[str]) -> None:
    """Write a model as it is now, with its tokenizer; an adapter that is on becomes part of it.

    Raises:
        InputError: The folder is not empty or cannot be written.
        LunarTuneError: The written tokenizer encodes one of the texts differently.
    """
    from transformers import AutoTokenizer

    check_save_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        loaded.model.save_pretrained(folder, state_dict=plain_weights(loaded.model))
        loaded.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise InputError(f"--save {folder}: cannot be written ({error}).") from error
    reloaded = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=loaded.spec.trust_remote_code
    )
    if any(loaded.tokenizer(text)["input_ids"] != reloaded(text)["input_ids"] for text in texts):
        raise LunarTuneError(
            f"the tokenizer written to {folder} encodes a text differently after loading: "
            f"{type(loaded.tokenizer).__name__} came back as {type(reloaded).__name__}."
        )


def package_versions() -> dict[str, str]:
    """Return the versions of what a checkpoint depends on."""
    names = ("torch", "transformers", "peft", "safetensors")
    return {"lunar-tune": lunar_tune.__version__, **{name: version(name) for name in names}}


class TrainingFolder:
    """The state of one job in the folder of the checkpoint that is being made."""

    def __init__(self, output: Path, document: Mapping[str, Any]) -> None:
        self.path = output / _FOLDER
        self._output, self._document = output, json.dumps(document)
        self._state = self.path / "state.safetensors"
        self._saved_at = self._took = 0.0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process trains into the folder; else raise an InputError."""
        check_save_folder(self._output, resumable=True)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / "lock", timeout=0):
                yield
        except Timeout:
            raise InputError(
                f"--save {self._output}: another process is fine-tuning into this folder."
            ) from None

    def read(self) -> LoopState | None:
        """Return what was kept last; None if nothing was."""
        if not self._state.is_file():
            return None
        try:
            with safe_open(self._state, framework="pt") as file:
                metadata = file.metadata()
                self._check_job(json.loads(metadata["job"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return LoopState(tuple(json.loads(metadata["losses"])), tensors)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--save {self._output}: its unfinished fine-tuning cannot be read ({error}); "
                f"delete {self.path} to start again."
            ) from error

    def _check_job(self, begun: Mapping[str, Any]) -> None:
        wanted = json.loads(self._document)
        changes = [
            f"{name} was {reprlib.repr(begun.get(name))}, is {reprlib.repr(wanted.get(name))}"
            for name in {**begun, **wanted}
            if begun.get(name) != wanted.get(name)
        ]
        if changes:
            raise InputError(
                f"--save {self._output} holds an unfinished fine-tuning with other options: "
                f"{'; '.join(changes)}. Give the same options to resume it, choose another "
                f"folder, or delete {self.path} to start again."
            )

    def keep(self, state: LoopState) -> None:
        """Write the state, unless that was done a moment ago and takes long."""
        began = time.monotonic()
        if began - self._saved_at < self._took / _SHARE:
            return
        from safetensors.torch import save_file

        tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
        metadata = {"job": self._document, "losses": json.dumps(state.losses)}
        with replacing(self._state) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        self._saved_at = time.monotonic()
        self._took = self._saved_at - began
