"""Pairs and prompts: every format gives the same, every bad file one message with places."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.data.records import Record, read_prompts, read_records, records_digest
from lunar_tune.errors import DataError

GOOD = {"question": "Who sells?", "answer": "Velmora.", "edge": "A_B"}
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
RECORDS = st.lists(
    st.builds(Record, question=TEXTS, answer=TEXTS, edge=TEXTS), min_size=1, max_size=6
)


def table_of(records: list[Record]) -> pa.Table:
    return pa.Table.from_pylist(rows_of(records))


def rows_of(records: list[Record]) -> list[dict[str, str]]:
    return [{"question": r.question, "answer": r.answer, "edge": r.edge} for r in records]


def write_json(path: Path, records: list[Record]) -> None:
    path.write_text(json.dumps(rows_of(records)), encoding="utf-8")


def write_jsonl(path: Path, records: list[Record]) -> None:
    # Characters such as U+2028 stay as they are: they must not be taken for the end of a line.
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(records)]
    path.write_bytes("\n".join(lines).encode())


def write_parquet(path: Path, records: list[Record]) -> None:
    pa.parquet.write_table(table_of(records), path)


def write_arrow_file(path: Path, records: list[Record]) -> None:
    table = table_of(records)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(path: Path, records: list[Record]) -> None:
    table = table_of(records)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_feather(path: Path, records: list[Record]) -> None:
    pa.feather.write_feather(table_of(records), str(path))


WRITERS = {
    "json": ("r.json", write_json),
    "json lines": ("r.jsonl", write_jsonl),
    "parquet": ("r.parquet", write_parquet),
    "arrow file": ("r.arrow", write_arrow_file),
    "arrow stream": ("r.arrow", write_arrow_stream),
    "feather": ("r.feather", write_feather),
}


def written(folder: Path, content: object, name: str = "data.json") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)
@settings(max_examples=25, deadline=None)
@given(records=RECORDS)
def test_what_is_written_in_any_format_is_read_back(
    name: str, write: Callable[[Path, list[Record]], None], records: list[Record]
) -> None:
    with TemporaryDirectory() as folder:
        write(Path(folder) / name, records)
        assert read_records(Path(folder) / name) == tuple(records)


def test_a_file_that_does_not_end_is_read_to_the_limit_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device has no size that could be looked at first."""
    (tmp_path / "zeros.json").symlink_to("/dev/zero")
    monkeypatch.setattr("lunar_tune.data.records._MAX_FILE_BYTES", 2**20)
    with pytest.raises(DataError, match=r"zeros\.json: is longer than 1 MiB"):
        read_records(tmp_path / "zeros.json")


def test_other_fields_are_ignored_and_order_is_kept(tmp_path: Path) -> None:
    rows = [GOOD | {"id": 7, "answer": "B."}, GOOD | {"tags": ["x"], "answer": "A."}]
    assert [r.answer for r in read_records(written(tmp_path, rows))] == ["B.", "A."]


def test_other_columns_are_ignored_whatever_they_hold(tmp_path: Path) -> None:
    table = table_of([Record("Q?", "A.", "e")]).append_column("blob", pa.array([b"\xff"]))
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    assert read_records(tmp_path / "t.parquet") == (Record("Q?", "A.", "e"),)


def test_dictionary_encoded_columns_are_texts(tmp_path: Path) -> None:
    table = table_of([Record("Q?", "A.", "e"), Record("R?", "B.", "e")])
    encoded = table.set_column(2, "edge", table["edge"].dictionary_encode())
    pa.parquet.write_table(encoded, tmp_path / "t.parquet")
    assert [r.edge for r in read_records(tmp_path / "t.parquet")] == ["e", "e"]


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    marked = b"\xef\xbb\xbf" + json.dumps([GOOD]).encode()
    assert len(read_records(written(tmp_path, marked))) == 1
    line = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n"
    assert len(read_records(written(tmp_path, line, "d.jsonl"))) == 1


def test_the_suffix_is_read_in_any_case(tmp_path: Path) -> None:
    assert len(read_records(written(tmp_path, [GOOD], "D.JSON"))) == 1


def test_a_default_edge_fills_in_only_where_the_edge_is_missing(tmp_path: Path) -> None:
    path = written(tmp_path, [GOOD, {"question": "Q?", "answer": "A."}])
    assert [r.edge for r in read_records(path, default_edge="facts")] == ["A_B", "facts"]


