"""What a model is, in a few digests: a key of what it computes, and whether it is another."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lunar_tune.config.options import AUTO, OWN
from lunar_tune.errors import ModelError
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.device import dtype_of
from lunar_tune.models.digests import digest_of, weights_digest
from lunar_tune.models.loading import LoadedModel, load_config

_HALVES = ("bfloat16", "float16")
Identity = Mapping[str, Sequence[str]]
"""Of a model's weights, configuration, tokenizer and chat template: what the digest of each was
taken with, and the digest. Those that were taken with something else do not compare."""
logger = logging.getLogger(__name__)


def told_apart(model: ModelSpec, *others: str) -> dict[str, Any]:
    """Return what tells weights and number format from others before they are read.

    That is a commit of the hub, of a folder names, sizes and times of its weights' files and of
    `others`, patterns of names. A model that cannot be found is a ModelError.
    """
    commit = None
    if not Path(model.source).is_dir():
        commit = getattr(load_config(model), "_commit_hash", None) or model.revision
    patterns = ("*.safetensors", *others)
    files = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for folder in (model.source, model.weights)
        if folder
        for file in sorted({f for one in patterns for f in Path(folder).glob(one)})
    ]
    return {
        "base": model.name,
        "source": model.source,
        "weights": model.weights,
        "revision": commit,
        "files": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16] if files else None,
        "dtype": str(dtype_of(model)),
    }


def fingerprint(loaded: LoadedModel) -> str:
    """Return a SHA-256 in hexadecimal of everything that a model's activations depend on."""
    libraries = {name: ".".join(version(name).split(".")[:2]) for name in ("torch", "transformers")}
    parts = {
        "config": _configuration(loaded),
        "attention": loaded.model.config._attn_implementation,
        "device": loaded.device.type,
        "libraries": libraries,
        "weights": weights_digest(loaded.model),
    }
    return digest_of(parts)


def identity_of(loaded: LoadedModel, chat: ChatFormat, *, number_format: str = "") -> Identity:
    """Return what tells a model from another one, wherever and however it was loaded.

    Weights in float32 are looked at in the 16-bit `number_format` of an earlier digest: to that
    they would have been rounded, whatever the checkpoint has. Those with an adapter are looked at
    before it was merged, which no two machines need do alike.
    """
    import torch

    tensors = loaded.model.state_dict().values()
    own = "+".join(sorted({str(one.dtype).removeprefix("torch.") for one in tensors}))
    as_one = number_format if own == "float32" and number_format in _HALVES else None
    if loaded.merged_from is not None:
        weights = [f"{own}, with an adapter", loaded.merged_from]
    else:
        dtype = getattr(torch, as_one) if as_one else None
        weights = [as_one or own, weights_digest(loaded.model, dtype)]
    tokenizer: Any = loaded.tokenizer
    words: Any = tokenizer.get_vocab()
    if tokenizer.is_fast:
        words = json.loads(tokenizer.backend_tokenizer.to_str())
        words.update(padding=None, truncation=None)  # of its last call
    configuration = {**_configuration(loaded), "dtype": None, "eos": loaded.eos_ids}
    template = tokenizer.chat_template if chat.template == OWN else chat.template
    libraries = {name: f"{name} {version(name)}" for name in ("transformers", "tokenizers")}
    return {
        "weights": weights,
        "configuration": [libraries["transformers"], digest_of(configuration)],
        "tokenizer": [
            ", ".join(libraries.values()),
            digest_of([words, tokenizer.special_tokens_map, tokenizer.all_special_ids]),
        ],
        "chat template": ["", digest_of(template)],
    }


def number_format_of(known: Identity) -> str:
    """Return the `--dtype` that a model was computed in; `auto` where that is not known."""
    whole, _, _ = known.get("weights", ("",))[0].partition(",")  # what follows tells of an adapter
    return next((one for one in (*_HALVES, "float32") if one in whole.split("+")), AUTO)


def differing(now: Identity, before: Identity) -> list[str]:
    """Return the parts of a model that differ from an earlier one's, as far as they compare."""
    both = now.keys() & before.keys()
    return [
        one
        for one in now
        if one in both and now[one][0] == before[one][0] and now[one][1] != before[one][1]
    ]


def check_same(loaded: LoadedModel, chat: ChatFormat, before: Identity) -> None:
    """Check that a model is the one that it was, or raise a ModelError; warn of what is unknown."""
    number_format = before["weights"][0] if "weights" in before else ""
    now, spec = identity_of(loaded, chat, number_format=number_format), loaded.spec
    changed = differing(now, before)
    if changed:
        place = spec.source if spec.weights is None else f"{spec.source} with {spec.weights}"
        raise ModelError(
            f"model {place}: its {' and '.join(changed)} changed since the search began, so what "
            "it does now does not compare with the trials. Put back the files that the search "
            "began with, or start a new search."
        )
    for one in now.keys() & before.keys():
        if now[one][0] != before[one][0]:
            told = (
                "%s: whether its %s changed since the search began is not known: %s here, %s then"
            )
            logger.warning(told, spec.source, one, now[one][0], before[one][0])


def _configuration(loaded: LoadedModel) -> dict[str, Any]:
    """Return a model's configuration without where and with what it was saved."""
    config: dict[str, Any] = loaded.model.config.to_dict()
    return {n: v for n, v in config.items() if n not in ("_name_or_path", "transformers_version")}
