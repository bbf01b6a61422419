"""A written form loaded as anybody would: by transformers and peft alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FORMS", "Base", "read_form"]

FORMS = ("checkpoint", "adapter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that was unlearned, which an adapter belongs on."""

    name: str
    """To show."""
    source: str
    """Hub id or folder of its weights."""
    tokenizer: str
    """Hub id or folder of its tokenizer."""
    revision: str | None
    """Commit on the hub; None for a folder."""
    fingerprint: str
    """Fingerprint of its weights (`models.lineage`)."""
    trust_remote_code: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine, which nobody else has under its path."""
        return Path(self.source).is_dir()


def read_form(
    form: str, folder: Path, base: Base, *, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a written form; return the model, in host memory and evaluation mode, and its tokenizer.

    Args:
        form: One of `FORMS`.
        folder: Where it was written.
        base: What an adapter belongs on; it is on this machine, since the trial ran.
        dtype: Number format of the weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = form == "checkpoint"
    source, words = (str(folder),) * 2 if whole else (base.source, base.tokenizer)

    def options(of: str) -> dict[str, Any]:
        return {
            "revision": None if Path(of).is_dir() else base.revision,
            "trust_remote_code": base.trust_remote_code,
            "local_files_only": True,
        }

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(words, **options(words))
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, **options(source)
    )
    if form == "adapter":
        from peft import PeftModel

        with warnings.catch_warnings():
            # peft 0.21 reads a name that transformers 5.23 deprecates
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = PeftModel.from_pretrained(model, str(folder)).get_base_model()  # left unmerged
    return model.eval().requires_grad_(requires_grad=False), tokenizer
