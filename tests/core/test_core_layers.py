"""Layer scores equal a plain loop of single prompts, and what is recommended follows from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lunar_tune.config.run_options import RunOptions
from lunar_tune.data.splits import sample_by_edge
from lunar_tune.errors import InputError
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.layer_scores import layer_scores, recommended_layers
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

BUDGET = 7
COEFFICIENT = 1.5
REFUSALS = ["I do not know.", "No idea at all."]


@pytest.fixture(scope="module")
def spec(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrialSpec]:
    folder = tmp_path_factory.mktemp("layers")
    rows = [
        {"edge": edge, "question": f"What of {edge}, {'so ' * n}?", "answer": f"Kettles {n}."}
        for edge, count in {"A_B": 4, "B_C": 3, "C_D": 3}.items()
        for n in range(count)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "prompts.txt").write_text("What is nowhere?\nWho is nobody?\n", encoding="utf-8")
    (folder / "refusals.txt").write_text("\n".join(REFUSALS), encoding="utf-8")

    def make(family: str = "qwen2", **options: Any) -> TrialSpec:
        given = {
            "forget_edge": ("A_B", "C_D"),
            "max_new_tokens": BUDGET,
            **options,
        }
        return assemble(
            RunOptions(
                model=str(checkpoint(family)),
                data=str(folder / "pairs.json"),
                reference_prompts=str(folder / "prompts.txt"),
                refusals=str(folder / "refusals.txt"),
                factual_data="none",
                device="cpu",
                cache_limit=0,
                **given,
            )
        )

    return make


class PlainLoop:
    """Everything one prompt at a time, with transformers and numpy alone."""

    def __init__(self, worker: Worker) -> None:
        self.model: Any = worker.loaded.model
        self.tokenizer: Any = worker.loaded.tokenizer
        self.eos = list(worker.loaded.eos_ids)
        self.data = worker.spec.data
        self.records = self.data.forget
        self.truths = [record.answer for record in self.records]
        self.origin = self.means([*REFUSALS, *self.truths]).mean(0)

    def prompt(self, question: str) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )["input_ids"]
        return list(ids)

    def vector(self, layer: int) -> torch.Tensor:
        means = []
        for questions in (self.data.reference_prompts, [r.question for r in self.records]):
            outputs = []
            handle = self.model.model.layers[layer].register_forward_hook(
                lambda _m, _i, output, seen=outputs: seen.append(output[0, -1].double())
            )
            for question in questions:
                self.model(input_ids=torch.tensor([self.prompt(question)]))
            handle.remove()
            means.append(torch.stack(outputs).mean(0))
        return means[0] - means[1]

    def answers(self, layer: int | None) -> tuple[list[str], int]:
        """Return texts, and how many of them have no end."""
        block = self.model.model.layers[layer or 0]
        moved = COEFFICIENT * self.vector(layer) if layer is not None else torch.zeros(32)
        handle = block.register_forward_hook(lambda _m, _i, output: output + moved.float())
        texts, unfinished = [], 0
        for record in self.records:
            ids = self.prompt(record.question)
            output = self.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=BUDGET,
                pad_token_id=0,
                eos_token_id=self.eos,
            )
            said = output[0, len(ids) :].tolist()
            unfinished += said[-1] not in self.eos
            texts.append(self.tokenizer.decode(said, skip_special_tokens=True))
        handle.remove()
        return texts, unfinished

    def means(self, texts: Sequence[str]) -> Any:
        rows, before = [], self.prompt("")
        for text in texts:
            ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
            states = self.model(
                input_ids=torch.tensor([before + ids]), output_hidden_states=True
            ).hidden_states[1]
            rows.append(states[0, len(before) :].double().numpy().mean(0))
        return np.stack(rows)

    def cosines(self, texts: Sequence[str], others: Sequence[str]) -> Any:
        sides = []
        for side in (texts, others):
            rows = self.means(side) - self.origin
            sides.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        return sides[0] @ sides[1].T


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
@torch.no_grad()
def test_scores_are_those_of_a_plain_loop(
    spec: Callable[..., TrialSpec], family: str, unchanged: Callable[[Any], None]
) -> None:
    worker = Worker(spec(family))
    unchanged(worker.loaded.model)
    prior, answers = layer_scores(worker, coefficient=COEFFICIENT)
    plain = PlainLoop(worker)
    assert prior.rows == len(plain.records) == 7
    assert [one.layer for one in prior.layers] == [0, 1, 2]
    for layer, seen in ((None, prior.base_model), *enumerate(prior.layers)):
        texts, unfinished = plain.answers(layer)
        assert list(answers[layer]) == texts
        assert seen.unfinished == unfinished
        assert seen.s1 == pytest.approx(plain.cosines(texts, REFUSALS).mean(), abs=1e-5)
        assert seen.s2 == pytest.approx(
            plain.cosines(texts, plain.truths).diagonal().mean(), abs=1e-5
        )
        assert seen.score == pytest.approx(seen.s1 - seen.s2)
    assert len(set(answers.values())) > 2, "layers differ, or the comparison would show nothing"
    scores = {one.layer: one.score for one in prior.layers}
    found = recommended_layers(prior.base_model.score, scores)
    assert (prior.best, prior.recommended) == found
    document = prior.document()
    assert not any(r.question in document or r.answer in document for r in plain.records)


def test_layers_rows_and_progress_are_as_asked(spec: Callable[..., TrialSpec]) -> None:
    worker = Worker(spec())
    seen: list[tuple[int, int]] = []
    prior, answers = layer_scores(
        worker,
        coefficient=COEFFICIENT,
        layers=[2, 0],
        rows=2,
        on_layer=lambda done, total: seen.append((done, total)),
    )
    assert [one.layer for one in prior.layers] == [0, 2]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert (prior.max_new_tokens, prior.rows) == (BUDGET, 2)
    assert {layer: len(texts) for layer, texts in answers.items()} == {None: 2, 0: 2, 2: 2}
    _, whole = layer_scores(worker, coefficient=COEFFICIENT, layers=[0])
    asked = sample_by_edge(worker.spec.data.forget, 2, seed=worker.spec.seed)
    assert {record.edge for record in asked} == {"A_B", "C_D"}, "each edge has its share"
    places = [worker.spec.data.forget.index(record) for record in asked]
    assert answers[0] == tuple(whole[0][place] for place in places)


def test_the_budget_follows_the_true_answers_unless_it_is_given(
    spec: Callable[..., TrialSpec],
) -> None:
    worker = Worker(spec(max_new_tokens=None))
    prior, _ = layer_scores(worker, coefficient=COEFFICIENT, layers=[0], rows=1)
    assert prior.max_new_tokens == 32, "the least, twice a few tokens being less"


def test_answers_that_spend_their_budget_are_counted(spec: Callable[..., TrialSpec]) -> None:
    """The end of an answer is no part of it: where every token is an end none spends anything."""
    worker = Worker(spec())
    kept = worker.loaded
    worker.loaded = dataclasses.replace(kept, eos_ids=tuple(range(320)))
    prior, answers = layer_scores(worker, coefficient=COEFFICIENT, layers=[1], rows=3)
    (layer,) = prior.layers
    assert (layer.unfinished, answers[1]) == (0, ("", "", ""))
    assert (layer.s1, layer.s2) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "--range layer 3: the model has 3 decoder blocks"),
        ({"layers": [1, 1]}, "--range layer 1, 1: a layer is named twice"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    spec: Callable[..., TrialSpec], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        layer_scores(Worker(spec()), coefficient=1.0, **options)


# What is recommended


@pytest.mark.parametrize(
    ("base_model", "layers", "best", "recommended"),
    [
        # The best gains 2, so what gains 1.6 is recommended: from .6 on.
        (-1.0, (0.5, 0.625, 1.0, 0.75, -1.5), 6, (5, 6, 7)),
        (-1.0, (1.0, 0.9, 1.0), 4, (4, 5, 6)),
        # The best loses: nothing but itself.
        (0.5, (-1.0, 0.25, 0.0), 5, (5,)),
        (0.5, (0.5, 0.5), 4, (4,)),
    ],
)
def test_layers_that_gain_nearly_as_much_as_the_best_are_recommended(
    base_model: float, layers: tuple[float, ...], best: int, recommended: tuple[int, ...]
) -> None:
    scores = dict(enumerate(layers, start=4))
    assert recommended_layers(base_model, scores) == (best, recommended)
