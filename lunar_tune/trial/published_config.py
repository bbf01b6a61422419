"""The published LUNAR code's `config/forget.yaml` (at dfa56eb), read as options of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lunar_tune.config.run_options import NONE, RunOptions
from lunar_tune.data.data_catalog import bundled_names
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import is_file, is_folder
from lunar_tune.models.catalog import CATALOG
from lunar_tune.models.chat import PUBLISHED
from lunar_tune.yaml_files import describe_mistakes, read_yaml, shown

__all__ = ["PublishedRun", "read_published_config"]

EVALUATED_ROWS: Final = 200  # src/eval_util.py, get_dataloader
_LONGEST: Final = 4096  # characters of a text, which can grow by each reference in it
_REFERENCE: Final = re.compile(r"\$\{([^{}]*)\}")
# What that code calls a model, where neither our name nor the hub's says it.
_FAMILIES: Final = {
    **{"llama3-8b-instruct": "llama3-8b", "llama2-7b-chat": "llama2-7b"},
    "mistral-7b-instruct": "mistral-7b",
}
_PROMPTS: Final = {
    "use_harmful": ("dataset/splits/harmful.json", "harmful"),
    "use_unverified": ("dataset/splits/unverified.json", "unverifiable"),
}
_IGNORED: Final = {
    **dict.fromkeys(("n_train", "n_test", "n_val", "max_new_tokens"), "unused there as well"),
    **dict.fromkeys(("save_folder", "save_path"), "ignored: --save says where the model goes"),
    **dict.fromkeys(("defaults", "hydra"), "ignored: files and settings of Hydra"),
    "eval_batch_size": "ignored: batches are as large as memory allows",
    "eval_generation_max_length": "ignored: eval_generation_max_new_tokens wins there as well",
    "compute_es_score": "ignored: --metrics extraction_strength",
}
_ALWAYS: Final = {
    "rows evaluated": f"--evaluation-rows {EVALUATED_ROWS}: the first of each set",
    "prompt format": f"--chat-template {PUBLISHED}: the bare user turn",
    "number format": "master_dtype bfloat16: the matrix is trained in it",
    "points of the fit": "all prompt tokens are moved, all retain tokens are kept",
}
_Layers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Values(BaseModel):
    """The keys that decide something; a title is the option that takes the value."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model_family: str = Field(title="--model")
    base_model_path: str | None = Field(None, title="--model")
    model_path: str | None = Field(None, title="weights from")
    data_name: str = Field(title="--data")
    forget_edge: list[str] = Field(title="--forget-edge", min_length=1)
    layer_modified: _Layers = Field(title="layer")
    coeff_list: list[float] = Field(title="coefficient")
    lr: float = Field(title="learning_rate", gt=0)
    num_epochs: int = Field(20, title="epochs", ge=1)
    positions: Literal[-1] = Field(-1, title="the last prompt token, as always:")
    use_harmful: bool = Field(False, title="--reference-prompts")
    use_unverified: bool = Field(False, title="--reference-prompts")
    use_different_retain_dataset: bool = False
    different_retain_set_path: str | None = Field(None, title="--retain-data")
    if_eval_factual: bool = False
    factual_data_path: str | None = Field(None, title="--factual-data")
    save_unlearned_model: bool = False
    save_unlearned_model_path: str | None = Field(None, title="--save")
    eval_generation_max_new_tokens: int = Field(512, title="--max-new-tokens", ge=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRun:
    """A run as the published code's file describes it."""

    options: RunOptions
    save_to: Path | None
    notes: tuple[tuple[str, str, str], ...]
    """Key, value as written and what became of it, for each key of the file, in its order; then
    what that code does without a key."""


def read_published_config(path: Path) -> PublishedRun:
    """Read the file; paths in it lie beside or above it, or in the current folder.

    Raises:
        InputError: The file cannot be read, or something in it is wrong.
    """
    raw = read_yaml(path)
    try:
        values = _Values.model_validate(_resolved(raw))
        taken = _taken(values, path.resolve().parent)
    except ValidationError as error:
        mistakes = describe_mistakes(error, [*_Values.model_fields, *_IGNORED])
        raise InputError(f"{path}: {'; '.join(mistakes)}.") from error
    except InputError as error:
        raise InputError(f"{path}: {error}.") from error
    options = RunOptions(
        model=taken["model"],
        model_path=taken["weights"],
        chat_template=PUBLISHED,
        data=taken["data_name"],
        forget_edge=tuple(values.forget_edge),
        retain_data=taken["different_retain_set_path"],
        factual_data=taken["factual_data_path"] or NONE,
        reference_prompts=taken["use_harmful"] or taken["use_unverified"],
        evaluation_rows=EVALUATED_ROWS,
        max_new_tokens=values.eval_generation_max_new_tokens,
        fix=(
            f"layer={','.join(map(str, values.layer_modified))}",
            f"coefficient={','.join(map(str, values.coeff_list))}",
            f"learning_rate={values.lr}",
            f"epochs={values.num_epochs}",
            "master_dtype=bfloat16",
        ),
    )
    save_to = taken["save_unlearned_model_path"]
    became = dict(_IGNORED)
    for key, field in _Values.model_fields.items():
        if field.title is None:
            became[key] = "a switch for a path"
        elif taken[key] is None:
            became[key] = "unused: another key decides"
        else:
            became[key] = f"{field.title} {_shown(taken[key])}"
        if key in _PROMPTS and taken[key] == _PROMPTS[key][1]:
            became[key] += " (shipped, not those of that code)"
    notes = [(key, _shown(value), became[key]) for key, value in raw.items()]
    notes += [(what, "always so there", done) for what, done in _ALWAYS.items()]
    return PublishedRun(
        options=options, save_to=Path(save_to) if save_to else None, notes=tuple(notes)
    )


def _taken(values: _Values, folder: Path) -> dict[str, Any]:
    """Return what each option takes, by key: paths found, None where another key decides.

    Raises:
        InputError: Keys contradict each other, or data are not there; all of it is said.
    """
    taken, problems = values.model_dump(), Problems()
    roots = (folder, *folder.parents[:2], Path.cwd())

    def found(name: str | None) -> str | None:
        paths = (root / name for root in roots if name)
        return next((str(path) for path in paths if is_file(path) or is_folder(path)), None)

    def data(key: str, name: str | None) -> str | None:
        shipped = bundled_names("records")
        place = found(name) or (taken[key] if taken[key] in shipped else None)
        if place is None:
            problems.add(
                f"{key}: is {shown(taken[key])}, no file beside or above {folder} or in the "
                f"current folder and no shipped name (there are: {', '.join(shipped)})"
            )
        return place

    if len(values.layer_modified) != len(values.coeff_list):
        problems.add("layer_modified, coeff_list: give one coefficient for each layer")
    if values.use_harmful == values.use_unverified:
        problems.add("use_harmful, use_unverified: set one of them to true")
    if not values.save_unlearned_model:
        taken["save_unlearned_model_path"] = None
    elif not values.save_unlearned_model_path:
        problems.add("save_unlearned_model_path: is missing or empty")
    for switch, (file, shipped) in _PROMPTS.items():
        taken[switch] = (found(file) or shipped) if taken[switch] else None
    taken["data_name"] = data("data_name", f"dataset/unlearning/{values.data_name}.json")
    for switch, key in (
        ("use_different_retain_dataset", "different_retain_set_path"),
        ("if_eval_factual", "factual_data_path"),
    ):
        taken[key] = data(key, taken[key]) if taken[switch] else None
    if problems.messages:
        raise InputError("; ".join(problems.messages))
    # That code loads model_path; the family only chooses its prompt format. Here the base path, or
    # else the family, is the model, and model_path its weights if it is a folder.
    base = "base_model_path" if values.base_model_path else "model_family"
    model = found(values.base_model_path) or _catalogue_name(taken[base])
    tuned = values.model_path if values.model_path != values.base_model_path else None
    weights = found(tuned)
    taken |= {"model_family": None, "base_model_path": None, base: model, "model_path": weights}
    if tuned and (weights is None or (base == "model_family" and model not in CATALOG)):
        model, weights = weights or _catalogue_name(tuned), None
        taken |= {base: None, "model_path": model}
    return taken | {"model": model, "weights": weights}


def _shown(value: object) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else shown(value)


def _catalogue_name(text: str) -> str:
    """Return the catalogue's name for a family or a hub id; another text as it is."""
    asked = text.casefold()
    for name, entry in CATALOG.items():
        hub_id = (entry.hub_id or name).casefold()
        if asked in (name, hub_id, hub_id.rpartition("/")[2]):
            return name
    return _FAMILIES.get(asked, text)


def _resolved(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that decide something, `${key}` references replaced."""
    values = {key: value for key, value in raw.items() if key not in _IGNORED}
    for _ in range(4):  # each halves what is left of a chain
        values = {key: _replaced({**raw, **values}, key, value) for key, value in values.items()}
    for key, value in values.items():
        if "${" in str(value):
            raise InputError(f"{key}: its references do not end; write the value itself")
    return values


def _replaced(known: Mapping[str, Any], key: str, value: Any) -> Any:
    """Return a value with its references replaced once; a list within a text becomes A_B."""
    if isinstance(value, list):
        items = [_replaced(known, key, item) for item in value]
        if any(isinstance(item, list) for item in items):
            raise InputError(f"{key}: holds a list in a list; write plain values")
        return items
    if not isinstance(value, str):
        return value
    targets: dict[str, Any] = {}
    for name in _REFERENCE.findall(value):
        if name not in known:
            problem = f"${{{name}}} refers to no key of this file"
            raise InputError(f"{key}: {problem}; write the value itself")
        target = known[name]
        targets[name] = "_".join(map(str, target if isinstance(target, list) else [target]))
    if whole := _REFERENCE.fullmatch(value):
        return known[whole[1]]
    return _REFERENCE.sub(lambda one: targets[one[1]][:_LONGEST], value[:_LONGEST])
