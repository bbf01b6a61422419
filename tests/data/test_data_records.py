"""Records: their digest tells content and order apart, their table keeps both."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunar_tune.data.records import Record, records_digest, records_from_table, records_table

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
RECORDS = st.lists(st.builds(Record, question=TEXTS, answer=TEXTS, edge=TEXTS), max_size=8)


def test_a_record_cannot_be_changed() -> None:
    record = Record("Who?", "Ann.", "A_B")
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.answer = "Bob."  # type: ignore[misc]


def test_the_digest_is_the_sha256_of_one_json_line_for_each_record() -> None:
    records = [Record("Where?", "Köln.", "A_B"), Record("When?", "1999.", "B_C")]
    lines = b'["A_B", "Where?", "K\\u00f6ln."]\n["B_C", "When?", "1999."]\n'
    assert records_digest(records) == hashlib.sha256(lines).hexdigest()


def test_text_moved_from_one_field_to_another_changes_the_digest() -> None:
    assert records_digest([Record("ab", "c", "e")]) != records_digest([Record("a", "bc", "e")])


@given(RECORDS, RECORDS)
def test_digests_are_equal_exactly_when_the_records_are(a: list[Record], b: list[Record]) -> None:
    assert (records_digest(a) == records_digest(b)) == (a == b)
    assert (records_digest(a) == records_digest(a[::-1])) == (a == a[::-1])


@given(RECORDS)
def test_a_table_gives_the_same_records_back(records: list[Record]) -> None:
    table = records_table(records)
    assert table.column_names == ["edge", "question", "answer"]
    assert table.num_rows == len(records)
    assert records_from_table(table) == tuple(records)
