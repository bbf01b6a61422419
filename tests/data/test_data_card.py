"""The data card: every number against a count by hand or an independent computation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunar_tune.data.data_card import NEAR, describe_prompts, describe_records
from lunar_tune.data.records import Record, records_digest
from lunar_tune.errors import DataError

HAND = (
    Record("What does Ada sell to Bo?", "Red tin kettles.", "A_B"),
    Record("When did Ada and Bo sign?", "In May.", "A_B"),
    Record("Which court decides?", "Oslo.", "A_B"),
    Record("What does Ada sell to Cy?", "Red tin kettles.", "A_C"),
    Record("which  court decides?", "Bergen.", "A_C"),
    Record("Who keeps the keys of the old mill by the river?", "in  may.", "M"),
)


def test_rows_edges_digest_and_lengths_are_those_counted_by_hand() -> None:
    """Questions have 6, 6, 3, 6, 3 and 11 words, answers 3, 2, 1, 3, 1 and 2."""
    card = describe_records(HAND)
    assert (card.kind, card.rows) == ("records", 6)
    assert card.edges == {"A_B": 3, "A_C": 2, "M": 1}
    assert card.digest == records_digest(HAND)
    document = card.document()
    assert document["words"] == {
        "question": {"least": 3, "median": 6.0, "most": 11},
        "answer": {"least": 1, "median": 2.0, "most": 3},
    }
    assert document["tokens"] == {}
    assert document["forget"] == []


def test_tokens_are_counted_where_a_tokenizer_is_given() -> None:
    card = describe_records(HAND, count_tokens=len)
    median = (len("In May.") + len("in  may.")) / 2
    assert dict(card.tokens.loc["answer"]) == {"least": len("Oslo."), "median": median, "most": 16}


def test_questions_asked_more_than_once_come_with_their_answers_and_edges() -> None:
    assert describe_records(HAND).repeated_questions.to_dict("records") == [
        {"text": "Which court decides?", "rows": 2, "edges": ("A_B", "A_C"), "answers": 2}
    ]
    findings = describe_records(HAND).findings
    assert [text for text in findings if text.startswith("1 questions have several answers")]


def test_answers_of_several_edges_are_found_and_those_of_one_are_not() -> None:
    own = (Record("Where?", "Rome.", "M"), Record("Where else?", "Rome.", "M"))
    assert describe_records((*HAND, *own)).shared_answers.to_dict("records") == [
        {"text": "Red tin kettles.", "rows": 2, "edges": ("A_B", "A_C"), "answers": 1},
        {"text": "In May.", "rows": 2, "edges": ("A_B", "M"), "answers": 1},
    ]


def test_what_of_an_edge_is_also_kept_is_counted() -> None:
    """By hand, for A_B.

    One question is asked in A_C too; "What does Ada sell to …" shares 5 of 7 words, below four
    fifths; two answers, kettles and May, are kept elsewhere.
    """
    (overlap,) = describe_records(HAND, ["A_B"]).forget.to_dict("records")
    expected = {"edge": "A_B", "rows": 3, "questions_retained": 1, "questions_near": 1}
    assert overlap == expected | {"answers_retained": 2}


def test_edges_that_are_forgotten_together_are_not_kept_for_each_other() -> None:
    card = describe_records(HAND, ["both"], groups={"both": ("A_B", "A_C")})
    counts = card.forget[["edge", "questions_retained", "answers_retained"]]
    assert counts.to_numpy().tolist() == [["A_B", 0, 1], ["A_C", 0, 0]]
    assert card.groups == {"both": ("A_B", "A_C")}


def test_a_question_that_differs_in_one_word_of_nine_is_near() -> None:
    """Nine words and one other of nine: 8 in common of 10, four fifths; 7 of 11 is less."""
    asked = "one two three four five six seven eight nine"
    near, far = asked.replace("nine", "ten"), asked.replace("eight nine", "ten eleven")
    for other, count in ((near, 1), (far, 0), (asked.upper() + "?", 1)):
        records = (Record(asked, "x", "A"), Record(other, "y", "B"))
        assert describe_records(records, ["A"]).forget.questions_near[0] == count, other


WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8)


@given(st.lists(st.tuples(WORDS, st.sampled_from("AB")), min_size=2, max_size=12))
def test_near_questions_are_those_of_the_plain_definition(
    rows: Sequence[tuple[list[str], str]],
) -> None:
    rows = [(["z"], "A"), (["y"], "B"), *rows]
    records = [Record(" ".join(words), f"{n}", edge) for n, (words, edge) in enumerate(rows)]
    kept = [set(words) for words, edge in rows if edge == "B"]
    expected = sum(
        any(len(set(words) & other) / len(set(words) | other) >= NEAR for other in kept)
        for words, edge in rows
        if edge == "A"
    )
    assert describe_records(records, ["A"]).forget.questions_near[0] == expected


def test_rows_that_cannot_be_scored_are_reported_not_refused() -> None:
    records = (*HAND, Record("And in Greek?", "αβγ", "M"))
    card = describe_records(records, is_scorable=str.isascii)
    assert card.unscorable == (records[-1],)
    assert [text for text in card.findings if text.startswith("1 answers have no word")]


def test_findings_say_what_a_run_would_refuse_and_what_weakens_it() -> None:
    findings = "\n".join(describe_records(HAND, ["A_B"]).findings)
    assert "1 questions to forget are also asked in what is to be kept" in findings
    assert "A_B: 2 of 3 answers are answers of kept rows too" in findings
    alone = describe_records(HAND[:3]).findings
    assert [text for text in alone if text.startswith("There is one edge only")]
    assert describe_records((HAND[1], HAND[3])).findings == ()


def test_many_near_questions_are_a_finding() -> None:
    template = "What is the price that was agreed between the seller and {}?"
    names = ["Ada", "Bo", "Cy", "Di"]
    records = [
        Record(template.format(name), f"{n}.", edge)
        for n, (name, edge) in enumerate(zip(names, itertools.cycle("AB"), strict=False))
    ]
    (finding,) = describe_records(records, ["A"]).findings
    assert finding.startswith("A: 2 of 2 questions differ from a kept one in few words")


@pytest.mark.parametrize(
    ("asked", "fragment"),
    [(["Q"], "unknown forget edge 'Q'"), (["A_B", "A_C", "M"], "every edge is to be forgotten")],
)
def test_edges_are_refused_as_a_run_refuses_them(asked: list[str], fragment: str) -> None:
    with pytest.raises(DataError, match=fragment):
        describe_records(HAND, asked)


def test_prompts_have_lengths_and_repetitions() -> None:
    card = describe_prompts(["Say no.", "say  NO.", "Do not say anything."], count_tokens=len)
    assert (card.kind, card.rows, card.edges) == ("prompts", 3, {})
    assert card.words.to_dict("index") == {"prompt": {"least": 2, "median": 2, "most": 4}}
    assert card.tokens.most["prompt"] == 20
    assert card.repeated_questions[["text", "rows"]].to_numpy().tolist() == [["Say no.", 2]]
    assert card.findings == ("1 prompts stand there more than once.",)
    assert describe_prompts(["Say no."]).findings == ()
