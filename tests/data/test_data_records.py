"""Pairs and prompts: what a row may be in every format, every bad file one message, digests."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.data.readers import SUFFIXES, Row, read_rows
from lunar_tune.data.records import Record, read_prompts, read_records, records_digest
from lunar_tune.data.texts import edge_name
from lunar_tune.errors import DataError

ALPACA = {"edge": "A", "instruction": "Q?", "output": "A."}
GOOD = {"question": "Who sells?", "answer": "Velmora.", "edge": "A_B"}


def written(folder: Path, content: object, name: str = "data.json") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_devices_and_pipes_are_refused_and_long_files_read_to_the_limit_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zeros.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("zeros.json", "pipe.json"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read \(it is a device or a pipe"):
            read_records(tmp_path / name)
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(2**40)
    monkeypatch.setattr("lunar_tune.data.readers._MAX_FILE_BYTES", 2**20)
    with pytest.raises(DataError, match=r"sparse\.json: is longer than 1 MiB"):
        read_records(tmp_path / "sparse.json")


def bombs(folder: Path) -> Iterator[tuple[Path, str]]:
    """Write files of a few kilobytes that stand for gigabytes; yield each with what is said."""
    for name, value, rows, said in (
        ("rows.parquet", "x", 2_000, "it has 2,000 rows; at most 1,000"),
        ("wide.parquet", "x" * 900_000, 200, "it takes more than 64 MiB of memory"),
    ):
        column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [value])
        pa.parquet.write_table(pa.table(dict.fromkeys(GOOD, column)), folder / name)
        yield folder / name, said
    column = pa.array(["x" * 100] * 30_000)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    table = pa.table(dict.fromkeys(GOOD, column))
    with pa.ipc.new_file(folder / "zip.arrow", table.schema, options=options) as file:
        file.write_table(table)
    yield folder / "zip.arrow", "holds 30,000 rows; at most 1,000"
    objects = b"[" + b"{}," * 100_000 + b"{}]"
    (folder / "objects.json.gz").write_bytes(gzip.compress(objects))
    yield folder / "objects.json.gz", "holds 100,001 rows; at most 1,000"
    (folder / "rows.jsonl").write_bytes(b"{}\n" * 1_500)
    yield folder / "rows.jsonl", "holds 1,500 rows; at most 1,000"


def test_a_file_that_stands_for_gigabytes_is_refused_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in (("_MEMORY", 2**26), ("_MAX_ROWS", 1000), ("_SMALL", 0)):
        monkeypatch.setattr(f"lunar_tune.data.readers.{name}", limit)
    for path, said in bombs(tmp_path):
        with pytest.raises(DataError, match=said):
            read_records(path)


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
    "no such suffix": ("data.xml", "a,b", ["'.xml' is not supported", ".json, .jsonl, .ndjson"]),
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
    "no edge": ("data.json", [without("edge")], ["row 1, field 'edge'", "with --edge NAME"]),
    "empty field": ("data.json", [GOOD | {"answer": "\t"}], ["field 'answer': is empty"]),
    "null field": ("data.json", [GOOD | {"answer": None}], ["field 'answer': is null"]),
    "number": ("data.json", [GOOD | {"answer": 12}], ["is 12; it must be a text in quotes"]),
    "not a number": ("data.json", '[{"question": NaN}]', ["field 'question': is NaN"]),
    "numeric edge": ("data.json", [GOOD | {"edge": 3}], ["field 'edge': is 3"]),
    "boolean": ("data.json", [GOOD | {"answer": True}], ["is true; it must be a text"]),
    "list field": ("data.json", [GOOD | {"answer": ["x"]}], ["is a list; it must be a text"]),
    "surrogate": ("data.json", [GOOD | {"answer": "a\ud800"}], ["half of a surrogate pair"]),
    "huge": ("data.json", [GOOD | {"answer": "x" * 1_000_001}], ["holds 1000001 bytes of text"]),
    "not UTF-8": (
        "data.json",
        b'[{"question": "\xe9"}]',
        ["0xe9 at offset 15; if é is meant, iconv"],
    ),
    "cut UTF-16": ("data.jsonl", b"\xff\xfe{", ["is not UTF-16: byte 0x7b at offset 2"]),
    "cut gzip": ("data.json.gz", gzip.compress(b"[]" * 99)[:-5], ["cannot be decompressed"]),
    "several splits": (
        "data.json",
        {"train": [GOOD], "test": [GOOD]},
        ["(train, test); write the"],
    ),
    "uneven columns": ("data.json", {"question": ["a"], "answer": []}, ["holds an object"]),
    "CSV without names": ("data.csv", "A,Q0?,A.\nA,Q1?,B.", ["has 'A', 'Q0?', 'A.'); add it"]),
    "CSV cells": ("data.csv", "edge,question,answer\nA,Q?,B, C\n", ["line 2: has 4 columns", "3;"]),
    "CSV quotes": ("data.tsv", 'edge\tquestion\n"A" B\tC', ["line 2: is not valid CSV"]),
    "CSV space": ("data.csv", 'edge,question\nA, "Q?"', ["line 2: has a space before a quotation"]),
    "CSV joined": ("data.csv", "edge,question\nedge,question", ["line 2: repeats the names of"]),
    "field twice": ("data.json", '[{"edge": "A", "edge": "B"}]', ["'edge' stands twice in one"]),
    "CSV names": ("data.csv", "edge,edge\nA,B", ["names a column twice"]),
    "chat": ("data.json", [{"messages": [{"role": "user"}] * 2}], ["turns of user, user; one"]),
    "chat of texts": ("data.json", [{"edge": "A", "messages": "Q?"}], ["holds turns of nobody"]),
    "Alpaca input": ("data.json", [ALPACA | {"input": 3}], ["has an 'input' that is no text"]),
    "Alpaca history": ("data.json", [ALPACA | {"history": [["a", "b"]]}], ["has a 'history'"]),
    "Alpaca number": ("data.json", [ALPACA | {"output": 3}], ["field 'output': is 3"]),
    "two shapes": ("data.json", [ALPACA | {"prompt": "Q?", "response": "A."}], ["2 problems"]),
    "invisible": ("data.json", [GOOD | {"answer": "\u200b\u2060"}], ["field 'answer': is empty"]),
    "broken line": ("data.jsonl", json.dumps(GOOD) + "\n{", ["line 2: column 2", "not valid JSON"]),
    "not Parquet": ("data.parquet", "no", ["cannot be read as Parquet"]),
    "not Arrow": ("data.arrow", "nonsense", ["cannot be read as Arrow"]),
    "cut Arrow": ("data.arrow", b"ARROW1\0\0", ["cannot be read as Arrow"]),
    "old Feather": ("data.feather", b"FEA1....", ["Feather V1", "write it again"]),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, fragments = BAD_RECORDS[case]
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
        ("p.json", [{"text": "x"}], "field 'instruction': is missing"),
        ("p.json", ["ok", ""], "row 2, field 'instruction': is empty"),
        ("p.json", [3], "row 1: is 3"),
        ("p.md", "x", ".feather, .txt (for prompts alone), each also with .gz"),
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


# Formats

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(edge_name)
RECORDS = st.lists(
    st.builds(Record, question=TEXTS, answer=TEXTS, edge=TEXTS), min_size=1, max_size=6
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
ALMOST_ROWS = st.lists(
    ANY_JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(("question", "answer"), ANY_JSON)),
    max_size=4,
)
few = settings(max_examples=15, deadline=None)


def table_of(records: list[Record]) -> pa.Table:
    return pa.Table.from_pylist(list(map(asdict, records)))


def write_json(path: Path, records: list[Record]) -> None:
    path.write_text(json.dumps(list(map(asdict, records))), encoding="utf-8")


def write_jsonl(path: Path, records: list[Record]) -> None:
    # Characters such as U+2028 stay as they are: they must not be taken for the end of a line.
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
    path.write_bytes("\n".join(lines).encode())


def write_parquet(path: Path, records: list[Record]) -> None:
    pa.parquet.write_table(table_of(records), path)


def write_arrow(path: Path, records: list[Record], new: Any = pa.ipc.new_file) -> None:
    with new(str(path), (table := table_of(records)).schema) as writer:
        writer.write_table(table)


def write_feather(path: Path, records: list[Record]) -> None:
    pa.feather.write_feather(table_of(records), str(path))


def write_csv(path: Path, records: list[Record]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerows(
            [("answer", "edge", "question"), *((r.answer, r.edge, r.question) for r in records)]
        )


def write_gzip(path: Path, records: list[Record]) -> None:
    write_jsonl(path, records)
    path.write_bytes(gzip.compress(path.read_bytes()))


WRITERS = {
    "csv": ("r.csv", write_csv),
    "gzip": ("r.jsonl.gz", write_gzip),
    "json": ("r.json", write_json),
    "json lines": ("r.jsonl", write_jsonl),
    "parquet": ("r.parquet", write_parquet),
    "arrow file": ("r.arrow", write_arrow),
    "arrow stream": ("r.arrow", partial(write_arrow, new=pa.ipc.new_stream)),
    "feather": ("r.feather", write_feather),
}


def as_read(record: Record, name: str) -> Record:
    """Return a record as it is read; in CSV the ends of lines stand as they are typed."""
    question, answer = (
        unicodedata.normalize("NFC", re.sub("\r\n?", "\n", text) if ".csv" in name else text)
        for text in (record.question, record.answer)
    )
    return Record(question, answer, edge_name(record.edge))


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)
@few
@given(records=RECORDS, share=st.floats(0, 0.99))
def test_what_is_written_in_any_format_is_read_back_and_refused_where_cut_short(
    name: str, write: Callable[[Path, list[Record]], None], records: list[Record], share: float
) -> None:
    with TemporaryDirectory() as folder:
        write(Path(folder) / name, records)
        assert read_records(Path(folder) / name) == tuple(as_read(one, name) for one in records)
        whole = (Path(folder) / name).read_bytes()
    read_or_refuse(name, whole[: int(share * len(whole))])


def read_or_refuse(name: str, content: bytes) -> None:
    """Read a file both ways; any exception but `DataError` fails the test."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for read in (read_records, read_prompts):
            try:
                assert read(path)
            except DataError as error:
                assert str(path) in str(error)  # noqa: PT017 - either outcome is right


