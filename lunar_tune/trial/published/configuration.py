"""The configuration file of the published LUNAR code, read as options of this project.

Covers: every key of `config/forget.yaml` of facebookresearch/LUNAR (at dfa56eb), the layout of
that repository beside it, and a note for each key of what was made of it.
Does not cover: types of the values and references between them (`keys`).

What that code does without a key, it does here too: the user's bare turn as prompt, a bfloat16
matrix, every token of a prompt, all retain questions, the first 200 rows of each set evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lunar_tune.config.adamw_settings import AdamWSettings
from lunar_tune.config.decoding_settings import DecodingSettings
from lunar_tune.config.lunar_settings import LunarSettings
from lunar_tune.config.run_options import NONE, RunOptions
from lunar_tune.data.bundled import bundled_names
from lunar_tune.errors import InputError, Problems
from lunar_tune.models.chat import PUBLISHED
from lunar_tune.trial.assemble import known_depth
from lunar_tune.trial.published.keys import SWITCHED, PublishedValues, read_values
from lunar_tune.trial.published.model_paths import Places, choose_model
from lunar_tune.yaml_files import read_yaml_mapping, shown

__all__ = ["PublishedNote", "PublishedRun", "read_published_config"]

EVALUATED_ROWS = 200  # src/eval_util.py, get_dataloader, at dfa56eb

_UNUSED_THERE = "ignored: the published code does not use it either"
_IGNORED: Final = {
    "n_train": _UNUSED_THERE,
    "n_test": _UNUSED_THERE,
    "n_val": _UNUSED_THERE,
    "max_new_tokens": f"{_UNUSED_THERE}; eval_generation_max_new_tokens is the answers' budget",
    "eval_generation_max_length": "ignored: eval_generation_max_new_tokens wins there as well",
    "compute_es_score": "ignored: extraction strength is computed with --metrics",
    "save_folder": "ignored: --output says where results go",
    "save_path": "ignored: --output says where results go",
    "defaults": "ignored: Hydra's list of further files; these are not read",
    "hydra": "ignored: settings of Hydra itself",
}


@dataclass(frozen=True, slots=True)
class PublishedNote:
    """What was made of one key."""

    key: str
    value: str
    """As written in the file, or `not in the file`."""
    became: str
    """What it is here, or why it is ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRun:
    """A run as the published code's file describes it."""

    options: RunOptions
    parameters: Mapping[str, Any]
    """`layer` and `coefficient` as lists of one length, and `learning_rate`."""
    save_to: Path | None
    """Where the unlearned model is to be saved; None if it is not."""
    notes: tuple[PublishedNote, ...]
    """One for each key of the file, in its order, then what that code does without a key."""


def read_published_config(path: Path) -> PublishedRun:
    """Read the `forget.yaml` of the published code.

    Paths in it are looked for beside and above the file, as that repository has them, and in the
    current folder.

    Raises:
        InputError: The file cannot be read or contradicts itself; all of it is said at once.
    """
    path = Path(path).expanduser()
    raw = read_yaml_mapping(path)
    problems = Problems()
    values, bad = read_values(raw, problems)
    run = _Translation(values, bad, Places.of(path), problems).run(raw)
    if problems.messages or run is None:
        listed = problems.messages
        head = f"{path}: " if len(listed) == 1 else f"{path}: {len(listed)} things are wrong:\n  - "
        raise InputError(head + "\n  - ".join(listed))
    return run


