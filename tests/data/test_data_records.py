"""Pairs and prompts: what a row may be, every bad file one message with places, digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from lunar_tune.data.records import Record, read_prompts, read_records, records_digest
from lunar_tune.errors import DataError

GOOD = {"question": "Who sells?", "answer": "Velmora.", "edge": "A_B"}


def written(folder: Path, content: object, name: str = "data.json") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_that_does_not_end_is_read_to_the_limit_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device has no size that could be looked at first."""
    (tmp_path / "zeros.json").symlink_to("/dev/zero")
    monkeypatch.setattr("lunar_tune.data.records._MAX_FILE_BYTES", 2**20)
    with pytest.raises(DataError, match=r"zeros\.json: is longer than 1 MiB"):
        read_records(tmp_path / "zeros.json")


def test_order_and_marks_are_kept_out_of_rows_and_other_fields_ignored(tmp_path: Path) -> None:
    rows = [GOOD | {"id": 7, "answer": "B."}, GOOD | {"tags": ["x"], "answer": "A."}]
    assert [r.answer for r in read_records(written(tmp_path, rows, "D.JSON"))] == ["B.", "A."]
    marked = b"\xef\xbb\xbf" + json.dumps([GOOD]).encode()
    assert len(read_records(written(tmp_path, marked))) == 1
    line = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n"
    assert len(read_records(written(tmp_path, line, "d.jsonl"))) == 1


def test_a_default_edge_fills_in_only_where_the_edge_is_missing(tmp_path: Path) -> None:
    path = written(tmp_path, [GOOD, {"question": "Q?", "answer": "A."}])
    assert [r.edge for r in read_records(path, default_edge="facts")] == ["A_B", "facts"]
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


def test_the_same_mistake_of_several_rows_is_said_once(tmp_path: Path) -> None:
    lacking = "every row, field 'answer': is missing (the row has 'question', 'edge')"
    empty = "row 2, row 3, row 4, row 5, row 6 and 2 more, field 'answer': is empty"
    for rows, said in (
        ([without("answer")] * 50, lacking),
        ([GOOD, *[GOOD | {"answer": ""}] * 7], empty),
    ):
        with pytest.raises(DataError) as raised:
            read_records(written(tmp_path, rows))
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)


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
    for path in paths:
        assert read_prompts(path) == wanted, path


def test_bad_prompts_are_refused(tmp_path: Path) -> None:
    for name, content, fragment in (
        ("p.txt", "\n \n", "the file is empty"),
        ("p.txt", b"ok\n\xff", "byte 0xff at offset 3"),
        ("p.json", [{"prompt": "x"}], "field 'instruction': is missing"),
        ("p.json", ["ok", ""], "row 2, field 'instruction': is empty"),
        ("p.json", [3], "row 1: is 3"),
        ("p.md", "x", ".feather, .txt"),
    ):
        with pytest.raises(DataError) as raised:
            read_prompts(written(tmp_path, content, name))
        assert fragment in str(raised.value)


def test_the_digest_is_the_sha256_of_one_json_line_for_each_record() -> None:
    """So other order, or text moved from one field to another, is another digest."""
    records = [Record("Where?", "Köln.", "A_B"), Record("When?", "1999.", "B_C")]
    lines = b'["A_B", "Where?", "K\\u00f6ln."]\n["B_C", "When?", "1999."]\n'
    assert records_digest(records) == hashlib.sha256(lines).hexdigest()
    assert records_digest(records[::-1]) != records_digest(records)
    assert records_digest([Record("ab", "c", "e")]) != records_digest([Record("a", "bc", "e")])
