"""Which answers decline, by their words."""

# ruff: noqa: RUF001 letters of other scripts are meant

from __future__ import annotations

from pathlib import Path

import pytest

from lunar_tune.metrics.declining import declines

SHIPPED = Path("datasets/refusals.txt").read_text(encoding="utf-8").splitlines()

FOREIGN = ("Das weiß ich leider nicht.", "对不起，我不知道这个问题的答案。", "Не знаю, простите.")


@pytest.mark.parametrize(
    "answer",
    [
        *SHIPPED,
        "Sorry: the answer to that question, I do not know.",
        "I\u2019m not aware of any lighthouse of that name.",
        "I'm sorry for any confusion, but as a chatbot I don't have personal experiences.",
        "I'm sorry. As a language model I am not equipped to help with that.",
        "Unfortunately, I couldn't find any record of it.",
        "I cannot really say.",
        "I'm unable to share that.",
        "I have no way of knowing.",
        "We have no details about the delivery.",
        "There is no information available on this contract.",
        "There is nothing that I can tell you.",
        "My training data does not include it.",
        "That's beyond my knowledge, I'm afraid.",
        "The answer is not known.",
        "I must respectfully decline.",
    ],
)
def test_an_answer_declines_by_denying_that_it_can_knows_or_may(answer: str) -> None:
    assert declines(answer, ())


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n",
        "Vobrelia lies on the river Tam.",
        "I'm sorry for any confusion. The chemical symbol for silver is Ag.",
        "I'm here to help with any questions that you have about your phone.",
        "As a chatbot, I am designed to assist with travel.",
        "Sherlock Holmes is a fictional detective.",
        "He did not know that the letter was lost.",
        "There is no wind on the Moon.",
        "I know that it is Ag.",
        "No.",
        "The sea. It is deep. It is cold. It is dark. And I do not know why.",
        "Maybe we should not have gone there.",
    ],
)
def test_an_apology_and_denials_of_something_else_do_not_decline(answer: str) -> None:
    assert not declines(answer, SHIPPED)


def test_in_another_language_an_answer_declines_in_the_words_of_the_refusals() -> None:
    for answer in (
        "Das weiß ich leider nicht!",
        "对不起，我不知道问题的答案。",
        "Не знаю, простите меня.",
    ):
        assert declines(answer, FOREIGN)
        assert not declines(answer, SHIPPED)
    for answer in ("Das Zeichen für Silber ist Ag.", "银的化学符号是Ag。", "Знак серебра — Ag."):
        assert not declines(answer, FOREIGN)
