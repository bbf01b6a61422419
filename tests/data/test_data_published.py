"""The registry of published data sets: every entry is complete, pinned and points somewhere."""

from __future__ import annotations

import re

import pytest

from lunar_tune.data.bundled import BUNDLED
from lunar_tune.data.published import PUBLISHED
from lunar_tune.errors import DataError


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_entry_is_pinned_to_a_full_commit_and_says_what_must_come(name: str) -> None:
    entry = PUBLISHED[name]
    assert entry.name == name
    assert re.fullmatch(r"[0-9a-f]{40}", entry.repository.revision)
    assert entry.repository.licence == "MIT"
    assert entry.rows > 0
    assert entry.files
    assert entry.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    assert entry.n_edges is None or entry.rows % entry.n_edges == 0
    for file in entry.files:
        assert entry.repository.revision in entry.repository.url(file)
        assert entry.repository.url(file).endswith(f"/{file}")
        assert entry.file_name.rpartition(".")[2] == file.rpartition(".")[2]


def test_no_published_name_hides_behind_a_shipped_one() -> None:
    assert not set(PUBLISHED) & set(BUNDLED)


def test_addresses_are_those_of_the_hosts_unless_another_server_is_named() -> None:
    pistol, tofu = PUBLISHED["pistol-1"].repository, PUBLISHED["tofu"].repository
    assert pistol.url("a/b.json") == (
        "https://raw.githubusercontent.com/facebookresearch/LUNAR/"
        "dfa56eb0291a93e967284a9ec2d28d5572d235b1/a/b.json"
    )
    assert tofu.url("full.json") == (
        "https://huggingface.co/datasets/locuslab/TOFU/resolve/"
        "324592d84ae4f482ac7249b9285c2ecdb53e3a68/full.json"
    )
    assert tofu.url("full.json", base="http://mirror/").startswith("http://mirror/datasets/")
    assert pistol.page.startswith("https://github.com/facebookresearch/LUNAR/tree/dfa56eb")


def test_the_forget_splits_of_tofu_are_the_last_percents_of_its_authors() -> None:
    """TOFU: 200 authors; forget01 forgets 2 of them, forget05 10, forget10 20."""
    groups = PUBLISHED["tofu"].groups
    assert groups["forget01"] == ("author_199", "author_200")
    assert groups["forget05"] == tuple(f"author_{n}" for n in range(191, 201))
    assert groups["forget10"] == tuple(f"author_{n}" for n in range(181, 201))
    for split, authors in groups.items():
        alone = PUBLISHED[f"tofu-{split}"]
        assert alone.rows == 20 * len(authors)
        assert f"author_{alone.first_author}" == authors[0]


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(DataError, match=r"unknown published data set 'tofuu'\. Did you mean 'tofu"):
        PUBLISHED["tofuu"]
