"""The published LUNAR code's `config/forget.yaml` (at dfa56eb), read as options of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lunar_tune.config.options import NONE, REPORT, RunOptions
from lunar_tune.data.data_catalog import bundled_names
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import is_file, is_folder
from lunar_tune.models.catalog import CATALOG
from lunar_tune.models.chat import PUBLISHED, PUBLISHED_EVAL
from lunar_tune.yaml_files import describe_mistakes, read_yaml, shown

_LONGEST: Final = 4096  # characters of a text, which can grow by each reference in it
_REFERENCE: Final = re.compile(r"\$\{([^{}]*)\}")
_TWO_BOS: Final = ("llama3-8b-instruct", "gemma-7b-it")
"""Families whose questions are asked with two BOS tokens: see `ChatFormat.second_bos`."""
_IGNORED: Final = (
    *("n_train", "n_test", "n_val", "max_new_tokens", "eval_generation_max_length"),  # there too
    *("eval_batch_size", "compute_es_score", "save_folder", "save_path", "defaults", "hydra"),
)


class _Values(BaseModel):
    """The keys that decide something."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model_family: str
    base_model_path: str | None = None
    model_path: str | None = None
    data_name: str
    forget_edge: list[str] = Field(min_length=1)
    layer_modified: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    coeff_list: list[float]
    lr: float = Field(gt=0)
    num_epochs: int = Field(20, ge=1)
    positions: Literal[-1] = -1
    use_harmful: bool = False
    use_unverified: bool = False
    use_different_retain_dataset: bool = False
    different_retain_set_path: str | None = None
    if_eval_factual: bool = False
    factual_data_path: str | None = None
    save_unlearned_model: bool = False
    save_unlearned_model_path: str | None = None
    eval_generation_max_new_tokens: int = Field(512, ge=1)


def read_published_config(path: Path) -> tuple[RunOptions, Path | None, list[str]]:
    """Return a run's options, where to save the model, and the keys that decide nothing here.

    Paths in it lie beside or above it, or in the current folder; an InputError says all mistakes.
    """
    raw = read_yaml(path)
    try:
        values = _Values.model_validate(_resolved(raw))
        options, save_to = _options(values, path.resolve().parent)
    except ValidationError as error:
        mistakes = describe_mistakes(error, [*_Values.model_fields, *_IGNORED])
        raise InputError(f"{path}: {mistakes}.") from error
    except InputError as error:
        raise InputError(f"{path}: {'; '.join(error.messages or [str(error)])}.") from error
    return options, save_to, [key for key in raw if key in _IGNORED]


def _options(values: _Values, folder: Path) -> tuple[RunOptions, Path | None]:
    """Return what the values say, with what that code does without a key; say all mistakes."""
    problems, roots = Problems(), (folder, *folder.parents[:2], Path.cwd())

    def found(name: str | None) -> str | None:
        paths = (root / name for root in roots if name)
        return next((str(path) for path in paths if is_file(path) or is_folder(path)), None)

    def data(key: str, file: str | None = None) -> str:
        name, shipped = getattr(values, key), bundled_names("records")
        if (place := found(file or name)) is None and name not in shipped:
            problems.add(
                f"{key}: is {shown(name)}, no file beside or above {folder} or in the "
                f"current folder and no shipped name (there are: {', '.join(shipped)})"
            )
        return place or str(name)

    other_retain = values.use_different_retain_dataset
    layers, coefficients = values.layer_modified, values.coeff_list
    save_to = values.save_unlearned_model_path if values.save_unlearned_model else None
    prompts, shipped = ("harmful",) * 2 if values.use_harmful else ("unverified", "unverifiable")
    model, weights = _model(values, found)
    if len(layers) != len(coefficients):
        problems.add("layer_modified, coeff_list: give one coefficient for each layer")
    if values.use_harmful == values.use_unverified:
        problems.add("use_harmful, use_unverified: set one of them to true")
    if values.save_unlearned_model and not save_to:
        problems.add("save_unlearned_model_path: is missing or empty")
    options = RunOptions(
        model=model,
        model_path=weights,
        dtype="bfloat16",  # src/model_utils/*_model.py, also on a CPU
        chat_template=PUBLISHED_EVAL if values.model_family in _TWO_BOS else PUBLISHED,
        data=data("data_name", f"dataset/unlearning/{values.data_name}.json"),
        forget_edge=tuple(values.forget_edge),
        reference_prompts=found(f"dataset/splits/{prompts}.json") or shipped,
        reference_check=REPORT,  # it takes all of them
        evaluation_rows=200,  # src/eval_util.py, get_dataloader
        max_new_tokens=values.eval_generation_max_new_tokens,
        factual_data=data("factual_data_path") if values.if_eval_factual else NONE,
        retain_data=data("different_retain_set_path") if other_retain else None,
        fix=(
            f"layer={','.join(map(str, layers))}",
            f"coefficient={','.join(map(str, coefficients))}",
            *(f"learning_rate={values.lr}", f"epochs={values.num_epochs}"),
            "master_dtype=bfloat16",  # the matrix is trained in it
        ),
    )
    problems.raise_if_any()
    return options, Path(save_to) if save_to else None


def _model(values: _Values, found: Callable[[str | None], str | None]) -> tuple[str, str | None]:
    """Return the model and its weights; that code loads model_path and knows the family by name."""
    base, tuned = values.base_model_path, values.model_path
    # Families of that code are our names with -instruct, -chat or -it.
    family = re.sub(r"-(instruct|chat|it)$", "", values.model_family, flags=re.IGNORECASE)
    model = found(base) or _catalogue_name(base or family)
    if not tuned or tuned == base:
        return model, None
    weights = found(tuned)
    known = weights is not None and bool(base or model in CATALOG)
    return (model, weights) if known else (weights or _catalogue_name(tuned), None)


def _catalogue_name(text: str) -> str:
    """Return the catalogue's name for a family or a hub id; another text as it is."""
    asked = text.casefold()
    for name, entry in CATALOG.items():
        hub_id = (entry.hub_id or name).casefold()
        if asked in (name, hub_id, hub_id.split("/")[-1]):
            return name
    return text


def _resolved(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that decide something; `${key}` is that key's value, a list as A_B."""

    def referred(reference: re.Match[str]) -> str:
        value = raw.get(reference[1], reference[0])
        return "_".join(map(str, value if isinstance(value, list) else [value]))[:_LONGEST]

    values = {key: value for key, value in raw.items() if key not in _IGNORED}
    for key, written in values.items():
        for _ in range(4):  # a reference may lead to another
            if isinstance(written, str) and "${" in values[key]:
                values[key] = _REFERENCE.sub(referred, values[key])[:_LONGEST]
        if "${" in str(values[key]):  # also in a list, where references are not replaced
            raise InputError(
                f"{key}: {shown(values[key])} refers to no key of this file, or in a circle; "
                "write the value itself"
            )
    return values