@dataclass(slots=True)
class _Translation:
    """Turns the published keys into options, one small question at a time."""

    values: PublishedValues
    bad: frozenset[str]
    """Keys that have no usable value; what depends on them is not asked."""
    places: Places
    problems: Problems
    options: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    save_to: Path | None = None
    became: dict[str, str] = field(default_factory=dict)

    def run(self, raw: Mapping[str, Any]) -> PublishedRun | None:
        """Return the run, or None where something was noted as wrong."""
        for step, keys in (
            (self._read_model, ("model_family", "base_model_path", "model_path")),
            (self._read_data, ("data_name",)),
            (self._read_forget_edges, ("forget_edge",)),
            (self._read_reference, ("use_harmful", "use_unverified")),
            (self._read_retain, ("use_different_retain_dataset", "different_retain_set_path")),
            (self._read_factual, ("if_eval_factual", "factual_data_path")),
            (self._read_save_to, ("save_unlearned_model", "save_unlearned_model_path")),
            (self._read_fit, ("layer_modified", "coeff_list", "lr", "num_epochs", "positions")),
            (self._read_decoding, ("eval_batch_size", "eval_generation_max_new_tokens")),
        ):
            if not self.bad.intersection(keys):
                step()
        if not self.problems.messages:
            self._check_depth()
        if self.problems.messages:
            return None
        return PublishedRun(
            options=RunOptions(
                chat_template=PUBLISHED, evaluation_rows=EVALUATED_ROWS, **self.options
            ),
            parameters=self.parameters,
            save_to=self.save_to,
            notes=self._notes(raw),
        )

    def _read_model(self) -> None:
        choice = choose_model(self.values, self.places, self.problems)
        self.options |= {"model": choice.model, "model_path": choice.model_path}
        self.became |= choice.became

    def _read_data(self) -> None:
        name = self.values.data_name
        self.options["data"] = self._file("data_name", f"dataset/unlearning/{name}.json", name)
        self.became["data_name"] = f"--data {self.options['data']}"

    def _read_forget_edges(self) -> None:
        self.options["forget_edges"] = tuple(self.values.forget_edge)
        self.became["forget_edge"] = f"--forget-edge {', '.join(self.values.forget_edge)}"

    def _file(self, key: str, relative: str, written: str) -> str | None:
        """Return a file of pairs, or a shipped name; note that there is neither."""
        found = self.places.file(relative)
        if found is not None:
            return str(found)
        shipped = bundled_names("records")
        if written in shipped:
            return written
        self.problems.add(
            f"{key}: is {shown(written)}, no file and no shipped name "
            f"(there are: {', '.join(shipped)}); looked at {self.places.tried(relative)}"
        )
        return None

    def _read_reference(self) -> None:
        used, other, file_name, shipped = (
            ("use_harmful", "use_unverified", "harmful.json", "harmful")
            if self.values.use_harmful
            else ("use_unverified", "use_harmful", "unverified.json", "unverifiable")
        )
        relative = f"dataset/splits/{file_name}"
        found = self.places.file(relative)
        self.options["reference_prompts"] = shipped if found is None else str(found)
        self.became[used] = f"--reference-prompts {self.options['reference_prompts']}"
        if found is None:
            self.became[used] += f": {relative} is not there; the shipped prompts are others"
        self.became[other] = f"unused: {used} is true"

    def _read_retain(self) -> None:
        name = self.values.different_retain_set_path
        if not self.values.use_different_retain_dataset or not name:
            self.became["use_different_retain_dataset"] = "the retain set is the data's other edges"
            return
        self.options["retain_data"] = self._file("different_retain_set_path", name, name)
        self.became["use_different_retain_dataset"] = (
            "another retain set for the fit; evaluation keeps the data's own, as there"
        )
        self.became["different_retain_set_path"] = f"--retain-data {self.options['retain_data']}"

    def _read_factual(self) -> None:
        name = self.values.factual_data_path
        if not self.values.if_eval_factual or not name:
            self.options["factual_data"] = NONE
            self.became["if_eval_factual"] = f"--factual-data {NONE}"
            return
        self.options["factual_data"] = self._file("factual_data_path", name, name)
        self.became["if_eval_factual"] = "the factual set is evaluated"
        self.became["factual_data_path"] = f"--factual-data {self.options['factual_data']}"

    def _read_save_to(self) -> None:
        folder = self.values.save_unlearned_model_path
        if not self.values.save_unlearned_model or not folder:
            self.became["save_unlearned_model"] = "the unlearned model is not saved"
            return
        self.save_to = Path(folder).expanduser()
        self.became["save_unlearned_model"] = "the unlearned model is saved"
        self.became["save_unlearned_model_path"] = f"saved to {self.save_to}"

    def _read_fit(self) -> None:
        values = self.values
        self.parameters = {
            "layer": list(values.layer_modified),
            "coefficient": list(values.coeff_list),
            "learning_rate": values.lr,
        }
        self.options["lunar"] = LunarSettings(
            adamw=AdamWSettings(epochs=values.num_epochs, master_dtype="bfloat16")
        )
        self.became |= {
            "layer_modified": f"--layer {', '.join(map(str, values.layer_modified))}",
            "coeff_list": f"--coefficient {', '.join(map(str, values.coeff_list))}",
            "lr": f"--learning-rate {values.lr}",
            "num_epochs": f"--epochs {values.num_epochs}",
            "positions": "directions are taken at the last prompt token, as always here",
        }

    def _read_decoding(self) -> None:
        budget, size = self.values.eval_generation_max_new_tokens, self.values.eval_batch_size
        self.options["decoding"] = DecodingSettings(max_new_tokens=budget, batch_size=size)
        self.became["eval_generation_max_new_tokens"] = f"--max-new-tokens {budget}"
        self.became["eval_batch_size"] = (
            f"--batch-size {size}" if size else "as many rows in a batch as suit the device"
        )

    def _check_depth(self) -> None:
        """Check the layers where the number of blocks can be known without loading the model."""
        model, deepest = self.options["model"], max(self.values.layer_modified)
        depth = known_depth(RunOptions(model=model, model_path=self.options["model_path"]))
        if depth is not None and deepest >= depth:
            self.problems.add(
                f"layer_modified: names {deepest}, but {model} has {depth} blocks: 0 to {depth - 1}"
            )

    def _notes(self, raw: Mapping[str, Any]) -> tuple[PublishedNote, ...]:
        notes = [PublishedNote(key, _written(raw[key]), self._fate(key)) for key in raw]
        notes += [
            PublishedNote(key, "not in the file", became)
            for key, became in self.became.items()
            if key not in raw
        ]
        for what, became in (
            ("rows evaluated", f"--evaluation-rows {EVALUATED_ROWS}: the first of each set"),
            ("prompt format", f"--chat-template {PUBLISHED}: the bare user turn"),
            ("number format", "--master-dtype bfloat16: the matrix is trained in it"),
            ("points of the fit", "all prompt tokens are moved, all retain tokens are kept"),
        ):
            notes.append(PublishedNote(what, "always so there", became))
        return tuple(notes)

    def _fate(self, key: str) -> str:
        if key in self.became:
            return self.became[key]
        if key in SWITCHED:
            return f"unused: {SWITCHED[key]} is not true"
        return _IGNORED.get(key, "unknown: no key of the published code; ignored")


def _written(value: object) -> str:
    """Return a value as a table shows it."""
    return value if isinstance(value, str) else shown(value)
