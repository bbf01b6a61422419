"""Which answers need not go on: those that have said every word of the truth already.

Recall can only grow as text is added, so an answer whose finished words hold the truth as a
subsequence has ROUGE-L recall 1, and ROUGE-1 recall 1 with it, whatever follows. A word is finished
when a character that belongs to no word follows it: until then the next token may lengthen it, and
the stemmer may then see another word. A replacement character at the end may be the first half of
any character, so it finishes nothing; nor do bytes as tokens, which more bytes may spoil.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lunar_tune.metrics.rouge import tokenize_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RecallStop", "finished_part"]

_WORD_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of SentencePiece vocabularies
# Lowers to one letter at a word's end and to another within, and a full stop may stand within.
_CAPITAL_SIGMA = "\u03a3"


class RecallStop:
    """Tells which rows have said their truth.

    Args:
        tokenizer: Of the model.
        truths: The true answers of each row that may stop early.
        rouge_tokenizer: Which words ROUGE counts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        truths: Mapping[int, Sequence[str]],
        *,
        rouge_tokenizer: str,
    ) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._bytes = frozenset(i for token, i in vocabulary.items() if _BYTE.fullmatch(token))
        self._rouge_tokenizer = rouge_tokenizer
        self._words = {
            row: [tokenize_words(truth, tokenizer=rouge_tokenizer) for truth in texts]
            for row, texts in truths.items()
        }

    def done(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[bool]:
        """Say of each row whether its tokens so far hold the truth in finished words."""
        verdicts = [False] * len(rows)
        asked = [i for i, row in enumerate(rows) if row in self._words]
        if not asked:
            return verdicts
        texts = self._tokenizer.batch_decode(
            [self._without_bytes(tokens[i]) for i in asked], skip_special_tokens=True
        )
        for i, text in zip(asked, texts, strict=True):
            part = finished_part(text, rouge_tokenizer=self._rouge_tokenizer)
            said = tokenize_words(part, tokenizer=self._rouge_tokenizer)
            verdicts[i] = all(_is_subsequence(words, said) for words in self._words[rows[i]])
        return verdicts

    def _without_bytes(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens without bytes at their end."""
        end = len(tokens)
        while end and tokens[end - 1] in self._bytes:
            end -= 1
        return list(tokens[:end])


def finished_part(text: str, *, rouge_tokenizer: str) -> str:
    """Return the beginning of a text up to its last character that belongs to no word."""
    has_sigma = _CAPITAL_SIGMA in text
    text = text.lower().rstrip(_REPLACEMENT)
    end = len(text)
    while end and _belongs_to_a_word(text[end - 1], rouge_tokenizer, has_sigma=has_sigma):
        end -= 1
    return text[:end]


def _belongs_to_a_word(character: str, rouge_tokenizer: str, *, has_sigma: bool) -> bool:
    if rouge_tokenizer == "default":
        return character in _WORD_CHARACTERS
    if has_sigma and not character.isspace():
        return True
    # NFKC joins and parts characters: only what it leaves alone and calls no letter ends a word.
    normal = unicodedata.normalize("NFKC", character)
    return any(unicodedata.category(part)[0] in "LMN" for part in normal) or normal != character


def _is_subsequence(words: Sequence[str], said: Sequence[str]) -> bool:
    remaining = iter(said)
    return all(word in remaining for word in words)
