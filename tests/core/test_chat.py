"""Prompts: one beginning token, no date that changes, templates that fail say so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast as Tokenizer

from lunar_tune.errors import InputError, ModelError
from lunar_tune.models.chat import (
    FIXED_DATE,
    PUBLISHED,
    ChatFormat,
    render_prompts,
)
from lunar_tune.models.chat_encoder import ChatEncoder

QUESTION = "What does the {buyer} pay?"
BARE = "{{ messages[0]['content'] }}"


def with_template(tokenizer: Tokenizer, template: Any) -> Tokenizer:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def with_tokens(tokenizer: Tokenizer, *tokens: str) -> Tokenizer:
    """Return the tokenizer without `<|im_start|>`'s name, and with other special tokens."""
    text = tokenizer.backend_tokenizer.to_str().replace("<|im_start|>", "<|nothing|>")
    backend = type(tokenizer.backend_tokenizer).from_str(text)
    backend.add_special_tokens(list(tokens))
    return Tokenizer(tokenizer_object=backend, bos_token="<|bos|>")


def render(tokenizer: Tokenizer, chat: ChatFormat | None = None, family: str = "qwen2") -> str:
    return render_prompts(tokenizer, [QUESTION], chat or ChatFormat(), family=family)[0]


def test_the_own_template_ends_where_the_answer_begins(tokenizer: Tokenizer) -> None:
    asked = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    questions = [QUESTION, "Кто? 誰", QUESTION]
    encoded = ChatEncoder(tokenizer, ChatFormat(), family="qwen2").prompts(questions)
    texts = [f"<|bos|>{asked.replace(QUESTION, question)}" for question in questions]
    assert [tokenizer.decode(list(ids)) for ids in encoded] == texts
    brief = ChatFormat(system_prompt="Be brief.")
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert render(tokenizer, brief) == f"<|bos|>{system}{asked}"
    # As Qwen2.5's: a default system turn where the messages bring none.
    own = with_template(
        tokenizer,
        "{% if messages[0]['role'] == 'system' %}S:{{ messages[0]['content'] }}"
        "{% else %}S:default{% endif %} U:{{ messages[-1]['content'] }}",
    )
    assert render(own) == f"S:default U:{QUESTION}"
    assert render(own, brief) == f"S:Be brief. U:{QUESTION}"


def test_a_date_in_a_template_is_the_fixed_one(tokenizer: Tokenizer) -> None:
    """As Llama 3.2's, and one that looks whether it can ask for the date."""
    for template in (
        "{% if not d is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}",
        "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}"
        "{% else %}{% set d = '26 Jul 2024' %}{% endif %}",
    ):
        stamped = with_template(tokenizer, f"{template}Today: {{{{ d }}}} {BARE}")
        asked = [{"role": "user", "content": QUESTION}]
        assert FIXED_DATE not in stamped.apply_chat_template(asked, tokenize=False)
        assert render(stamped) == f"Today: {FIXED_DATE} {QUESTION}"


@pytest.mark.parametrize(("adds_itself", "written"), [(True, 1), (True, 0), (False, 1), (False, 2)])
def test_a_prompt_begins_once(tokenizer: Tokenizer, adds_itself: bool, written: int) -> None:
    """Whether the template writes it, the tokenizer adds it, or both."""
    changed = with_template(tokenizer, "{{ bos_token }}" * written + BARE)
    if adds_itself:
        changed.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
        )
    own, published = ChatFormat(), ChatFormat(template=PUBLISHED)
    for chat, has_one in ((own, written > 0), (published, adds_itself)):
        ids = ChatEncoder(changed, chat, family="qwen2").prompts(["pay"])[0]
        assert list(ids).count(1) == has_one
        assert (ids[0] == 1) == has_one
    asked = ChatFormat.from_option("published-eval", None)
    fitted = list(ChatEncoder(changed, asked.of_fit, family="qwen2").prompts(["pay"])[0])
    assert fitted == list(ids)
    # As that code's evaluation: decoded with its special tokens, and encoded with them again.
    published = changed(changed.decode(fitted))["input_ids"]
    assert list(ChatEncoder(changed, asked, family="qwen2").prompts(["pay"])[0]) == published
    assert published.count(1) == 2 * adds_itself


