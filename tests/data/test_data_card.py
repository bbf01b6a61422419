"""The data card: every number against a count by hand or an independent computation."""

from __future__ import annotations

import itertools
import random

from lunar_tune.data.data_card import NEAR, describe_prompts, describe_records
from lunar_tune.data.records import Record, records_digest

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
    card = describe_records(HAND, count_tokens=len)
    assert (card.kind, card.rows, card.digest) == ("records", 6, records_digest(HAND))
    assert card.edges == {"A_B": 3, "A_C": 2, "M": 1}
    document = card.document()
    assert document["words"] == {
        "question": {"least": 3, "median": 6.0, "most": 11},
        "answer": {"least": 1, "median": 2.0, "most": 3},
    }
    median = (len("In May.") + len("in  may.")) / 2
    assert dict(card.tokens.loc["answer"]) == {"least": len("Oslo."), "median": median, "most": 16}
    assert document["forget"] == []


def test_what_is_asked_or_answered_more_than_once_comes_with_its_edges() -> None:
    """An answer of one edge alone is not shared."""
    own = (Record("Where?", "Rome.", "M"), Record("Where else?", "Rome.", "M"))
    card = describe_records((*HAND, *own))
    assert card.repeated_questions.to_dict("records") == [
        {"text": "Which court decides?", "rows": 2, "edges": ("A_B", "A_C"), "answers": 2}
    ]
    assert card.shared_answers.to_dict("records") == [
        {"text": "Red tin kettles.", "rows": 2, "edges": ("A_B", "A_C"), "answers": 1},
        {"text": "In May.", "rows": 2, "edges": ("A_B", "M"), "answers": 1},
    ]


def test_what_of_an_edge_is_also_kept_is_counted() -> None:
    """A question of A_B is asked in A_C too, two of its answers are kept elsewhere.

    Edges that are forgotten together are not kept for each other.
    """
    (overlap,) = describe_records(HAND, ["A_B"]).forget.to_dict("records")
    expected = {"edge": "A_B", "rows": 3, "questions_retained": 1, "questions_near": 1}
    assert overlap == expected | {"answers_retained": 2}
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


def test_near_questions_are_those_of_the_plain_definition() -> None:
    """Of 200 questions of one to eight letters, in six edges of which three are forgotten."""
    draw = random.Random(0)
    rows = [
        (draw.choices("abcdefgh", k=draw.randint(1, 8)), draw.choice("ABCDEF")) for _ in range(200)
    ]
    records = [Record(" ".join(words), f"{n}", edge) for n, (words, edge) in enumerate(rows)]
    kept = [set(words) for words, edge in rows if edge in "DEF"]
    expected = {
        forgotten: sum(
            any(len(set(words) & other) / len(set(words) | other) >= NEAR for other in kept)
            for words, edge in rows
            if edge == forgotten
        )
        for forgotten in "ABC"
    }
    found = describe_records(records, list("ABC")).forget
    assert dict(zip(found.edge, found.questions_near, strict=True)) == expected
    assert 0 < sum(expected.values()) < sum(edge in "ABC" for _, edge in rows)


GREEK = Record("And in Greek?", "αβγ", "M")
ASKED = "1 questions to forget are also asked in what is to be kept"
ANSWERED = "A_B: 2 of 3 answers are answers of kept rows too"
PRICES = [
    Record(f"What is the price that was agreed between the seller and {name}?", f"{name}.", edge)
    for name, edge in zip(("Ada", "Bo", "Cy", "Di"), itertools.cycle("AB"), strict=False)
]


def test_findings_say_what_a_run_would_refuse_and_what_weakens_it() -> None:
    for records, forget, findings in (
        (HAND, ["A_B"], [ASKED, "1 questions have several answers", ANSWERED]),
        (HAND[:3], [], ["There is one edge only"]),
        ((HAND[1], HAND[3]), [], []),
        ((HAND[1], HAND[3], GREEK), [], ["Greek"]),
        (PRICES, ["A"], ["A: 2 of 2 questions differ from a kept one in few words"]),
    ):
        unseen = ["Greek letters."] * (GREEK in records)
        card = describe_records(records, forget, is_scorable=str.isascii, unseen=unseen)
        for said, part in zip(card.findings, findings, strict=True):
            assert said.startswith(part)
        assert card.unscorable == tuple(record for record in records if record is GREEK)


def test_prompts_have_lengths_and_repetitions() -> None:
    card = describe_prompts(["Say no.", "say  NO.", "Do not say anything."], count_tokens=len)
    assert (card.kind, card.rows, card.edges) == ("prompts", 3, {})
    assert card.words.to_dict("index") == {"prompt": {"least": 2, "median": 2, "most": 4}}
    assert card.tokens.most["prompt"] == 20
    assert card.repeated_questions[["text", "rows"]].to_numpy().tolist() == [["Say no.", 2]]
    assert card.findings == ("Prompts that occur more than once: 1.",)
    assert describe_prompts(["Say no."]).findings == ()
