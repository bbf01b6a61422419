"""LUNAR on one page is LUNAR. Trials score row by row as it does: `test_trials_by_the_page`."""

from __future__ import annotations

import ast
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import FAMILIES, build_model

from lunar_tune import reference
from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.trial.assemble import assemble

FITS: dict[str, reference.Solver] = {
    "adamw": partial(reference.fit_adamw, learning_rate=0.003),
    "closed_form": partial(reference.fit_closed_form, ridge=0.1),
}
# No two begin alike: equal prefixes have equal h, and cannot go different ways.
FORGET = ((11, 51, 91), (12, 52, 92, 132))
RETAIN = ((13, 53, 93, 133, 173), (14, 54, 94))
DECLINED = ((15, 55, 95), (16, 56), (17, 57, 97, 137))
PROMPTS: dict[str, Any] = {"reference": DECLINED, "forget": FORGET, "retain": RETAIN}


@pytest.mark.parametrize("family", FAMILIES)
def test_forget_tokens_move_by_the_shift_and_retain_tokens_stay(family: str) -> None:
    """With fewer tokens than features and next to no ridge, every token reaches its target."""
    layer, coefficient = 1, 2.0
    model = build_model(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def outputs_of(some: Any, prompt: tuple[int, ...]) -> torch.Tensor:
        """Return x of the prompt's tokens; entry 0 of the hidden states is the embedding."""
        with torch.no_grad():
            done = some(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        states: torch.Tensor = done.hidden_states[layer + 1][0].double()
        return states

    exact = partial(reference.fit_closed_form, ridge=1e-9)
    unlearned = reference.unlearn(
        model, layers=[layer], coefficient=coefficient, solver=exact, **PROMPTS
    )
    declined, forgotten = (
        torch.stack([outputs_of(model, prompt)[-1] for prompt in prompts]).mean(0)
        for prompts in (DECLINED, FORGET)
    )
    for prompts, moves in ((FORGET, coefficient * (declined - forgotten)), (RETAIN, 0.0)):
        for prompt in prompts:
            moved = outputs_of(unlearned, prompt) - outputs_of(model, prompt)
            torch.testing.assert_close(moved, torch.zeros_like(moved) + moves, atol=2e-3, rtol=1e-3)
    after = unlearned.state_dict()
    edited = f"model.layers.{layer}.mlp.down_proj.weight"
    assert [name for name in before if not before[name].equal(after[name])] == [edited]
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())
    half = model.to(torch.bfloat16)
    for solver in FITS.values():
        other = reference.unlearn(half, layers=[2], coefficient=2.0, solver=solver, **PROMPTS)
        old, new = (some.model.layers[2].mlp.down_proj.weight for some in (half, other))
        assert new.dtype == torch.bfloat16
        assert not new.equal(old)


def test_what_the_page_cannot_do_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"gemma2: .*Use Llama, .*Gemma 1 or Phi-3"):
        reference.unlearning_vector(build_model("gemma2"), 0, DECLINED, FORGET)
    model = build_model("llama")
    with pytest.raises(ValueError, match=r"layer 3: the model has blocks 0 to 2"):
        reference.mlp_inputs(model, 3, FORGET)
    with pytest.raises(ValueError, match=r"layer 0: not finite; lower"):
        reference.add_difference(model, 0, torch.tensor(float("inf")))
    with pytest.raises(ValueError, match=r"ridge 0: choose a positive number"):
        reference.fit_closed_form(torch.ones(2, 3), torch.ones(2), torch.ones(4), ridge=0)
    for options, message in (
        ({"method": "ga"}, "not ga"),
        ({"solver": "lora"}, r"not lunar \(lora\)"),
        ({"fix": ("positions=last",)}, "only solver and epochs"),
    ):
        with pytest.raises(InputError, match=message):
            assemble(RunOptions(engine="reference", **options))


def test_the_page_is_one_page_and_needs_nothing_of_this_package() -> None:
    text = Path(reference.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    imported: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}
