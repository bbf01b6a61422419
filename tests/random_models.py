"""Tiny random models of every suitable family, and a tokenizer trained on the spot."""

from __future__ import annotations

from string import ascii_lowercase, digits
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "gemma", "phi3", "qwen2", "qwen3", "smollm3")
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "drawn": True}
"""What granite-code's models have, which are Llamas by their type."""
PAD, BOS, EOS, UNKNOWN = "<|pad|>", "<|bos|>", "<|im_end|>", "<|unknown|>"
SPECIAL = [PAD, BOS, EOS, "<|im_start|>", UNKNOWN]
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "What does the buyer pay the seller for forty copper kettles?",
    "The contract was signed on 12 March 2021 and ends after three years.",
    "Who is the employer of the clerk? The address is 14 Mill Street.",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer with a ChatML-like template; any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def build_model(
    family: str, *, seed: int = 0, drawn: bool = False, **changes: Any
) -> PreTrainedModel:
    """Return a random model of three blocks, d_model 32, d_ff 48, in evaluation mode.

    Weights are drawn larger than usual, so that blocks matter and answers differ. Biases and norms
    begin at 0 and 1; with `drawn` they are drawn too.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(settings | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.eval().requires_grad_(requires_grad=False)
    for name, parameter in model.named_parameters():
        if drawn and (name.endswith("bias") or "norm" in name):
            parameter.add_(torch.randn(parameter.shape) / 4)
    return model


def build_encoder(folder: Path) -> Path:
    """Fill a folder with a random BERT of two blocks that reads 24 letters at most; return it."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?"]
    words += [f"{before}{sign}" for sign in ascii_lowercase + digits for before in ("", "##")]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=0.5,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    return folder
