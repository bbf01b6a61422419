"""The answers of a search on disk, a file an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lunar_tune.study.folder import Folder
from lunar_tune.study.tables import write_answers
from lunar_tune.trial.worker import TrialResult

__all__ = ["AnswerFiles"]


@dataclass(frozen=True, slots=True)
class AnswerFiles:
    """Writes answers, each file atomically."""

    folder: Folder
    text: bool = True
    """Whether questions and answers may be written, and not only their numbers and scores."""

    def write_trial(self, number: int, result: TrialResult) -> str:
        """Write a trial's answers; return the file's SHA-256."""
        return self._write(self.folder.answers(number), result)

    def write_base_model(self, result: TrialResult) -> None:
        """Write the base model's answers."""
        self._write(self.folder.vanilla_answers, result)

    def write_confirmation(
        self, number: int, result: TrialResult, baseline: TrialResult | None
    ) -> None:
        """Write the answers of a full evaluation, and the base model's where they are others."""
        self._write(self.folder.full_answers(number), result)
        if baseline is not None:
            self._write(self.folder.vanilla_full_answers, baseline)

    def _write(self, path: Path, result: TrialResult) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        losses = result.fit.losses if result.fit is not None else ()
        return write_answers(path, result.evaluation.rows, losses, text=self.text)
