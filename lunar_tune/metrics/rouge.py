"""ROUGE-1 and ROUGE-L recall of an answer, and which answers need not go on to have all of it.

Recall can only grow as text is added, so an answer whose finished words hold the truth as a
subsequence has all of it, whatever follows. A word is finished when a character that belongs to no
word follows it, which may make another stem of it until then. A replacement character at the end
may be half of any character, so it finishes nothing; nor do bytes, which more bytes may spoil.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lunar_tune.config.options import ROUGE_TOKENIZERS
from lunar_tune.data.records import Record
from lunar_tune.data.texts import composed
from lunar_tune.errors import DataError, InputError, Problems, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_REPLACEMENT = "\ufffd"
# Shares of an answer's letters, and of a set's (a mean over answers), that ROUGE may leave out: see
# docs/metrics.md.
MOST_LOST, MOST_LOST_OF_SET = 0.5, 0.25
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of SentencePiece vocabularies
# By Unicode's Line_Break (UAX 14): letters of Thai, Lao, Khmer, Burmese and their kin, which need a
# dictionary; ideographs, kana and syllables of Hangul and Yi, each of which may end a line.
_UNSPACED = r"\p{lb=SA}[\p{lb=SA}\p{M}]*"
_CHARACTER = r"[\p{lb=ID}\p{lb=CJ}\p{lb=H2}\p{lb=H3}]"


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall of the true answer's words in a generated one, between 0 and 1."""

    rouge1: float
    rouge_l: float


class _WordTokenizer:
    """Splits text of any script into words: letters with their marks, and digits.

    Case and forms are folded. Each ideograph, kana or Hangul syllable is a word. Where a script has
    no spaces, ICU's dictionaries divide what stands between two other characters; so text that
    follows those changes no word.
    """

    def tokenize(self, text: str) -> list[str]:
        import regex
        from icu4py.breakers import WordBreaker

        # Dictionaries know the letters that NFKC would take apart: Thai SARA AM, Lao HO NO.
        folded = composed(text.casefold())
        divided = regex.sub(
            _UNSPACED, lambda run: f" {' '.join(WordBreaker(run[0], 'und'))} ", folded
        )
        normal = unicodedata.normalize("NFKC", divided)
        kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in normal)
        return str(regex.sub(_CHARACTER, r" \g<0> ", kept)).split()


@cache
def _tokenizer(name: str) -> Any:
    if name == "words":
        return _WordTokenizer()
    if name != "default":
        raise InputError(f"--rouge-tokenizer {name}: must be one of {', '.join(ROUGE_TOKENIZERS)}.")
    from rouge_score.tokenizers import DefaultTokenizer

    default = DefaultTokenizer(use_stemmer=True)  # which takes a second, and scikit-learn with it
    # Answers say the same words over and over.
    default._stemmer.stem = lru_cache(maxsize=2**16)(default._stemmer.stem)
    # An accented letter that is written as two would be a letter a to z.
    return SimpleNamespace(tokenize=lambda text: default.tokenize(composed(text)))


def tokenize_words(text: str, *, tokenizer: str = "default") -> list[str]:
    """Return the words that ROUGE counts."""
    words: list[str] = _tokenizer(tokenizer).tokenize(text)
    return words


def lost_share(text: str, *, tokenizer: str = "default") -> float:
    """Return the share of a text's letters, marks and digits that ROUGE leaves out.

    It is 1 where ROUGE counts no word. The stemmer, which takes a second to load, is not needed.
    """
    if tokenizer == "words":
        return float(not tokenize_words(text, tokenizer=tokenizer))
    letters = [one for one in text.lower() if unicodedata.category(one)[0] in "LMN"]
    lost = sum(one not in _WORD_CHARACTERS for one in letters)
    return lost / len(letters) if letters else 1.0


