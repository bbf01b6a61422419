"""Groups of edges in a run's options: resolved with the data, before any weights are needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_lines import small_data

from lunar_tune.config.run_options import RunOptions
from lunar_tune.data.splits import groups_file
from lunar_tune.errors import InputError
from lunar_tune.trial.assemble import assemble


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return three edges of three pairs, A_B, B_C and C_D, with groups."""
    path = small_data(tmp_path)
    groups = '{"last": ["B_C", "C_D"], "everything": ["A_B", "B_C", "C_D"], "B_C": ["A_B"]}'
    groups_file(path).write_text(groups)
    return path


def options(data: Path, *edges: str, **more: str) -> RunOptions:
    return RunOptions(data=str(data), forget_edge=edges, factual_data="none", **more)  # type: ignore


def test_a_group_forgets_its_edges_and_keeps_its_name(data: Path) -> None:
    sets = assemble(options(data, "last")).data
    assert {record.edge for record in sets.forget} == {"B_C", "C_D"}
    assert {record.edge for record in sets.retain} == {"A_B"}
    assert sets.forget_edges == ("last",)


def test_a_real_edge_wins_over_a_group_of_its_name(data: Path) -> None:
    assert {record.edge for record in assemble(options(data, "B_C")).data.forget} == {"B_C"}


def test_a_group_of_everything_needs_another_retain_set(data: Path) -> None:
    with pytest.raises(InputError, match="every edge is to be forgotten"):
        assemble(options(data, "everything"))
    sets = assemble(options(data, "everything", retain_data="mini")).data
    assert len(sets.forget) == 9
    assert sets.n_retain == 96


def test_an_unknown_edge_is_refused_with_the_groups(data: Path) -> None:
    with pytest.raises(InputError, match=r"unknown forget edge 'lost'.*Groups of edges: last, ev"):
        assemble(options(data, "lost"))


def test_without_the_default_edge_the_groups_are_named(data: Path) -> None:
    data.write_text(data.read_text().replace("A_B", "X_Y"))
    with pytest.raises(InputError, match=r"--forget-edge is needed.*Groups of edges: last"):
        assemble(options(data))


def test_a_broken_file_of_groups_is_said_with_all_other_mistakes(data: Path) -> None:
    groups_file(data).write_text("[]")
    with pytest.raises(InputError, match="2 things are wrong") as raised:
        assemble(options(data, "A_B", model="nothing"))
    assert "must be an object of lists" in str(raised.value)
