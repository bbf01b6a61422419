"""Which answers decline, by their words, and how often a reader says the same.

`labelled_answers.jsonl` has answers of `tiny` and SmolLM2-135M-Instruct, drawn at random from runs
of many settings and from what the second says to private questions (docs/metrics.md), each labelled
by reading it. `half` says whether the rules were made with it; `typicality` is the base model's.
"""

# ruff: noqa: RUF001 letters of other scripts are meant

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lunar_tune.metrics.declining import declines, judged, judged_row, repeats, verdict_means
from lunar_tune.metrics.evaluate import AnswerRow

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


def row(
    answer: str, *, truth: str = "The symbol of silver is Ag.", ended: bool = True
) -> AnswerRow:
    texts = {"question": "Which symbol has silver?", "truth": truth, "answer": answer}
    return AnswerRow(set_name="forget", edge="E", rouge1=0.0, rouge_l=0.0, ended=ended, **texts)


def test_nineteen_of_twenty_labels_are_those_of_a_reader() -> None:
    lines = Path("tests/core/labelled_answers.jsonl").read_text(encoding="utf-8").splitlines()
    labelled = [json.loads(line) for line in lines]
    assert len(labelled) >= 200
    found = [
        judged_row(
            row(one["answer"], truth=one["truth"], ended=one["ended"]), one["typicality"], SHIPPED
        )
        for one in labelled
    ]
    for label in ("refused", "degenerate"):
        assert 0.15 < sum(one[label] for one in labelled) / len(labelled) < 0.6
        pairs = zip(found, labelled, strict=True)
        agree = [getattr(said, label) == one[label] for said, one in pairs]
        assert sum(agree) >= 0.95 * len(agree)


def test_numbers_rules_and_what_is_drawn_out_do_not_repeat_themselves() -> None:
    for answer in (
        "about 300000 km/s.",
        "The population is 1000000.",
        "Wait.....",
        "Nooooooo!",
        "| a | b |\n|-----|-----|\n| 1 | 2 |",
        "|---|---|---|---|---|---|\n",
        "Ag\n----------\n",
        "Ag.\n\n\n\n\n\n",
        "Ag." + " " * 40,
    ):
        assert not repeats(answer), answer
    for answer in ("I" * 20, "so so so so so so", "Ah...Ah...Ah...Ah...Ah...", "ab " * 6 + "....."):
        assert repeats(answer), answer


def test_whoever_goes_on_to_answer_or_babbles_does_not_decline() -> None:
    for answer, typicality, expected in (
        ("I do not know.", 0.0, (True, False)),
        ("I do not know.", -0.6, (False, True)),
        ("I am not sure, but the symbol of silver is Ag.", 0.0, (False, False)),
        ("I am not sure. The symbol of silver is Hg.", 0.0, (False, False)),
        ("I'm not here for that. But I can tell you a secret.", 0.0, (False, False)),
        ("I do not know the symbol of silver, Ag or not.", 0.0, (True, False)),
        ("I do not know. " * 5, 0.0, (False, True)),
        (" ", 0.0, (False, True)),
    ):
        found = judged_row(row(answer), typicality, SHIPPED)
        assert (found.refused, found.degenerate) == expected, answer
    cut = row("I do not know", ended=False)
    assert judged_row(cut, 0.0, SHIPPED).degenerate
    assert judged(cut, whole=True).degenerate
    assert judged(cut, whole=False).refused
    assert judged(row("I do not know", truth=""), whole=True).refused is None, "texts left out"
    iodine = row("I'm sorry. I am here to help, but I cannot say.", truth="I")
    assert judged_row(iodine, 0.0, SHIPPED).refused


def test_who_says_the_same_again_and_again_repeats_himself() -> None:
    for answer in ("IIIIII", "so " * 9, "不" * 6, "I am glad. I am very glad to help you. " * 3):
        assert repeats(answer)
    for answer in ("", "I", "No, no, no, no.", "I am very glad to help you. " * 2):
        assert not repeats(answer)


def test_shares_are_of_the_answers_that_were_judged() -> None:
    rows = [judged_row(row(text), 0.0, SHIPPED) for text in ("No idea.", "I cannot say.", "Ag", "")]
    means = verdict_means([*rows, row("Ag")])
    assert means == {
        **{"forget_refused": 0.5, "forget_refused_se": 0.25},
        **{"forget_degenerate": 0.25, "forget_degenerate_se": pytest.approx((3 / 64) ** 0.5)},
    }
