"""Layer scores equal a plain loop of single prompts, and the file they are kept in comes back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import generated
from scores_by_hand import prompt_of, states_behind, unit
from trial_specs import random_spec, write_records

from lunar_tune.data.splits import sample_by_edge
from lunar_tune.errors import InputError
from lunar_tune.models.loading import LoadedModel
from lunar_tune.reference import unlearning_vector
from lunar_tune.trial.layer_scores import (
    LayerPrior,
    layer_scores,
    read_layer_prior,
    recommended_layers,
)
from lunar_tune.trial.worker import Worker

BUDGET = 7
COEFFICIENT = 1.5
REFUSALS = ["I do not know.", "No idea at all."]


@pytest.fixture(scope="module")
def worker(loaded: Callable[..., LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder, model = tmp_path_factory.mktemp("layers"), loaded("qwen2")
    (folder / "prompts.txt").write_text("What is nowhere?\nWho is nobody?\n", encoding="utf-8")
    (folder / "refusals.txt").write_text("\n".join(REFUSALS), encoding="utf-8")
    spec = random_spec(
        Path(model.spec.source),
        write_records(folder / "pairs.json", {"A_B": 3, "B_C": 2, "C_D": 2}),
        forget_edge=("A_B", "C_D"),
        reference_prompts=str(folder / "prompts.txt"),
        refusals=str(folder / "refusals.txt"),
        max_new_tokens=BUDGET,
    )
    return Worker(spec, model)


Scored = tuple[LayerPrior, Mapping[int | None, tuple[str, ...]]]


@pytest.fixture(scope="module")
def scored(worker: Worker) -> Scored:
    return layer_scores(worker, coefficient=COEFFICIENT)


class PlainLoop:
    """Everything one prompt at a time, with transformers and numpy alone."""

    def __init__(self, worker: Worker) -> None:
        self.loaded, self.model = worker.loaded, worker.loaded.model
        data = worker.spec.data
        self.truths = [record.answer for record in data.forget]
        self.origin = self.means([*REFUSALS, *self.truths]).mean(0)
        declined = [prompt_of(self.loaded.tokenizer, text) for text in data.reference_prompts]
        self.asked = [prompt_of(self.loaded.tokenizer, record.question) for record in data.forget]
        self.vectors = [
            unlearning_vector(self.model, layer, declined, self.asked) for layer in range(3)
        ]

    def answers(self, layer: int | None) -> tuple[list[str], int]:
        """Return texts, and how many of them have no end."""
        moved = COEFFICIENT * self.vectors[layer] if layer is not None else torch.zeros(32)
        with self.model.model.layers[layer or 0].register_forward_hook(
            lambda _m, _i, output: output + moved.float()
        ):
            eos = self.loaded.eos_ids
            said = generated(self.model, self.asked, budget=BUDGET, eos=eos, alone=True)
        texts = self.loaded.tokenizer.batch_decode(said, skip_special_tokens=True)
        return texts, sum(len(tokens) == BUDGET for tokens in said)

    def means(self, texts: Sequence[str]) -> Any:
        return states_behind(self.model, self.loaded.tokenizer, texts)

    def cosines(self, texts: Sequence[str], others: Sequence[str]) -> Any:
        one, other = (unit(self.means(side) - self.origin) for side in (texts, others))
        return one @ other.T


@torch.no_grad()
def test_scores_are_those_of_a_plain_loop(
    worker: Worker, scored: Scored, unchanged: Callable[[Any], None]
) -> None:
    unchanged(worker.loaded.model)
    prior, answers = scored
    plain = PlainLoop(worker)
    assert prior.rows == len(plain.truths) == 5
    assert [one.layer for one in prior.layers] == [0, 1, 2]
    for layer, seen in ((None, prior.base_model), *enumerate(prior.layers)):
        texts, unfinished = plain.answers(layer)
        assert list(answers[layer]) == texts
        assert seen.unfinished == unfinished
        assert seen.s1 == pytest.approx(plain.cosines(texts, REFUSALS).mean(), abs=1e-5)
        of_truths = plain.cosines(texts, plain.truths).diagonal()
        assert seen.s2 == pytest.approx(of_truths.mean(), abs=1e-5)
        assert seen.score == pytest.approx(seen.s1 - seen.s2)
    assert len(set(answers.values())) > 2, "layers differ, or the comparison would show nothing"
    scores = {one.layer: one.score for one in prior.layers}
    found = recommended_layers(prior.base_model.score, scores)
    assert (prior.best, prior.recommended) == found
    # Some layers and rows: each edge has its share, and they are answered as among all.
    some, few = layer_scores(worker, coefficient=COEFFICIENT, layers=[2, 0], rows=2)
    assert [one.layer for one in some.layers] == [0, 2]
    assert (some.max_new_tokens, some.rows) == (BUDGET, 2)
    asked = sample_by_edge(worker.spec.data.forget, 2, seed=worker.spec.seed)
    places = [worker.spec.data.forget.index(record) for record in asked]
    for layer in (None, 0, 2):
        assert few[layer] == tuple(answers[layer][place] for place in places)
    for wrong, message in (([3], "3: the model has 3 decoder blocks"), ([1, 1], "named twice")):
        with pytest.raises(InputError, match=rf"--range layer .*{message}"):
            layer_scores(worker, coefficient=1.0, layers=wrong)


def test_the_budget_follows_the_true_answers(worker: Worker) -> None:
    """The end of an answer is no part of it: where every token is an end none spends anything."""
    loaded = dataclasses.replace(worker.loaded, eos_ids=tuple(range(320)))
    spec = dataclasses.replace(worker.spec, max_new_tokens=None)
    prior, answers = layer_scores(Worker(spec, loaded), coefficient=COEFFICIENT, layers=[1], rows=3)
    assert prior.max_new_tokens == 32, "the least, twice a few tokens being less"
    (layer,) = prior.layers
    assert (layer.unfinished, layer.s1, layer.s2, answers[1]) == (0, 0.0, 0.0, ("", "", ""))


def test_layers_that_gain_nearly_as_much_as_the_best_are_recommended() -> None:
    """The best gains 2, so what gains 1.6 is recommended; if it loses, nothing but itself."""
    for base_model, layers, best, recommended in (
        (-1.0, (0.5, 0.625, 1.0, 0.75, -1.5), 6, (5, 6, 7)),
        (-1.0, (1.0, 0.9, 1.0), 4, (4, 5, 6)),
        (0.5, (-1.0, 0.25, 0.0), 5, (5,)),
    ):
        scores = dict(enumerate(layers, start=4))
        assert recommended_layers(base_model, scores) == (best, recommended)


def test_a_prior_comes_back_as_it_was_and_fits_its_model_alone(
    scored: Scored, tmp_path: Path
) -> None:
    """Keys of a later version are read over; the depth may not be known before the weights are."""
    prior, path, source = scored[0], tmp_path / "prior.json", "--layer-prior p.json"
    document = json.loads(prior.document())
    path.write_text(json.dumps(document | {"new": [1]}), encoding="utf-8")
    assert read_layer_prior(path) == prior
    for depth in (3, None):
        prior.check_fits(model=prior.model, n_layers=depth, source=source)
    for model, n_layers in (("other", None), (prior.model, 4)):
        with pytest.raises(InputError, match=rf"--layer-prior p\.json: .*{model!r}") as caught:
            prior.check_fits(model=model, n_layers=n_layers, source=source)
        assert f"python -m lunar_tune.layers --model {model}" in str(caught.value)
    for content, message in (
        ([1], "is not a layer prior"),
        (document | {"version": 2}, "version"),
        (document | {"best": 7}, "layer 7 is not among layers"),
        (document | {"recommended": []}, "recommended: "),
        (document | {"n_layers": 2}, "numbers from 0 to 1"),
        (document | {"layers": [{"layer": 0}]}, r"layers\[0\].s1: is missing"),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(InputError, match=rf"prior\.json.*{message}"):
            read_layer_prior(path)
    with pytest.raises(InputError, match=r"absent\.json: cannot be read"):
        read_layer_prior(tmp_path / "absent.json")