def test_a_default_edge_does_not_hide_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1, field 'edge': is empty"):
        read_records(written(tmp_path, [GOOD | {"edge": " "}]), default_edge="facts")


def without(field: str) -> dict[str, str]:
    return {name: text for name, text in GOOD.items() if name != field}


BAD_RECORDS = {
    "no such suffix": ("data.csv", "a,b", ["'.csv' is not supported", ".json, .jsonl, .parquet"]),
    "no suffix": ("data", "x", ["'' is not supported"]),
    "empty": ("data.json", "", ["the file is empty"]),
    "blank": ("data.jsonl", " \n\n", ["the file is empty"]),
    "no rows": ("data.json", [], ["has no rows"]),
    "broken JSON": ("data.json", '[{"question":\n "x",,', ["line 2, column 6", "not valid JSON"]),
    "JSON lines as JSON": ("data.json", "{}\n{}", ["line 2, column 1", "name it .jsonl"]),
    "nested deeply": ("data.json", "[" * 100_000, ["nested too deeply"]),
    "huge number": ("data.json", "[" + "1" * 5000 + "]", ["not valid JSON", "4300"]),
    "an object": ("data.json", GOOD, ["holds an object", "list of objects"]),
    "a text": ("data.json", '"x"', ["holds str"]),
    "row a text": ("data.json", [GOOD, "x"], ["row 2: is a text", "question, answer, edge"]),
    "prompts": ("data.txt", "x\ny", ["every row: is a text; it must be an object with question"]),
    "row a list": ("data.json", [[1]], ["row 1: is a list"]),
    "row null": ("data.json", [None], ["row 1: is null"]),
    "missing": ("data.json", [GOOD, without("answer")], ["row 2, field 'answer'", "'question'"]),
    "no edge": ("data.json", [without("edge")], ["row 1, field 'edge'", "default edge"]),
    "empty field": ("data.json", [GOOD | {"answer": "\t"}], ["field 'answer': is empty"]),
    "null field": ("data.json", [GOOD | {"answer": None}], ["field 'answer': is null"]),
    "number": ("data.json", [GOOD | {"answer": 12}], ["is 12; it must be a text in quotes"]),
    "not a number": ("data.json", '[{"question": NaN}]', ["field 'question': is NaN"]),
    "numeric edge": ("data.json", [GOOD | {"edge": 3}], ["field 'edge': is 3"]),
    "boolean": ("data.json", [GOOD | {"answer": True}], ["is true; it must be a text"]),
    "list field": ("data.json", [GOOD | {"answer": ["x"]}], ["is a list; it must be a text"]),
    "surrogate": ("data.json", [GOOD | {"answer": "a\ud800"}], ["half of a surrogate pair"]),
    "huge": ("data.json", [GOOD | {"answer": "x" * 1_000_001}], ["holds 1000001 bytes of text"]),
    "not UTF-8": ("data.json", b'[{"question": "\xe9"}]', ["byte 0xe9 at offset 15", "UTF-8"]),
    "UTF-16": ("data.jsonl", '{"a": 1}'.encode("utf-16"), ["at offset 0"]),
    "broken line": ("data.jsonl", json.dumps(GOOD) + "\n{", ["line 2: column 2", "not valid JSON"]),
    "not Parquet": ("data.parquet", "no", ["cannot be read as Parquet"]),
    "not Arrow": ("data.arrow", "nonsense", ["cannot be read as Arrow"]),
    "cut Arrow": ("data.arrow", b"ARROW1\0\0", ["cannot be read as Arrow"]),
    "old Feather": ("data.feather", b"FEA1....", ["Feather V1", "write it again"]),
}


