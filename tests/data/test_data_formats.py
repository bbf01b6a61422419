"""Formats: every one gives the same records; no content raises anything but a `DataError`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
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

from lunar_tune.data.records import SUFFIXES, Record, Row, read_prompts, read_records, read_rows
from lunar_tune.errors import DataError

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
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


WRITERS = {
    "json": ("r.json", write_json),
    "json lines": ("r.jsonl", write_jsonl),
    "parquet": ("r.parquet", write_parquet),
    "arrow file": ("r.arrow", write_arrow),
    "arrow stream": ("r.arrow", partial(write_arrow, new=pa.ipc.new_stream)),
    "feather": ("r.feather", write_feather),
}


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)
@few
@given(records=RECORDS, share=st.floats(0, 0.99))
def test_what_is_written_in_any_format_is_read_back_and_refused_where_cut_short(
    name: str, write: Callable[[Path, list[Record]], None], records: list[Record], share: float
) -> None:
    with TemporaryDirectory() as folder:
        write(Path(folder) / name, records)
        assert read_records(Path(folder) / name) == tuple(records)
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
