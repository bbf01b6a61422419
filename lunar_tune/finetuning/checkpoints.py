"""What a fine-tuning that was cut short left behind, and going on from there.

OUTPUT/.training/job.json             what is being trained; another job is refused
OUTPUT/.training/state.safetensors    trained weights, AdamW's moments, losses so far
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lunar_tune.errors import InputError
from lunar_tune.files import check_writable, replacing, write_atomically
from lunar_tune.training.gradient_loop import LoopState

__all__ = ["TRAINING_FOLDER", "TrainingFolder", "check_output"]

TRAINING_FOLDER = ".training"
# The state of all weights of a large model is three times as large as the model in float32: it is
# kept after an epoch as long as keeping takes no more than this share of the time.
_SHARE = 0.1
_LOSSES = "losses"


def check_output(output: Path) -> None:
    """Check that training can begin or go on in a folder, before anything is loaded.

    Raises:
        InputError: It holds something else, or cannot be written.
    """
    if output.is_file():
        raise InputError(f"--save {output}: is a file, not a folder.")
    if output.is_dir() and any(output.iterdir()) and not (output / TRAINING_FOLDER).is_dir():
        raise InputError(
            f"--save {output}: the folder is not empty and holds no unfinished fine-tuning; "
            "choose another."
        )
    check_writable(output, f"--save {output}")


class TrainingFolder:
    """The state of one job in its output folder.

    Args:
        output: The folder of the checkpoint that is being made.
        document: What is being trained, as plain values.
    """

    def __init__(self, output: Path, document: Mapping[str, Any]) -> None:
        self.path = output / TRAINING_FOLDER
        self._output, self._document = output, dict(document)
        self._state = self.path / "state.safetensors"
        self._saved_at = self._took = 0.0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process trains into the folder; the job is noted.

        Raises:
            InputError: Another process does, or another job was begun here.
        """
        check_output(self._output)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / "lock", timeout=0):
                self._check_job()
                yield
        except Timeout:
            raise InputError(
                f"--save {self._output}: another process is fine-tuning into this folder."
            ) from None

    def read(self) -> LoopState | None:
        """Return what was kept last; None if nothing was.

        Raises:
            InputError: It cannot be read.
        """
        if not self._state.is_file():
            return None
        try:
            with safe_open(self._state, framework="pt") as file:
                losses = json.loads(file.metadata()[_LOSSES])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--save {self._output}: its unfinished fine-tuning cannot be read ({error}); "
                f"delete {self.path} to begin anew."
            ) from error
        return LoopState(tuple(losses), tensors)

    def keep(self, state: LoopState) -> None:
        """Write the state, unless that was done a moment ago and takes long."""
        began = time.monotonic()
        if began - self._saved_at < self._took / _SHARE:
            return
        with replacing(self._state) as temporary:
            tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
            save_file(tensors, temporary, metadata={_LOSSES: json.dumps(list(state.losses))})
        self._saved_at = time.monotonic()
        self._took = self._saved_at - began

    def remove(self) -> None:
        """Remove it: the training has come to its end."""
        shutil.rmtree(self.path)

    def _check_job(self) -> None:
        noted = self.path / "job.json"
        wanted = json.loads(json.dumps(self._document))
        try:
            begun = json.loads(noted.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            begun = None
        if not self._state.is_file():  # nothing was computed yet
            write_atomically(noted, json.dumps(wanted, indent=1).encode())
            return
        if not isinstance(begun, dict):
            raise InputError(
                f"--save {self._output}: {noted} cannot be read; delete {self.path} to begin anew."
            )
        other = [name for name in {**begun, **wanted} if begun.get(name) != wanted.get(name)]
        if other:
            shown = "; ".join(
                f"{name} was {_brief(begun.get(name))}, is {_brief(wanted.get(name))}"
                for name in other
            )
            raise InputError(
                f"--save {self._output} holds an unfinished fine-tuning of another kind: {shown}."
                f" Give the same options to go on with it, choose another folder, or delete "
                f"{self.path} to begin anew."
            )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
