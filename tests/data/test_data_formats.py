"""Formats: places count from 1, and no content whatever raises anything but a `DataError`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunar_tune.data.records import (
    SUFFIXES,
    Row,
    read_prompts,
    read_records,
    read_rows,
)
from lunar_tune.errors import DataError

ROW = {"edge": "A_B", "question": "Who sells?", "answer": "Velmora."}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
ALMOST_ROWS = st.lists(
    ANY_JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(("question", "answer"), ANY_JSON)),
    max_size=4,
)


def parquet_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist([ROW] * 3), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def stream_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([ROW] * 3)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


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


def test_places_are_those_that_an_editor_shows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n"x"\n\n{\n')
    first, second = read_rows(tmp_path / "a.jsonl", ())
    assert first == Row("line 2", "x")
    assert second.place == "line 4"
    assert "is not valid JSON" in second.problem
    (tmp_path / "a.txt").write_text("\n x \n\ny")
    lines = [Row("line 2", "x"), Row("line 4", "y")]
    assert read_rows(tmp_path / "a.txt", ()) == lines
    (tmp_path / "a.json").write_text("[1, null]")
    rows = [Row("row 1", 1), Row("row 2", None)]
    assert read_rows(tmp_path / "a.json", ()) == rows


def test_columns_that_were_not_asked_for_are_there_by_name_alone(tmp_path: Path) -> None:
    table = pa.table({"question": ["Q?"], "embedding": [[0.5, 0.5]]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    rows = read_rows(tmp_path / "t.parquet", ("question", "answer"))
    assert rows == [Row("row 1", {"question": "Q?", "embedding": None})]


def test_a_table_without_any_column_asked_for_still_has_its_rows(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"other": [1, 2]}), tmp_path / "t.parquet")
    rows = read_rows(tmp_path / "t.parquet", ("question",))
    assert [row.content for row in rows] == [{"other": None}] * 2


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@settings(max_examples=60, deadline=None)
@given(rows=ALMOST_ROWS)
def test_any_json_is_read_or_refused(suffix: str, rows: list[object]) -> None:
    lines = "\n".join(json.dumps(row) for row in rows)
    read_or_refuse(f"d{suffix}", (json.dumps(rows) if suffix == ".json" else lines).encode())


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(suffix: str, content: bytes) -> None:
    read_or_refuse(f"d{suffix}", content)


@pytest.mark.parametrize(
    ("suffix", "whole"), [(".parquet", parquet_bytes()), (".arrow", stream_bytes())]
)
@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 0.99))
def test_a_table_cut_short_is_read_or_refused(suffix: str, whole: bytes, share: float) -> None:
    read_or_refuse(f"d{suffix}", whole[: int(share * len(whole))])


def test_offsets_that_point_outside_of_a_damaged_arrow_file_are_refused(tmp_path: Path) -> None:
    """Without validation pyarrow follows the offsets, and the process dies of it."""
    whole = stream_bytes()
    # The column `question` holds three texts of ten bytes, so its offsets end in 20, 30.
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 10, 20, 30))
    assert whole.count(offsets) == 1
    damaged = whole.replace(offsets, offsets[:-4] + (2**30).to_bytes(4, "little"))
    (tmp_path / "d.arrow").write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read as Arrow"):
        read_records(tmp_path / "d.arrow")


def test_the_data_layer_loads_neither_torch_nor_what_stands_above_it() -> None:
    program = (
        "import pkgutil, importlib, sys, lunar_tune.data as data\n"
        "for module in pkgutil.iter_modules(data.__path__, 'lunar_tune.data.'):\n"
        "    importlib.import_module(module.name)\n"
        "above = ['models', 'engine', 'training', 'methods', 'metrics', 'trial']\n"
        "wrong = ['torch', 'transformers', 'ray', *(f'lunar_tune.{name}' for name in above)]\n"
        "print([name for name in wrong if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.stderr == b""
    assert done.stdout.split() == [b"[]"]
