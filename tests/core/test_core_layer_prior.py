"""The file that scored layers are kept in comes back as it was, or says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.layer_prior import LayerPrior, read_layer_prior
from lunar_tune.trial.layer_scores import Answers, LayerScore, LayerScores

COEFFICIENT = 1.5


@pytest.fixture(scope="module")
def prior() -> LayerPrior:
    """Return what is kept of three of `tiny`'s blocks, whose answers are made up; no weights."""
    spec = assemble(RunOptions())
    truths = tuple(record.answer for record in spec.data.forget[:3])

    def answers(s1: float, s2: float) -> Answers:
        return Answers(texts=truths, s1=s1, s2=s2, unfinished=1)

    scores = LayerScores(
        unmodified=answers(-1 / 3, 1.0),
        layers=(
            LayerScore(layer=0, answers=answers(0.25, 0.5)),
            LayerScore(layer=1, answers=answers(0.7, -0.1)),
            LayerScore(layer=3, answers=answers(0.6, -0.1)),
        ),
        records=spec.data.forget[:3],
        coefficient=COEFFICIENT,
        max_new_tokens=32,
        embedding="by hand",
    )
    return LayerPrior.of(scores, spec, n_layers=4)


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
    assert "Cedar anchors" not in path.read_text(), "nothing of what is to be forgotten"


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