@few
@given(rows=ALMOST_ROWS)
def test_any_json_is_read_or_refused(rows: list[object]) -> None:
    read_or_refuse("d.json", json.dumps(rows).encode())
    read_or_refuse("d.jsonl", "\n".join(json.dumps(row) for row in rows).encode())


@few
@given(content=st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for suffix in SUFFIXES:
        read_or_refuse(f"d{suffix}", content)


def test_places_are_those_that_an_editor_shows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n"x"\n\n{\n')
    first, second = read_rows(tmp_path / "a.jsonl", ())
    assert first == Row("line 2", "x")
    assert second.place == "line 4"
    assert "is not valid JSON" in second.problem
    (tmp_path / "a.txt").write_text("\n x \n\ny")
    assert read_rows(tmp_path / "a.txt", ()) == [Row("line 2", "x"), Row("line 4", "y")]
    (tmp_path / "a.json").write_text("[1, null]")
    assert read_rows(tmp_path / "a.json", ()) == [Row("row 1", 1), Row("row 2", None)]


# The same three pairs, as other programs write them, and the word on how they are read.
THREE = (Record("Né où ?", "À Lyon.", "A"), Record("Sells?", "Rope.", "A"), Record("R?", "S.", "B"))


def renamed(question: str, answer: str, **more: Any) -> list[dict[str, Any]]:
    return [{"edge": r.edge, question: r.question, answer: r.answer, **more} for r in THREE]


def chats(name: str, role: str, text: str, *roles: str) -> list[dict[str, Any]]:
    return [
        {
            "edge": r.edge,
            name: [
                {role: roles[-place], text: ("", r.answer, r.question, "Be brief.")[place]}
                for place in range(len(roles), 0, -1)
            ],
        }
        for r in THREE
    ]


def in_parquet(rows: list[dict[str, Any]]) -> bytes:
    pa.parquet.write_table(pa.Table.from_pylist(rows), file := BytesIO())
    return file.getvalue()


OPENAI = chats("messages", "role", "content", "user", "assistant")
SHARED = chats("conversations", "from", "value", "system", "human", "gpt")
COLUMNS = {name: [getattr(r, name) for r in THREE] for name in ("question", "answer", "edge")}
CSV = "edge,question,answer\n" + "".join(f"{r.edge},{r.question},{r.answer}\n" for r in THREE)
AS_WRITTEN = {
    "Alpaca": ("a.json", renamed("instruction", "output", input=""), "the answer is 'output'"),
    "completions": ("a.json", renamed("prompt", "completion"), "the question is 'prompt'"),
    "responses": ("a.json", renamed("prompt", "response", id=3), "the answer is 'response'"),
    "chat": ("a.json", OPENAI, "are the turns of 'messages'"),
    "chat in Parquet": ("a.parquet", in_parquet(OPENAI), "are the turns of 'messages'"),
    "ShareGPT": ("a.json", SHARED, "system turns are left out (--system-prompt"),
    "splits": ("a.json", {"train": renamed("question", "answer")}, "rows are those of 'train'"),
    "columns": ("a.json", COLUMNS, "made of the columns question, answer, edge"),
    "CSV": ("a.csv.gz", gzip.compress(CSV.encode("utf-8-sig")), ""),
    "semicolons": ("a.csv", CSV.replace(",", ";"), "semicolons separate its columns"),
    "tabs": ("a.tsv", CSV.replace(",", "\t").replace("\n", "\r\n"), ""),
    "UTF-16": ("a.csv", CSV.encode("utf-16"), "read as UTF-16"),
    "UTF-16 without a mark": ("a.csv", CSV.encode("utf-16-le"), "read as UTF-16-LE"),
    "NFD": ("a.csv", unicodedata.normalize("NFD", CSV), "form NFC (1 of 3 rows)"),
    "context": ("a.json", renamed("question", "answer", context="1999"), "'context' is left out"),
    "joined": ("a.csv", CSV.replace("\nB", "\n\ufeffB"), ""),
    "edges": ("a.csv", CSV.replace("A,S", "\u200bA\xa0,S"), "'\\u200bA\\xa0' as 'A' (1 of 3 rows)"),
}


@pytest.mark.parametrize("case", AS_WRITTEN)
def test_what_other_programs_write_is_read_as_the_same_pairs_with_a_word_on_how(
    tmp_path: Path, case: str
) -> None:
    name, content, word = AS_WRITTEN[case]
    notes: list[str] = []
    assert read_records(written(tmp_path, content, name), on_note=notes.append) == THREE
    assert word in "; ".join(notes)
    assert bool(notes) == bool(word)
    assert all(note.startswith(f"{name}: ") for note in notes)


def test_a_text_in_quotes_may_begin_with_a_space_and_a_quotation_mark(tmp_path: Path) -> None:
    """As Python's csv writes it; an unquoted one beside it is still refused."""
    said = Record(' "Who?", she\nasked', '\t"He."', "A")
    write_csv(path := tmp_path / "r.csv", [said, THREE[0]])
    assert read_records(path) == (said, THREE[0])
    with path.open("a") as file:
        file.write('"He.",A, "Who?"')
    with pytest.raises(DataError, match="line 5: has a space before a quotation mark"):
        read_records(path)


def test_letters_that_were_lost_before_are_noted(tmp_path: Path) -> None:
    notes: list[str] = []
    read_prompts(written(tmp_path, "Where is K\ufffdln?\nWho?", "p.txt"), on_note=notes.append)
    assert notes == [
        "p.txt: letters are lost: U+FFFD stands where something was decoded wrongly (1 of 2 rows)"
    ]


def test_an_alpaca_rows_input_stands_below_its_instruction(tmp_path: Path) -> None:
    row = ALPACA | {"instruction": "Sum up.", "input": "It is late."}
    for read in (read_records, read_prompts):
        notes: list[str] = []
        (one,) = read(written(tmp_path, [row]), on_note=notes.append)
        assert (one.question if isinstance(one, Record) else one) == "Sum up.\nIt is late."
        assert "'input' stands below 'instruction', in a line of its own" in "".join(notes)


def test_columns_that_were_not_asked_for_are_there_by_name_alone(tmp_path: Path) -> None:
    """Whatever they hold, also where no other column is there."""
    path = tmp_path / "t.parquet"
    pa.parquet.write_table(pa.table({"question": ["Q?"], "embedding": [[0.5, 0.5]]}), path)
    for asked, question in (("question", "Q?"), ("answer", None)):
        rows = read_rows(path, (asked,))
        assert rows == [Row("row 1", {"question": question, "embedding": None})]
    table = table_of([Record("Q?", "A.", "e")]).append_column("blob", pa.array([b"\xff"]))
    encoded = table.set_column(2, "edge", table["edge"].dictionary_encode())
    pa.parquet.write_table(encoded, path)
    assert read_records(path) == (Record("Q?", "A.", "e"),)


def damaged(folder: Path, name: str, table: pa.Table) -> str:
    """Return the message that a table ends in."""
    if name.endswith(".parquet"):
        pa.parquet.write_table(table, folder / name)
    else:
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError) as raised:
        read_records(folder / name)
    return str(raised.value)


def test_columns_that_lack_are_there_twice_or_hold_something_else_are_refused(
    tmp_path: Path,
) -> None:
    lacking = pa.table({"prompt": ["a", "b"], "answer": ["c", "d"], "edge": ["e", "e"]})
    message = damaged(tmp_path, "t.parquet", lacking)
    assert "'question': is missing (the row has 'prompt'" in message
    other = pa.table({"question": ["a", None], "answer": [1.5, 2.5], "edge": [b"x", b"y"]})
    message = damaged(tmp_path, "t.parquet", other)
    assert "row 1, field 'answer': is 1.5; it must be a text in quotes" in message
    assert "every row, field 'edge': is binary data" in message
    assert "row 2, field 'question': is null" in message
    names = ["question", "answer", "edge", "edge"]
    twice = pa.Table.from_arrays([pa.array(["x"])] * 4, names=names)
    for name in ("t.parquet", "t.arrow"):
        assert 'Field "edge" exists 2 times' in damaged(tmp_path, name, twice)
    offsets = pa.array([0, 1], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff")])
    text = pa.table({"question": broken, "answer": ["a"], "edge": ["e"]})
    message = damaged(tmp_path, "t.arrow", text)
    assert "cannot be read as Arrow" in message
    assert "Invalid UTF8" in message


def test_offsets_that_point_outside_of_a_damaged_arrow_file_are_refused(tmp_path: Path) -> None:
    """Without validation pyarrow follows the offsets, and the process dies of it."""
    path = tmp_path / "d.arrow"
    write_arrow(path, [Record("Who sells?", "Velmora.", "A_B")] * 3, pa.ipc.new_stream)
    # The column `question` holds three texts of ten bytes, so its offsets end in 20, 30.
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 10, 20, 30))
    whole = path.read_bytes()
    assert whole.count(offsets) == 1
    path.write_bytes(whole.replace(offsets, offsets[:-4] + (2**30).to_bytes(4, "little")))
    with pytest.raises(DataError, match="cannot be read as Arrow"):
        read_records(path)
