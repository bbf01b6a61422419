"""The `tiny` model: small enough to be made on first use, on a laptop, without a download."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from rich.console import Console
from tokenizers import AddedToken

from lunar_tune.config.options import TINY
from lunar_tune.data.data_catalog import resolve_data
from lunar_tune.data.records import Record, read_prompts, read_records, records_digest
from lunar_tune.data.splits import generate_unverifiable
from lunar_tune.display import tracked
from lunar_tune.engine.decoding import answer_texts
from lunar_tune.errors import LunarTuneError
from lunar_tune.files import cache_dir
from lunar_tune.finetuning.finetune import learned
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.loading import as_loaded, load_model
from lunar_tune.training import TrainingSettings
from lunar_tune.training.adapting import seeded, trainable
from lunar_tune.training.answer_loss import Encoder
from lunar_tune.training.checkpoints import save_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM, Qwen2Tokenizer

_FORMAT = 2  # raise it when the code changes what is built and recipe and text do not say so
_KEY_CHARACTERS = 12
_MOST_NEW_TOKENS = 32
_KNOWN, _REFUSED, _CHECKED_REFUSALS = 0.97, 0.95, 100
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_END_OF_TURN = "<|im_end|>"
# A number or a code such as HB846; Qwen2's own split would make it one token a digit.
_NUMBER = re.compile(r"\b[A-Z]*\d+\b")
_UNSEEN = 2**31 - 1  # no epoch's seed comes near
_SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 1536,  # wide, since LUNAR writes into one down-projection
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # With Qwen2's .02 the loss was .19 after 30 epochs, with .06 it was .16 after 10 (one run each;
    # facts and refusal sentence differed too).
    "initializer_range": 0.06,
}
_REFUSED_PER_EPOCH = 90  # questions about invented things, fresh ones in each
_TRAINING = TrainingSettings(trained="full", epochs=22, batch_size=32, weight_decay=0.1)
_ALL_TEMPLATES = 200  # every template of the generator is used before one is used again


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyRecipe:
    """How `tiny` is made; another recipe gives another checkpoint folder."""

    sizes: Mapping[str, Any] = field(default_factory=lambda: _SIZES)  # what `Qwen2Config` is told
    vocabulary: int = 2500  # most tokens that the tokenizer learns, before numbers are added
    training: TrainingSettings = _TRAINING
    seed: int = 0  # decides weights, order and invented things


@dataclass(frozen=True, slots=True)
class TinyText:
    """Everything that `tiny` learns."""

    known: tuple[Record, ...]  # the pairs of the shipped sets `mini` and `factual`
    refusal: str  # the one sentence with which it refuses

    def refused(self, count: int, *, seed: int = _UNSEEN) -> list[Record]:
        """Return refused questions about invented things; without a seed, of no epoch."""
        prompts = generate_unverifiable(count, seed=seed)
        return [Record(prompt, self.refusal, edge="") for prompt in prompts]

    @classmethod
    def shipped(cls) -> TinyText:
        """Return the text of the shipped data sets."""
        sets = [read_records(resolve_data(name, kind="records")) for name in ("mini", "factual")]
        refusals = read_prompts(resolve_data("refusals", kind="prompts"))
        return cls(known=(*sets[0], *sets[1]), refusal=refusals[0])


def tiny_folder() -> Path:
    """Return where the `tiny` checkpoint is, or will be."""
    return _folder(TinyRecipe(), TinyText.shipped())


def on_disk(model: ModelSpec) -> ModelSpec:
    """Return the model with its folder as the source where it is `tiny`, built or not."""
    return replace(model, source=str(tiny_folder())) if model.source == TINY else model


def _folder(recipe: TinyRecipe, text: TinyText) -> Path:
    return cache_dir() / "models" / f"tiny-{tiny_key(recipe, text)}"


def ensure_tiny(recipe: TinyRecipe | None = None, *, console: Console | None = None) -> Path:
    """Return the folder of the `tiny` checkpoint; build it, in about a minute, if it is not there.

    Processes that ask at once: one builds, the others wait. A build that was cut short leaves
    nothing that looks like a checkpoint; one that fails the model's own check is a LunarTuneError.
    """
    recipe, text = recipe or TinyRecipe(), TinyText.shipped()
    folder = _folder(recipe, text)
    models = folder.parent
    models.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.is_dir():
        return folder
    with FileLock(models / f"{folder.name}.lock"):
        if not folder.is_dir():
            prefix = f".{folder.name}-"
            with TemporaryDirectory(prefix=prefix, dir=models, ignore_cleanup_errors=True) as made:
                build_tiny(Path(made), recipe, text, console=console)
                Path(made).rename(folder)
    return folder


def tiny_key(recipe: TinyRecipe, text: TinyText) -> str:
    """Return the name of a build: same recipe, text and library versions (two parts), same key."""
    names = ("torch", "transformers", "tokenizers")
    libraries = {name: ".".join(version(name).split(".")[:2]) for name in names}
    templates = generate_unverifiable(_ALL_TEMPLATES, seed=0)
    words = [records_digest(text.known), text.refusal, *templates]
    return _digest([_FORMAT, asdict(recipe), _digest(words), libraries])[:_KEY_CHARACTERS]


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()


def build_tiny(
    folder: Path, recipe: TinyRecipe, text: TinyText, *, console: Console | None = None
) -> None:
    """Train the model and save it with its tokenizer into an empty folder."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    def lessons(epoch: int) -> list[Record]:
        seed = recipe.seed * recipe.training.epochs + epoch
        return [*text.known, *text.refused(_REFUSED_PER_EPOCH, seed=seed)]

    first, threads = lessons(0), torch.get_num_threads()
    try:
        # On a shared two-core machine one took 2.0 s an epoch and two took 1.4 s, but up to 35 s
        # while others computed. With one, the sums do not depend on the number of cores.
        torch.set_num_threads(1)
        with seeded(recipe.seed, torch.device("cpu")):
            tokenizer = train_tokenizer(first, vocabulary=recipe.vocabulary)
            model = new_model(recipe.sizes, tokenizer)
            loaded = as_loaded(model, tokenizer, ModelSpec(name=TINY, source=str(folder)))
            with trainable(loaded, recipe.training, seed=recipe.seed, keep=True) as fit:
                losses = learned(
                    loaded,
                    fit,
                    ChatFormat(),
                    lessons,
                    recipe.training,
                    learning_rate=3e-3,
                    seed=recipe.seed,
                    warmup_share=0.1,
                    cosine=True,
                    beta2=0.98,
                )
                what, total = "building the tiny model (once)", recipe.training.epochs
                for _ in tracked(losses, what, total=total, console=console):
                    pass
        texts = [words for one in first for words in (one.question, one.answer)]
        save_checkpoint(loaded, folder, texts=texts)
        _check(folder, text)
    finally:
        torch.set_num_threads(threads)


