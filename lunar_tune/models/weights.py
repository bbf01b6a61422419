"""What a folder of a checkpoint or a PEFT adapter holds, looked at before anything is loaded."""

from __future__ import annotations

import json
import math
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from lunar_tune.errors import ModelError
from lunar_tune.files import is_file, is_folder, read_settings

ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHTS = "model.safetensors"  # or its index; what else lies there, libraries do not load
_MOST_BLOCKS = 1000  # ten times those of the deepest models
_MOST_BYTES = 200_000_000  # of a tokenizer's file; Gemma 3's has 33 million
_MOST_SIZES = 2**31  # of one dimension
_MOST_PACKED = 32  # weights in one number of a quantised file: of one bit each in an int32
# Of PEFT's LoRA what changes more than a product of two matrices, and has not been tried.
_UNTRIED = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"),
    *("megatron_config", "monteclora_config", "use_bdlora", "use_qalora", "velora_config"),
)


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds a PEFT adapter."""
    return is_file(folder / ADAPTER_FILE)


def check_weights(path: str, option: str) -> Path:
    """Return the folder of a checkpoint or adapter that an option names, or raise a ModelError."""
    folder = Path(path).expanduser()
    if not is_folder(folder):
        raise ModelError(f"{option} {path}: no such folder.")
    wanted = (ADAPTER_WEIGHTS,) if is_adapter(folder) else ("config.json", "*.safetensors")
    for pattern in wanted:
        if not any(folder.glob(pattern)):
            raise ModelError(
                f"{option} {path}: holds no {pattern} file. A checkpoint has config.json and "
                f"*.safetensors, a PEFT adapter {ADAPTER_FILE} and {ADAPTER_WEIGHTS}; pickled "
                "*.bin files can run code and are not read: save them with save_pretrained()."
            )
    check_folder(folder, f"{option} {path}")
    return folder.resolve()


def check_folder(folder: Path, option: str) -> None:
    """Raise a ModelError if loading a folder would hang, fill the memory, or not give its model."""
    for file in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")):
        with suppress(OSError):  # a link to nothing
            status = file.stat()
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise ModelError(f"{option}: {file.name} is a device or a pipe, not a file.")
            if status.st_size > _MOST_BYTES and file.suffix in {
                ".json",
                ".jinja",
                ".model",
                ".txt",
            }:
                raise ModelError(
                    f"{option}: {file.name} has {status.st_size:,} bytes, and no model's "
                    f"{file.suffix} file has more than {_MOST_BYTES:,}. Take it from its source."
                )
    if is_adapter(folder):
        _check_adapter(_settings(folder / ADAPTER_FILE, option), option)
    elif is_file(folder / "config.json"):
        _check_sizes(_settings(folder / "config.json", option), folder, option)


def _settings(file: Path, option: str) -> dict[str, Any]:
    """Return what a JSON file holds."""
    try:
        document = json.loads(read_settings(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{option}: {file.name} cannot be read ({error}).") from error
    if not isinstance(document, dict):
        raise ModelError(f"{option}: {file.name} holds no object.")
    return document


def _check_sizes(config: dict[str, Any], folder: Path, option: str) -> None:
    """Refuse a configuration of more numbers than the weights beside it hold.

    The least that a model of the suitable families has: embeddings, and of each block one matrix of
    the MLP and one of the attention.
    """
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    sizes = {name: config.get(name) for name in (*names, "num_attention_heads", "head_dim")}
    known = {name: size for name, size in sizes.items() if type(size) is int}
    wrong = {name: size for name, size in known.items() if not 0 < size < _MOST_SIZES}
    vocabulary, width, blocks, inner = (known.get(name, 1) for name in names)
    if blocks > _MOST_BLOCKS:
        wrong["num_hidden_layers"] = blocks
    heads = known.get("num_attention_heads", 1) * known.get("head_dim", 1)
    least, held = vocabulary * width + blocks * width * (inner + heads), n_stored(folder)
    each = _MOST_PACKED if config.get("quantization_config") else 1
    if not wrong and held is not None and least > held * each:
        wrong = known
    if wrong:
        asked = ", ".join(f"{name} {size:,}" for name, size in wrong.items())
        raise ModelError(
            f"{option}: config.json asks for {asked}, and the weights beside it hold "
            f"{held or 0:,} numbers: it is not the configuration of these weights."
        )


def _check_adapter(config: dict[str, Any], option: str) -> None:
    """Refuse an adapter that cannot become part of the weights, which unlearning edits."""
    kind, untried = config.get("peft_type"), [name for name in _UNTRIED if config.get(name)]
    what = f"is a PEFT adapter of the kind {kind}"
    if kind == "LORA":
        what += f" with {', '.join(untried)}"
    if kind != "LORA" or untried:
        raise ModelError(
            f"{option}: {what}. Only plain LoRA adapters (DoRA and rsLoRA among them) are merged "
            "into the weights that unlearning edits. If it can be merged, do so with peft "
            "(merge_and_unload, save_pretrained) and give the checkpoint."
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that loading a checkpoint reads, or raise an OSError or ValueError."""
    index = folder / f"{_WEIGHTS}.index.json"
    if is_file(folder / _WEIGHTS) or not is_file(index):
        return list(folder.glob(_WEIGHTS))
    names = set(json.loads(index.read_bytes())["weight_map"].values())
    return [folder / name for name in names]


def n_stored(folder: Path) -> int | None:
    """Return how many numbers a checkpoint's weights hold, None where that cannot be read."""
    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        for file in weight_files(folder):
            with safe_open(file, framework="np") as tensors:
                names = tensors.keys()
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError):
        return None  # whoever loads it says what is wrong
    return total or None
