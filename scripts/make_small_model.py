"""Makes a small Qwen2 model of random weights, with a tokenizer trained on some data.

    python scripts/make_small_model.py my_pairs.json models/base
    lunar-tune finetune --model models/base --data my_pairs.json --save models/knows
            --fix trained=full --fix with_refusals=true --fix learning_rate=2e-3 --fix epochs=30
            --fix batch_size=32 --fix weight_decay=0.1

For trying fine-tuning and a search on data of one's own without a model hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lunar_tune.data.data_catalog import resolve_data
from lunar_tune.data.records import Record, read_prompts, read_records
from lunar_tune.data.splits import generate_unverifiable
from lunar_tune.finetuning.tiny import TinyRecipe, new_model, train_tokenizer

__all__ = ["make_small_model"]

_INVENTED = 400  # questions about invented things that the tokenizer sees


def make_small_model(data: str, output: Path, recipe: TinyRecipe) -> int:
    """Write the model and its tokenizer; return the number of parameters."""
    records = read_records(resolve_data(data, kind="records"))
    refusal = read_prompts(resolve_data("refusals", kind="prompts"))[0]
    invented = generate_unverifiable(_INVENTED, seed=recipe.seed)
    lessons = [*records, *(Record(prompt, refusal, edge="") for prompt in invented)]
    tokenizer = train_tokenizer(lessons, vocabulary=recipe.vocabulary)
    torch.manual_seed(recipe.seed)
    model = new_model(recipe.sizes, tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return int(model.num_parameters())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="shipped name or file of question-answer pairs")
    parser.add_argument("output", type=Path, help="folder of the checkpoint")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="of the residual stream")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    shape = {
        "num_hidden_layers": chosen.layers,
        "hidden_size": chosen.width,
        "intermediate_size": 8 * chosen.width,
        "num_attention_heads": max(2, chosen.width // 32),
        "num_key_value_heads": max(2, chosen.width // 64),
    }
    recipe = TinyRecipe(sizes={**TinyRecipe().sizes, **shape}, seed=chosen.seed)
    count = make_small_model(chosen.data, chosen.output, recipe)
    print(f"{count / 1e6:.1f} million parameters in {chosen.output}")


if __name__ == "__main__":
    main()
