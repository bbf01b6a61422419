"""Loading a causal language model and its tokenizer, with errors that a user can act on."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from lunar_tune.errors import ModelError
from lunar_tune.files import is_file, is_folder
from lunar_tune.models.device import resolve_device, resolve_dtype
from lunar_tune.models.layout import BlockLayout, layout_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "LoadedModel",
    "ModelSpec",
    "as_loaded",
    "check_model_path",
    "hub_resolves",
    "load_config",
    "load_model",
]

_ADAPTER_FILE = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything that decides which weights are loaded, and how."""

    name: str
    """The name to show."""
    source: str
    """Hub id or folder of the base checkpoint."""
    weights: str | None = None
    """Folder of fine-tuned weights: a checkpoint, or a PEFT adapter for `source`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None takes the default branch."""
    dtype: str = "auto"
    """float32, bfloat16, float16 or auto (bfloat16 on a GPU, float32 on a CPU)."""
    device: str = "auto"
    """cpu, cuda or auto."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the checkpoint may run."""

    @property
    def checkpoint(self) -> str:
        """Where configuration and weights are read from; an adapter is not a checkpoint."""
        if self.weights is not None and not is_adapter(Path(self.weights)):
            return self.weights
        return self.source


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready for unlearning, with what every later step asks of it."""

    spec: ModelSpec
    model: PreTrainedModel
    """In evaluation mode, no gradients required."""
    tokenizer: PreTrainedTokenizerBase
    layout: BlockLayout
    eos_ids: tuple[int, ...]
    """Every id that ends an answer."""
    pad_id: int
    """The id that fills a batch; never attended to."""

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.layout.blocks_of(self.model))

    @property
    def n_parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def family(self) -> str:
        """The architecture's name, `config.model_type`."""
        return str(self.model.config.model_type)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds a PEFT adapter."""
    return is_file(folder / _ADAPTER_FILE)


def check_model_path(path: str) -> Path:
    """Return the folder of `--model-path`.

    Raises:
        ModelError: It does not exist, or holds neither a checkpoint nor an adapter.
    """
    folder = Path(path).expanduser()
    if not is_folder(folder):
        raise ModelError(f"--model-path {path}: no such folder.")
    if not is_adapter(folder) and not (folder / "config.json").is_file():
        raise ModelError(
            f"--model-path {path}: holds neither config.json (a checkpoint) nor {_ADAPTER_FILE} "
            "(a PEFT adapter)."
        )
    weights = _ADAPTER_WEIGHTS if is_adapter(folder) else "*.safetensors"
    if not any(folder.glob(weights)):
        raise ModelError(
            f"--model-path {path}: holds no {weights} file. Only safetensors weights are read "
            "(pickled *.bin files can run code); save them with save_pretrained()."
        )
    return folder.resolve()


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """Return the checkpoint's configuration, after checking that its family is suitable.

    Raises:
        ModelError: It cannot be had, or the family is unsuitable.
    """
    from transformers import AutoConfig

    config: PretrainedConfig = _from_hub(AutoConfig, spec, spec.checkpoint)
    layout_of(config)
    return config


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load weights and tokenizer onto the resolved device.

    Raises:
        ModelError: Something cannot be had or is unsuitable; see `load_config`.
        InputError: The device or number format is unknown or not there.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the commands show their own
    device = resolve_device(spec.device)
    load_config(spec)  # an unsuitable family is refused before its weights are read
    tokenizer = _load_tokenizer(spec)
    options: dict[str, Any] = {"dtype": resolve_dtype(spec.dtype, device), "use_safetensors": True}
    if device.type == "cuda":
        options["device_map"] = {"": device}
    model, report = _from_hub(
        AutoModelForCausalLM, spec, spec.checkpoint, output_loading_info=True, **options
    )
    _check_complete(report["missing_keys"], spec)
    model = _merge_adapter(model, spec)
    model = model.eval().requires_grad_(requires_grad=False)
    if model.device != device:
        model.to(device)
    return as_loaded(model, tokenizer, spec)


def as_loaded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec
) -> LoadedModel:
    """Return a model that transformers has loaded, with what every later step asks of it.

    Args:
        model: In evaluation mode, on its device.
        tokenizer: Of the model.
        spec: What it was loaded from.

    Raises:
        ModelError: The family is unsuitable, or nothing ends an answer.
    """
    eos_ids = _eos_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    return LoadedModel(
        spec=spec,
        model=model,
        tokenizer=tokenizer,
        layout=layout_of(model.config),
        eos_ids=eos_ids,
        pad_id=pad_id,
    )


def _check_complete(missing: Collection[str], spec: ModelSpec) -> None:
    """Refuse a checkpoint that lacks weights: transformers fills them with random numbers."""
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise ModelError(
            f"model {spec.checkpoint}: the weights lack {len(missing)} tensors that config.json "
            f"asks for, among them {shown}."
        )


def _load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    source = spec.source
    if spec.weights is not None and (Path(spec.weights) / "tokenizer_config.json").is_file():
        source = spec.weights
    tokenizer: PreTrainedTokenizerBase = _from_hub(AutoTokenizer, spec, source)
    return tokenizer


def _merge_adapter(model: PreTrainedModel, spec: ModelSpec) -> PreTrainedModel:
    if spec.weights is None or not is_adapter(Path(spec.weights)):
        return model
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    adapted = None
    unread: set[str] = set()
    try:
        adapted = PeftModel.from_pretrained(model, spec.weights)
        with safe_open(Path(spec.weights) / _ADAPTER_WEIGHTS, framework="pt") as file:
            unread = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ModelError(
            f"--model-path {spec.weights}: the adapter does not fit {spec.source}: {error}"
        ) from error
    if unread:  # peft leaves out what has no place, and says so in a warning at most
        raise ModelError(
            f"--model-path {spec.weights}: the adapter does not fit {spec.source}: "
            f"{len(unread)} tensors are in one and not in the other, among them {min(unread)}."
        )
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    generation = model.generation_config
    configured = generation.eos_token_id if generation is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    ids = {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
    if not ids:
        raise ModelError(
            f"{model.config.name_or_path} names no end-of-sequence token, neither in its "
            "generation config nor in its tokenizer: an answer would never end."
        )
    return tuple(sorted(ids))


def _from_hub(factory: Any, spec: ModelSpec, source: str, **options: Any) -> Any:
    """Call `factory.from_pretrained`, turning the hub's errors into messages to act on."""
    from safetensors import SafetensorError

    local = is_folder(Path(source))
    if spec.trust_remote_code:
        logger.warning("%s: Python code that comes with the checkpoint may run", source)
    try:
        return factory.from_pretrained(
            source,
            revision=None if local else spec.revision,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=local or not hub_resolves(),
            **options,
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"model {source}: {_why_not_loaded(error, spec, local)}") from error


