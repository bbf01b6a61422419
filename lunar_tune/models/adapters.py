"""A PEFT adapter becomes part of its base model's weights, as PEFT itself merges it."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lunar_tune.errors import ModelError
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.weights import ADAPTER_FILE, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMBEDDING = re.compile(r"embed_tokens(\.modules_to_save)?\.weight$")
logger = logging.getLogger(__name__)


def merge_adapter(model: PreTrainedModel, spec: ModelSpec, folder: Path) -> PreTrainedModel:
    """Return a model, which is modified, with an adapter merged, or raise a ModelError.

    `check_weights` has looked at its configuration. A base model of another name than the one that
    it was trained on is warned of; what has another shape does not fit.
    """
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    config = json.loads((folder / ADAPTER_FILE).read_bytes())
    problem = f"--model-path {folder}: the adapter does not fit {spec.source}:"
    known = LoraConfig.__dataclass_fields__
    if unknown := sorted(name for name, value in config.items() if value and name not in known):
        version = config.get("peft_version", "another version")
        raise ModelError(
            f"{problem} peft {version} has saved it with {', '.join(unknown)}, which the peft that "
            "is installed does not know and would leave out. Install that version."
        )
    base = str(config.get("base_model_name_or_path") or spec.source)
    if Path(base).name.lower() != Path(spec.source).name.lower():
        said = "%s was trained on %s, and is put on %s: unless these are the same weights, it fails"
        logger.warning(said, folder, base, spec.source)
    try:
        with (
            warnings.catch_warnings(),
            safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file,
        ):
            warnings.simplefilter("ignore")  # advice on saving again, and a name that is deprecated
            names = set(file.keys())
            found = filter(_EMBEDDING.search, names)
            tokens = {file.get_slice(name).get_shape()[0] for name in found}
            if tokens:  # trained with tokens more or fewer, of which it has all rows
                model.resize_token_embeddings(max(tokens), mean_resizing=False)
            adapted = PeftModel.from_pretrained(model, folder)
            least, most = (  # whether an adapter holds embeddings as well is a choice
                set(get_peft_model_state_dict(adapted, save_embedding_layers=choice))
                for choice in (False, True)
            )
            merged: PreTrainedModel = adapted.merge_and_unload()
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ModelError(f"{problem} {error}") from error
    if unread := (least - names) | (
        names - most
    ):  # peft leaves out what has no place, and says so in a warning at most
        raise ModelError(
            f"{problem} {len(unread)} tensors are in one and not in the other, among them "
            f"{min(unread)}."
        )
    return merged
