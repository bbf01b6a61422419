"""Both models asked side by side: each says what transformers' `generate` says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from trial_specs import generated

from lunar_tune.trial.single import asking
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

Checkpoint = Callable[..., Path]
QUESTIONS = ("What of A_B, 1?", "Who are you?", "What of C_D, 0?")
LUNAR = {"layer": 1, "coefficient": 20.0, "learning_rate": 0.01}
GA = {"method": "ga", "fix": ("epochs=3", "batch_size=1")}
BUDGET = 9


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({}, LUNAR), (GA, {"learning_rate": 0.05})],
    ids=["lunar", "ga"],
)
def test_each_model_says_what_generate_says_of_it(
    spec: Callable[..., TrialSpec],
    checkpoint: Checkpoint,
    options: dict[str, Any],
    parameters: dict[str, float],
) -> None:
    made, folder = spec(**options), checkpoint("qwen2")
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    expected = generated(folder, fresh, QUESTIONS, budget=BUDGET)
    unlearned: list[str] = []
    Worker(made).run(
        parameters,
        inside=lambda loaded, _: unlearned.extend(
            generated(folder, loaded.model, QUESTIONS, budget=BUDGET)
        ),
    )
    assert unlearned != expected

    with asking(made, parameters, max_new_tokens=BUDGET) as ask:
        together = ask(QUESTIONS)
        single = [one for question in reversed(QUESTIONS) for one in ask([question])]

    assert [one.question for one in together] == list(QUESTIONS)
    assert [one.truth for one in together] == ["Kettles 1.", None, "Kettles 0."]
    assert [one.set_name for one in together] == ["forget", None, "retain"]
    assert [one.base_model for one in together] == expected
    assert [one.unlearned for one in together] == unlearned
    assert single[::-1] == together


def test_a_fit_may_end_early_again(spec: Callable[..., TrialSpec], checkpoint: Checkpoint) -> None:
    """After one of three epochs another model answers than after all of them."""
    made, rate = spec(**GA), {"learning_rate": 0.05}
    said = []
    for epochs in (1, 3):
        with asking(made, rate, epochs=epochs, max_new_tokens=BUDGET) as ask:
            said.append([one.unlearned for one in ask(QUESTIONS)])
    worker = Worker(made)
    with worker.prepared.unlearning(rate, seed=made.seed) as fit:
        next(iter(fit))
        fit.finish()
        early = generated(checkpoint("qwen2"), worker.loaded.model, QUESTIONS, budget=BUDGET)
    assert said[1] != said[0] == early