@pytest.mark.parametrize(("name", "content", "fragments"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_file_is_refused_with_its_place(
    tmp_path: Path, name: str, content: object, fragments: list[str]
) -> None:
    path = written(tmp_path, content, name)
    with pytest.raises(DataError) as raised:
        read_records(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert [fragment for fragment in fragments if fragment not in message] == []
    assert len(message) < 600


def test_what_cannot_be_opened_is_refused_with_the_systems_reason(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for name, reason in (
        ("none.json", "No such file"),
        ("none.txt", "No such file"),
        ("folder.json", "Is a directory"),
        ("x" * 5000 + ".json", "File name too long"),
    ):
        read = read_prompts if name.endswith(".txt") else read_records
        with pytest.raises(DataError, match=rf"{name}: cannot be read \({reason}"):
            read(tmp_path / name)


def test_all_problems_are_said_at_once_and_those_after_twenty_are_counted(tmp_path: Path) -> None:
    rows = [GOOD, *(GOOD | {"answer": number} for number in range(23)), {"answer": "A."}]
    with pytest.raises(DataError) as raised:
        read_records(written(tmp_path, rows))
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("25 problems")
    assert lines[1].startswith("  - row 2, field 'answer': is 0; it must be")
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "  and 5 more"


def test_a_field_that_no_row_has_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        read_records(written(tmp_path, [without("answer")] * 50))
    message = str(raised.value)
    assert "every row, field 'answer': is missing (the row has 'question', 'edge')" in message
    assert "\n" not in message


def test_rows_with_the_same_mistake_are_one_problem(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        read_records(written(tmp_path, [GOOD, *[GOOD | {"answer": ""}] * 7]))
    places = "row 2, row 3, row 4, row 5, row 6 and 2 more"
    assert f"{places}, field 'answer': is empty" in str(raised.value)


def test_a_missing_column_is_said_once_with_the_columns_that_exist(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b"], "answer": ["c", "d"], "edge": ["e", "e"]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"'question': is missing \(the row has 'prompt'"):
        read_records(tmp_path / "t.parquet")


def test_columns_of_other_types_and_nulls_are_refused(tmp_path: Path) -> None:
    table = pa.table({"question": ["a", None], "answer": [1.5, 2.5], "edge": [b"x", b"y"]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError) as raised:
        read_records(tmp_path / "t.parquet")
    message = str(raised.value)
    assert "row 1, field 'answer': is 1.5; it must be a text in quotes" in message
    assert "every row, field 'edge': is binary data" in message
    assert "row 2, field 'question': is null" in message


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["x"])] * 4
    table = pa.Table.from_arrays(columns, names=["question", "answer", "edge", "edge"])
    for suffix, write in (("parquet", pa.parquet.write_table), ("arrow", None)):
        path = tmp_path / f"t.{suffix}"
        if write is None:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        else:
            write(table, path)
        with pytest.raises(DataError, match='Field "edge" exists 2 times'):
            read_records(path)


def test_text_in_a_column_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
    )
    table = pa.table({"question": broken, "answer": ["a"], "edge": ["e"]})
    with pa.ipc.new_stream(str(tmp_path / "t.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"cannot be read as Arrow .*Invalid UTF8"):
        read_records(tmp_path / "t.arrow")


def test_prompts_are_read_from_objects_texts_lines_and_tables(tmp_path: Path) -> None:
    wanted = ("Who is Zhafi?", "Where is Brolu?")
    objects = [{"instruction": text, "category": None} for text in wanted]
    pa.parquet.write_table(pa.table({"instruction": list(wanted)}), tmp_path / "p.parquet")
    paths = [
        written(tmp_path, objects, "a.json"),
        written(tmp_path, list(wanted), "b.json"),
        written(tmp_path, "\n".join(map(json.dumps, objects)), "c.jsonl"),
        written(tmp_path, "\n".join(map(json.dumps, wanted)), "d.jsonl"),
        written(tmp_path, f"\ufeff\n{wanted[0]}\r\n\r\n  {wanted[1]}", "e.txt"),
        tmp_path / "p.parquet",
    ]
    assert {path.name: read_prompts(path) for path in paths} == {
        path.name: wanted for path in paths
    }


BAD_PROMPTS = {
    "empty text": ("p.txt", "\n \n", "the file is empty"),
    "not UTF-8": ("p.txt", b"ok\n\xff", "byte 0xff at offset 3"),
    "no field": ("p.json", [{"prompt": "x"}], "field 'instruction': is missing"),
    "empty instruction": ("p.json", ["ok", ""], "row 2, field 'instruction': is empty"),
    "number": ("p.json", [3], "row 1: is 3"),
    "suffix": ("p.md", "x", ".feather, .txt"),
}


@pytest.mark.parametrize(("name", "content", "fragment"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_are_refused(tmp_path: Path, name: str, content: object, fragment: str) -> None:
    with pytest.raises(DataError) as raised:
        read_prompts(written(tmp_path, content, name))
    assert fragment in str(raised.value)


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