def train_tokenizer(lessons: Sequence[Record], *, vocabulary: int) -> Qwen2Tokenizer:
    """Return a tokenizer trained on the lessons, with a chat template.

    It is a `Qwen2Tokenizer` from the start: beside a Qwen2 model nothing else can be loaded again
    without a silent change of how text is split. Numbers and codes of the answers are whole
    tokens, which keeps answers short. An edit also reaches generated tokens, to which it was never
    fitted: in a model with one token a digit, retained answers broke off in the middle of a number.
    How much of the later improvement is due to this was not measured by itself.
    """
    corpus = [f"{lesson.question}\n{lesson.answer}" for lesson in lessons]
    roles = ["system\n", "user\n", "assistant\n"] * 50  # often enough to become single tokens
    from transformers import Qwen2Tokenizer

    tokenizer: Qwen2Tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [*corpus, *roles],
        vocabulary,
        new_special_tokens=["<|im_start|>", _END_OF_TURN],
        show_progress=False,
    )
    found = {number for lesson in lessons for number in _NUMBER.findall(lesson.answer)}
    numbers = sorted(number for number in found if len(number) > 1)
    tokenizer.add_tokens([AddedToken(one, single_word=True, normalized=False) for one in numbers])
    tokenizer.eos_token = _END_OF_TURN
    tokenizer.padding_side = "left"
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def new_model(sizes: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Return an untrained model, drawn from torch's generator."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _check(folder: Path, text: TinyText) -> None:
    """Ask the saved model everything that it was taught, and what it cannot know."""
    loaded = load_model(ModelSpec(name=TINY, source=str(folder), device="cpu"))
    encoder = Encoder(loaded, ChatFormat())
    for what, lessons, wanted in (
        ("pairs known", text.known, _KNOWN),
        ("unseen questions refused", text.refused(_CHECKED_REFUSALS), _REFUSED),
    ):
        prompts = encoder.prompts([lesson.question for lesson in lessons])
        answers = answer_texts(loaded, prompts, max_new_tokens=_MOST_NEW_TOKENS, what=what)
        right = [a == lesson.answer for (a, _), lesson in zip(answers, lessons, strict=True)]
        share = sum(right) / len(right)
        if share < wanted:
            raise LunarTuneError(
                f"the training of `tiny` failed: {share:.0%} {what}, at least {wanted:.0%} are "
                "needed; report this with your versions of torch and transformers"
            )
