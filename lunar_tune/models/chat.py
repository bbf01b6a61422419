"""How a question is put to a model, as text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lunar_tune.bounded import bounded
from lunar_tune.config.options import OWN
from lunar_tune.errors import InputError, ModelError
from lunar_tune.files import decoded, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PUBLISHED, PUBLISHED_EVAL = "published", "published-eval"
_SECONDS = 5  # of one core, for a template; a usual one takes less than a millisecond a prompt
_LONGEST = 4_000_000  # characters of a prompt: no model's context holds as many

# Llama 3.2's template prints today's date unless it is given one; this is its own fallback, so
# prompts are the same tomorrow.
FIXED_DATE = "26 Jul 2024"
# For templates that call transformers' function without asking for a date first. A function handed
# to `apply_chat_template` does not arrive (5.23 replaces it by a text), a macro shadows theirs.
_FIXED_CLOCK = f"{{% macro strftime_now(format) %}}{FIXED_DATE}{{% endmacro %}}\n"

# The bare user turns of facebookresearch/LUNAR at dfa56eb, src/model_utils/*_model.py, told
# apart by a token of the vocabulary that only that format has.
_PUBLISHED_TURNS = {
    "<|start_header_id|>": "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|im_start|>": "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>": "<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n",
}
_OTHER_TURNS = dict.fromkeys(("llama", "mistral"), "[INST] {question} [/INST]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How questions become prompts."""

    template: str = OWN
    """`own` (the tokenizer's), `published` (the published code's user turn), or Jinja source."""
    system_prompt: str | None = None  # of a turn before the question; None takes the template's
    second_bos: bool = False
    """Whether a prompt that begins with a BOS token has another one before it. The published
    evaluation (src/eval_util.py, run_generation) decodes its prompts with the special tokens of
    Llama 3 and Gemma and encodes them again; its fit has one."""

    def __post_init__(self) -> None:
        """Reject contradictions."""
        if self.template == PUBLISHED and self.system_prompt is not None:
            raise InputError(
                "--chat-template published has no system turn: leave out --system-prompt, or use "
                "--chat-template own."
            )

    @classmethod
    def from_option(cls, template: str, system_prompt: str | None) -> ChatFormat:
        """Build a format from the value of `--chat-template`, or raise an InputError."""
        if system_prompt is not None:
            system_prompt = unicodedata.normalize("NFC", system_prompt)  # as questions are
        if template == PUBLISHED_EVAL:
            return cls(template=PUBLISHED, system_prompt=system_prompt, second_bos=True)
        source = template
        try:
            if template not in (OWN, PUBLISHED):
                content = read_settings(Path(template).expanduser())
                source, _ = decoded(content, f"--chat-template {template}")
        except OSError as error:
            raise InputError(
                f"--chat-template {template}: cannot be read ({error}). Give own, published, "
                "published-eval or a Jinja file."
            ) from error
        return cls(template=source, system_prompt=system_prompt)

    @property
    def of_fit(self) -> ChatFormat:
        """The format of what a model is fitted on."""
        return replace(self, second_bos=False)


OWN_FORMAT = ChatFormat()


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], chat: ChatFormat, *, family: str
) -> list[str]:
    """Return the texts that put questions to a model of a family, or raise a ModelError."""
    source = template_source(tokenizer, chat, family=family)
    if chat.template == PUBLISHED:
        return [source.format(question=question) for question in questions]
    system = [] if chat.system_prompt is None else [("system", chat.system_prompt)]
    conversations = [[*system, ("user", question)] for question in questions]
    try:
        return _rendered(tokenizer, conversations, source, prompt=True)
    except RuntimeError as error:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} failed: {error}"
        ) from error


def render_answer(
    tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, *, family: str
) -> tuple[str, str]:
    """Return what the chat format writes before an answer to "?", and what after it.

    Empty is what cannot be known: a template need not know assistants.
    """
    source = template_source(tokenizer, chat, family=family)
    if chat.template == PUBLISHED:  # where users' turns end as answers do, if with a token
        after = "" if source in _OTHER_TURNS.values() else source.partition("{question}")[2]
        return "", after
    answer = "lunar tune marker"
    system = [] if chat.system_prompt is None else [("system", chat.system_prompt)]
    turns = [*system, ("user", "?"), ("assistant", answer)]
    with suppress(RuntimeError):
        before, found, after = _rendered(tokenizer, [turns], source, prompt=False)[0].rpartition(
            answer
        )
        return (before, after) if found else ("", "")
    return "", ""


def template_source(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, *, family: str) -> str:
    """Return a Jinja template, or the published turn with {question}, or raise a ModelError."""
    if chat.template == PUBLISHED:
        vocabulary = tokenizer.get_vocab()
        turns = (turn for token, turn in _PUBLISHED_TURNS.items() if token in vocabulary)
        turn = next(turns, _OTHER_TURNS.get(family))
        if turn is None:
            raise ModelError(
                "--chat-template published: the published code has no user turn for the family "
                f"{family!r}. Use --chat-template own."
            )
        return turn
    if chat.template != OWN:
        return chat.template
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template. Use "
            "--chat-template FILE with its Jinja source, --chat-template published for the "
            "published code's user turn, or an instruction-tuned checkpoint."
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # it has several, and none is called default
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} failed: {error}"
        ) from error


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[tuple[str, str]]],
    source: str,
    *,
    prompt: bool,
) -> list[str]:
    """Apply a chat template, up to where an answer begins if it is to be a prompt.

    It is somebody's program: one that fails or takes too much raises a RuntimeError.
    """

    def render() -> list[str]:
        texts = []
        for turns in conversations:
            text = tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in turns],
                chat_template=_FIXED_CLOCK + source if "strftime_now" in source else source,
                tokenize=False,
                add_generation_prompt=prompt,
                date_string=FIXED_DATE,
                enable_thinking=False,  # Qwen3's switch; other templates do not read it
            )
            if len(text) > _LONGEST:
                raise ValueError(f"a prompt would have {len(text):,} characters")
            texts.append(str(text))
        return texts

    texts: list[str] = bounded(render, seconds=_SECONDS + len(conversations) // 100)
    return texts