@lru_cache(maxsize=2**16)  # from trial to trial most answers are the same
def rouge_recall(truth: str, answer: str, tokenizer: str = "default") -> Recall:
    """Return how much of the truth an answer says."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], tokenizer=_tokenizer(tokenizer))
    scores = scorer.score(truth, answer)
    # An empty answer's ROUGE-L is the integer 0.
    return Recall(rouge1=float(scores["rouge1"].recall), rouge_l=float(scores["rougeL"].recall))


def check_scorable(
    sets: Mapping[str, Sequence[Record]], *, tokenizer: str = "default", text: bool = True
) -> None:
    """Raise a DataError for true answers of which ROUGE sees too little to judge by them.

    `sets` are named in the message, which shows some answers where `text` allows.
    """
    problems = Problems()
    words = "Give --rouge-tokenizer words, which counts the letters of every script"
    shares = {
        record: lost_share(record.answer, tokenizer=tokenizer)
        for records in sets.values()
        for record in records
    }
    unseen = [record for record, share in shares.items() if share > MOST_LOST]
    if unseen:
        shown = "; ".join(
            f"{record.edge}: {record.question!r} -> {record.answer!r}" if text else record.edge
            for record in unseen[:5]
        )
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        problems.add(
            f"{len(unseen)} true answers have no word for the ROUGE tokenizer {tokenizer!r}, or "
            f"lose more than half of their letters to it, so that a score would say nothing: "
            f"{shown}{more}. "
            + ("Correct or remove them." if tokenizer == "words" else f"{words}, or correct them.")
        )
    for name, records in sets.items():
        lost = fmean([shares[one] for one in records if shares[one] <= MOST_LOST] or [0.0])
        if lost > MOST_LOST_OF_SET:
            problems.add(
                f"the {name} answers lose {lost:.0%} of their letters to the ROUGE tokenizer "
                f"{tokenizer!r}, more than {MOST_LOST_OF_SET:.0%}: pieces of words are left, which "
                f"a wrong answer has too. {words}."
            )
    problems.raise_if_any(DataError)


def lost_letters(records: Iterable[Record], tokenizer: str) -> str:
    """Say which true answers lose letters to the ROUGE tokenizer; empty where none does."""
    shares = [(one.edge, lost_share(one.answer, tokenizer=tokenizer)) for one in records]
    if not (lost := [share for _, share in shares if share]):
        return ""
    edges = listed(list(dict.fromkeys(edge for edge, share in shares if share)))
    return (
        f"{len(lost)} of {len(shares)} true answers (edges: {edges}) lose up to {max(lost):.0%} of "
        f"their letters to the ROUGE tokenizer {tokenizer!r}, and what differs in those alone "
        "counts as the same. --rouge-tokenizer words counts them."
    )


class RecallStop:
    """Tells which rows have said every word of their truths; other rows go on."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        truths: Mapping[int, Sequence[str]],
        *,
        rouge_tokenizer: str,
    ) -> None:
        self._tokenizer, self._rouge_tokenizer = tokenizer, rouge_tokenizer
        vocabulary = tokenizer.get_vocab()
        self._bytes = frozenset(i for token, i in vocabulary.items() if _BYTE.fullmatch(token))
        self._words = {
            row: [tokenize_words(truth, tokenizer=rouge_tokenizer) for truth in texts]
            for row, texts in truths.items()
        }

    def done(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[bool]:
        """Say of each row whether its tokens so far hold the truth in finished words."""
        if not rows:  # `batch_decode` of nothing is one empty text
            return []
        texts = self._tokenizer.batch_decode(
            [self._without_bytes(row) for row in tokens], skip_special_tokens=True
        )
        return [self._holds(row, text) for row, text in zip(rows, texts, strict=True)]

    def _without_bytes(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens without bytes at their end."""
        kept = list(tokens)
        while kept and kept[-1] in self._bytes:
            kept.pop()
        return kept

    def _holds(self, row: int, text: str) -> bool:
        part = finished_part(text, rouge_tokenizer=self._rouge_tokenizer)
        said = tokenize_words(part, tokenizer=self._rouge_tokenizer)
        return row in self._words and all(_is_subsequence(one, said) for one in self._words[row])


def finished_part(text: str, *, rouge_tokenizer: str) -> str:
    """Return the beginning of a text up to its last character that belongs to no word."""
    text = (text.lower() if rouge_tokenizer == "default" else text).rstrip(_REPLACEMENT)
    end = len(text)
    while end and _belongs_to_a_word(text[end - 1], rouge_tokenizer):
        end -= 1
    return text[:end]


def _belongs_to_a_word(character: str, rouge_tokenizer: str) -> bool:
    if rouge_tokenizer == "default":
        return character in _WORD_CHARACTERS
    # NFKC joins and parts characters: only what it leaves alone and calls no letter ends a word.
    normal = unicodedata.normalize("NFKC", character)
    return any(unicodedata.category(part)[0] in "LMN" for part in normal) or normal != character


def _is_subsequence(words: Sequence[str], said: Sequence[str]) -> bool:
    remaining = iter(said)
    return all(word in remaining for word in words)
