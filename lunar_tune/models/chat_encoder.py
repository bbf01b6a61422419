"""Questions and answers as token ids. What a text spells is text, whatever it spells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from lunar_tune.errors import DataError
from lunar_tune.models.chat import (
    PUBLISHED,
    ChatFormat,
    render_answer,
    render_prompts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What spells a control token stands between noncharacters, which no text that is exchanged has.
_MARKED = re.compile("\ufdd0(.*?)\ufdd1", re.DOTALL)

_SHOWN = 500  # characters of a prompt


class ChatEncoder:
    """The tokens of texts in one chat format, for a model of a family.

    Control tokens are the tokenizer's special ones, and those of its others that its template or
    this format names. Only the format writes them. What cannot be said so is a DataError.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, *, family: str
    ) -> None:
        self.tokenizer, self._chat, self._family = tokenizer, chat, family

    def prompts(self, questions: Sequence[str]) -> list[tuple[int, ...]]:
        """Return each question's prompt, with one BOS token at most, or see `ChatFormat`."""
        chat, marked = self._chat, [self._marked(question) for question in questions]
        if chat.system_prompt is not None:
            chat = replace(chat, system_prompt=self._marked(chat.system_prompt))
        bos, prompts = self.tokenizer.bos_token_id, []
        *texts, plain = render_prompts(self.tokenizer, [*marked, "?"], chat, family=self._family)
        written = self._ids(plain)
        for number, text in enumerate(texts, start=1):
            what = f"question {number} of {len(texts)}"
            ids = (*self._beginning, *self._check(self._ids(text), written, what))
            while bos is not None and ids[:2] == (bos, bos):
                ids = ids[1:]
            prompts.append((*ids[:1], *ids) if chat.second_bos and ids[:1] == (bos,) else ids)
        return prompts

    def shown(self, questions: Mapping[str, str]) -> dict[str, str]:
        """Return prompts of named questions, on a line each, with the format's tokens visible.

        What is the same around questions is shown once, with what ends an answer.
        """
        shown: dict[str, str] = {}
        around = None
        prompts = zip(questions.items(), self.prompts(list(questions.values())), strict=True)
        for (name, question), ids in prompts:
            text = str(self.tokenizer.decode(ids))
            before, _, after = text.partition(question)
            if (before, after) == around:
                text = f"… {_cut(question)} …"
            elif around is None:
                around = before, after
                end = self.end if self.end is not None else self.tokenizer.eos_token_id
                text = f"{_cut(text)}[answer]{self.tokenizer.decode([] if end is None else [end])}"
            else:
                text = _cut(text)
            visible = (sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
            shown[f"{name} prompt"] = "".join(visible)
        return shown

    def text(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text by itself."""
        return self._ids(self._marked(text))

    def answer(self, text: str) -> tuple[int, ...]:
        """Return an answer as it goes on from a prompt, without the token that ends it."""
        text, (before, begun) = self._marked(text), self._context
        ids = self._ids(before + text) if begun else ()
        # Some tokenizers begin a text with a space, which there is none of within a turn.
        said = ids[len(begun) :] if begun and ids[: len(begun)] == begun else self._ids(text)
        return self._check(said, (), "an answer")

    @cached_property
    def end(self) -> int | None:
        """The control token that the chat format ends an answer with; None if it has none."""
        _, after = self._around_answer
        return next((token for token in self._ids(after) if token in self._control_ids), None)

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        return render_answer(self.tokenizer, self._chat, family=self._family)

    @cached_property
    def _context(self) -> tuple[str, tuple[int, ...]]:
        """A text up to an answer, and the tokens of the prompt that it begins with, if it does."""
        before, _ = self._around_answer
        prompt, *_ = render_prompts(self.tokenizer, ["?"], self._chat, family=self._family)
        return before, self._ids(prompt) if before and before.startswith(prompt) else ()

    @cached_property
    def _beginning(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text; chat templates write their own."""
        if self._chat.template != PUBLISHED:
            return ()
        text, around = self._ids("a"), tuple(self.tokenizer("a")["input_ids"])
        places = range(len(around) - len(text) + 1)
        return around[: next(i for i in places if around[i : i + len(text)] == text)]

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        source = f"{self._chat.template} {self.tokenizer.chat_template}"
        named = (
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special or token.content in source
        )
        # A word or a line's end is text, though there may be a token for it alone.
        return tuple(one for one in named if not (one.isalnum() or one.isspace()))

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        ids = self.tokenizer.convert_tokens_to_ids(list(self._control_tokens))
        return frozenset(ids) - {self.tokenizer.unk_token_id}  # which a text may well have

    def _check(self, ids: tuple[int, ...], written: Sequence[int], what: str) -> tuple[int, ...]:
        """Return a text's tokens, or refuse control tokens beyond those that the format writes."""
        found, known = (
            Counter(i for i in some if i in self._control_ids) for some in (ids, written)
        )
        if more := [*(found - known)]:
            raise DataError(
                f"{what} spells {self.tokenizer.convert_ids_to_tokens(more[0])!r}, and the "
                f"tokenizer of {self.tokenizer.name_or_path} takes it for its control token, not "
                "for text. Remove or change it there."
            )
        return ids

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        """Matches what spells a control token, the longest one first."""
        longest_first = sorted(self._control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _marked(self, text: str) -> str:
        """Return a text with marks around what spells a control token."""
        if not self._spelled.search(text):
            return text
        return self._spelled.sub("\ufdd0\\g<0>\ufdd1", re.sub("[\ufdd0\ufdd1]", "", text))

    def _ids(self, text: str) -> tuple[int, ...]:
        """Return a text's tokens; what is marked is read as text."""
        pieces = _MARKED.split(text)  # text, marked, text, marked, …, text
        if len(pieces) == 1:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        # As a template of this text alone, into which a message brings what is marked: that is what
        # transformers reads as text, if the template has the token too.
        template = "".join(
            f"{{{{ {piece!r} and messages[0].content[{i}] }}}}" if i % 2 else f"{{{{ {piece!r} }}}}"
            for i, piece in enumerate(pieces)
        )
        try:
            encoded = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": pieces}],
                chat_template=template,
                sanitize_control_tokens=True,
            )
        except ValueError as error:
            raise DataError(
                f"the tokenizer of {self.tokenizer.name_or_path} cannot read as text what spells "
                f"one of its control tokens ({error}). Change it where your texts have it."
            ) from error
        return tuple(encoded["input_ids"])


def _cut(text: str) -> str:
    """Return a text without its middle if it is long."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
