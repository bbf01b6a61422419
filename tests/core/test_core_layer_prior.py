"""The file that scored layers are kept in comes back as it was, or says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lunar_tune.errors import InputError
from lunar_tune.trial.layer_scores import (
    LayerPrior,
    LayerSimilarities,
    Similarities,
    read_layer_prior,
)

COEFFICIENT = 1.5


@pytest.fixture(scope="module")
def prior() -> LayerPrior:
    """Return made-up scores of three of `tiny`'s blocks."""
    return LayerPrior(
        model="tiny",
        n_layers=4,
        best=1,
        recommended=(1, 3),
        data="mini",
        forget_edges=("A_B",),
        rows=3,
        coefficient=COEFFICIENT,
        max_new_tokens=32,
        seed=0,
        embedding="by hand",
        base_model=Similarities(s1=-1 / 3, s2=1.0, unfinished=1),
        layers=(
            LayerSimilarities(layer=0, s1=0.25, s2=0.5, unfinished=1),
            LayerSimilarities(layer=1, s1=0.7, s2=-0.1, unfinished=1),
            LayerSimilarities(layer=3, s1=0.6, s2=-0.1, unfinished=1),
        ),
    )


def test_a_prior_comes_back_as_it_was(prior: LayerPrior, tmp_path: Path) -> None:
    path = tmp_path / "prior.json"
    path.write_text(prior.document(), encoding="utf-8")
    assert read_layer_prior(path) == prior
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("lunar-tune layer prior", 1)
    assert (document["rows"], document["n_layers"], document["coefficient"]) == (3, 4, COEFFICIENT)
    assert (document["model"], document["data"]) == ("tiny", "mini")
    assert document["forget_edges"] == ["A_B"]
    assert (document["best"], document["recommended"]) == (1, [1, 3])
    for one in document["layers"]:
        assert one["score"] == pytest.approx(one["s1"] - one["s2"])


def test_keys_of_a_later_version_are_read_over(prior: LayerPrior, tmp_path: Path) -> None:
    path = tmp_path / "prior.json"
    path.write_text(json.dumps(json.loads(prior.document()) | {"new": [1]}), encoding="utf-8")
    assert read_layer_prior(path) == prior


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version"),
        ({"format": "other"}, "format"),
        ({"best": 7}, "layer 7 stands not among layers"),
        ({"recommended": []}, "recommended: "),
        ({"recommended": [5]}, "layer 5 stands not among layers"),
        ({"n_layers": 3}, "numbers from 0 to 2"),
        ({"coefficient": "2"}, "coefficient: "),
        ({"layers": [{"layer": 0, "s1": 0.5, "unfinished": 0}]}, r"layers\[0\].s2: is missing"),
    ],
)
def test_a_file_that_is_no_prior_is_refused_with_the_reason(
    prior: LayerPrior, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "prior.json"
    path.write_text(json.dumps(json.loads(prior.document()) | changes), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_layer_prior(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nosuch\.json: cannot be read"):
        read_layer_prior(tmp_path / "nosuch.json")
    for content in ("[1]", "{", "\ufeff{}", ""):
        (tmp_path / "prior.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="is no layer prior"):
            read_layer_prior(tmp_path / "prior.json")


def test_a_prior_fits_its_model_alone(prior: LayerPrior) -> None:
    """The name is known before the weights are; the depth may not be."""
    source = "--layer-prior p.json"
    prior.check_fits(model=prior.model, n_layers=4, source=source)
    prior.check_fits(model=prior.model, n_layers=None, source=source)
    for model, n_layers in (("other", 4), (prior.model, 3), ("other", None)):
        with pytest.raises(InputError, match=rf"--layer-prior p\.json: .*{model!r}") as caught:
            prior.check_fits(model=model, n_layers=n_layers, source=source)
        assert f"python -m lunar_tune.layers --model {model}" in str(caught.value)