@pytest.mark.parametrize(
    ("tokens", "family", "expected"),
    [
        (
            ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            "llama",
            f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            ("<start_of_turn>", "<end_of_turn>"),
            "gemma",
            f"<start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        ),
        *(((), family, f"[INST] {QUESTION} [/INST]") for family in ("llama", "mistral")),
    ],
)
def test_published_turns_are_those_of_the_published_code_and_others_are_refused(
    tokenizer: Tokenizer, tokens: tuple[str, ...], family: str, expected: str
) -> None:
    """Texts as in facebookresearch/LUNAR at dfa56eb, src/model_utils; Qwen's has no system turn."""
    chat = ChatFormat(template=PUBLISHED)
    assert render(with_tokens(tokenizer, *tokens), chat, family) == expected
    qwen = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, chat) == qwen
    with pytest.raises(ModelError, match=r"no user turn for the family 'phi3'.*own"):
        render(with_tokens(tokenizer), ChatFormat(template=PUBLISHED), "phi3")
    with pytest.raises(InputError, match="leave out --system-prompt"):
        ChatFormat(template=PUBLISHED, system_prompt="Be brief.")


def test_a_template_that_fails_says_why_and_one_may_come_from_a_file(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for template, message in (
        (None, r"has no chat template.*--chat-template FILE"),
        ({"tool_use": "tools"}, "the chat template .* failed"),
        ("{{ raise_exception('No system role') }}", "chat template .* failed: .*No system role"),
        ("{% for %}", "the chat template .* failed: .*Expected"),
    ):
        with pytest.raises(ModelError, match=message):
            render(with_template(tokenizer, template), ChatFormat(system_prompt="Be brief."))
    several = {"tool_use": "tools", "default": f"Q: {BARE}"}
    assert render(with_template(tokenizer, several)) == f"Q: {QUESTION}"

    file = tmp_path / "mine.jinja"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_text("Frage: {{ messages[-1]['content'] }} Ä:", encoding=encoding)
        assert render(tokenizer, ChatFormat.from_option(str(file), None)) == f"Frage: {QUESTION} Ä:"
    file.write_bytes(b"\xc4:")
    with pytest.raises(InputError, match=r"mine.jinja: is not UTF-8: byte 0xc4 .* if Ä is meant"):
        ChatFormat.from_option(str(file), None)
    for other in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"--chat-template .*cannot be read.*own, published"):
            ChatFormat.from_option(str(other), None)


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        ("{{ 'A' * 2000000000 }}", "takes more than 1024 MiB of memory"),
        ("{% set n = namespace(t='A') %}{% for i in range(40) %}{% set n.t = n.t * 2 %}{% endfor %}"
         "{{ n.t }}", "takes more than 1024 MiB of memory"),
        ("{{ 'A' * 5000000 }}", "a prompt would have 5,000,0.. characters"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "takes more than 1 s"),
        ("{% if messages[0].content == 'second' %}{{ 9 ** (9 ** 9) }}{% endif %}",
         "takes more than 1 s"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
        ("{{ messages.append(1) }}", "access to attribute 'append' .* is unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "'__class__' .* is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
    ],
)  # fmt: skip
def test_a_template_has_limits_of_time_and_memory_and_reaches_nothing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, bomb: str, message: str
) -> None:
    monkeypatch.setattr("lunar_tune.models.chat._SECONDS", 1)
    hostile = with_template(tokenizer, bomb + BARE)
    with pytest.raises(ModelError, match=f"the chat template of .*{message}"):
        ChatEncoder(hostile, ChatFormat(), family="qwen2").prompts(["first", "second"])
    assert ChatEncoder(hostile, ChatFormat(), family="qwen2").end is None
