"""What a search left, damaged: refused in one message, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_outcomes import complete, trial_result
from pages_by_hand import said
from tracked_searches import SPACE

from lunar_tune.config.options import SearchConfig
from lunar_tune.driver.space import open_study
from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import goal_of
from lunar_tune.models.catalog import LINEAGE_FILE, read_lineage
from lunar_tune.study.folder import read_answers, write_answers
from lunar_tune.study.study import StoredStudy

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the lines of a journal with a completed, a failed and a running trial."""
    path = tmp_path_factory.mktemp("study") / "study.journal"
    study = open_study(path, name="s", space=SPACE, config=SearchConfig(sampler="random"))
    study.note("goal", goal_of(SearchConfig()).text)
    complete(study, study.ask()[0], trial_result(0.1, 0.9))
    study.fail(study.ask()[0], "diverged")
    study.ask()
    return [json.loads(line) for line in path.read_text().splitlines()]


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_changed_journal_is_read_or_refused(
    journal: list[dict[str, Any]], data: st.DataObject
) -> None:
    lines = [dict(line) for line in journal]
    line = data.draw(st.sampled_from(lines))
    line[data.draw(st.sampled_from(list(line)))] = data.draw(JSON)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "study.journal"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            StoredStudy.read(path)
        except InputError as error:
            assert str(path.parent) in str(error)  # noqa: PT017 the other outcome is as good


def test_a_journal_of_pickles_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    import pickle

    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    path = tmp_path / "study.journal"
    path.write_bytes(pickle.dumps(Touch()) + b"\n")
    with pytest.raises(InputError, match="is damaged, or not the journal of a search"):
        StoredStudy.read(path)
    assert not (tmp_path / "ran").exists()


def test_damaged_answers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    row = said("forget", "?", ".", 0.5)
    write_answers(path, [row], [1.0])
    assert read_answers(path) == [row]
    for content in (b"", path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is damaged, or holds no answers"):
            read_answers(path)


@given(content=JSON)
@settings(deadline=None)
@example(content={"knowledge": {"rouge1": "high"}})
@example(content={"settings": []})
@example(content={"unlearned": {"data": "mini"}})
def test_a_changed_lineage_is_read_or_refused(content: Any) -> None:
    whole = {"format": 1, "base": "b", "source": "s", "weights": None, "revision": None}
    whole |= {"fingerprint": "f", "data": "d", "data_digest": "e", "settings": {}}
    with TemporaryDirectory() as folder:
        path = Path(folder) / LINEAGE_FILE
        changed = whole | content if isinstance(content, dict) else content
        path.write_text(json.dumps(changed))
        try:
            lineage = read_lineage(folder)
        except InputError as error:
            assert str(path.parent) in str(error)  # noqa: PT017 the other outcome is as good
        else:
            assert lineage is not None
            assert lineage.summary