def _why_not_loaded(error: Exception, spec: ModelSpec, local: bool) -> str:
    """Say why a model could not be loaded and what to do, by what led to the error."""
    from huggingface_hub import errors

    causes = tuple(type(cause) for cause in _causes(error))

    def led(*kinds: type[Exception]) -> bool:
        return any(issubclass(cause, kinds) for cause in causes)

    unreached = led(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    cases = (
        (
            "OutOfMemory" in type(error).__name__,
            "its weights do not fit into the device's memory. Use --dtype bfloat16, a smaller "
            "model, or a larger device.",
        ),
        (
            led(errors.GatedRepoError),
            "the hub asks for an accepted licence. Accept it on the model's page, then run "
            "`hf auth login` or set HF_TOKEN.",
        ),
        (
            led(errors.RevisionNotFoundError),
            f"the hub has no revision {spec.revision!r} of it (--model NAME@REVISION).",
        ),
        (
            led(errors.RepositoryNotFoundError),
            "the hub has no such model, or it is private (`hf auth login`).",
        ),
        (
            "trust_remote_code" in str(error),
            "it wants to run Python code that comes with it. If you trust its authors, repeat the "
            "command with --trust-remote-code.",
        ),
        (local, f"the folder cannot be loaded: {error}"),
        (
            unreached,
            "it is not in the local cache and the hub could not be reached. Connect, download it "
            "elsewhere and give the folder with --model or --model-path, or use --model tiny. "
            f"({str(error).partition(chr(10))[0]})",
        ),
        (True, f"it cannot be loaded: {error}"),
    )
    return next(message for applies, message in cases if applies)


def hub_resolves() -> bool:
    """Say whether the hub's name resolves; where it does not, waiting for answers is in vain."""
    from huggingface_hub import constants

    if getproxies():
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def _causes(error: BaseException) -> list[BaseException]:
    """Return an exception and what led to it, latest first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain
