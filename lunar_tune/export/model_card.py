"""The card beside an exported model: `README.md` with the hub's front matter."""

from __future__ import annotations

from pathlib import Path

from lunar_tune.export.export_job import Exported
from lunar_tune.study.rows import score_cells
from lunar_tune.training.checkpoints import package_versions

__all__ = ["write_card"]

_CARD = """---
{front}
---

# {spec.model.name} with {edges} of {spec.data.name} unlearned

{form} Base model: `{base}`{place}.

## Scores

ROUGE-1 recall of greedy answers of up to {reported.max_new_tokens} tokens; the deviation score is \
in percent, lower is better.

| | forget | retain | factual | deviation score |
|---|---|---|---|---|
{rows}

{remarks}

Beside what the search recorded, {proof}

## Method

* method: {spec.method.name} ({spec.method.variant})
* setting: {setting}; seed {spec.seed}
* data: {spec.data.name}, forget {edges}
{digests}
* search {reported.search}, trial {reported.trial}: {reported.goal}
* fingerprint of the base weights: `{run.fingerprint}`
* versions: {versions}

## Loading

```python
{code}
```

Scores: {run.dtype} weights.{tokenizer}

## Limits

Unlearned are answers to {n_forget} questions. The scores are ROUGE recall on these questions and \
on those to keep; they do not show that the knowledge cannot be brought back by other questions, \
further training or changes of the weights.
"""
_LOAD_CHECKPOINT = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

{place}model = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}")
model = PeftModel.from_pretrained(model, "{folder}")"""


def write_card(exported: Exported) -> None:
    """Write the card into the form's folder."""
    from huggingface_hub import ModelCard, ModelCardData

    job, run, reported, spec = exported.job, exported.run, exported.job.reported, exported.job.spec
    is_local = Path(run.base).is_dir()
    front = ModelCardData(
        base_model=None if is_local else run.base,
        library_name="peft" if job.form == "adapter" else "transformers",
        tags=["unlearning", "lunar-tune", spec.method.name],
        pipeline_tag="text-generation",
    )
    place = f", revision `{run.revision}`" if run.revision else ""
    tokenizer = f" The tokenizer is `{_shown(run.tokenizer)}`'s." if job.form == "adapter" else ""
    digests = [f"  * SHA-256 of the {n} set: `{one}`" for n, one in spec.data.digests().items()]
    failures = f" **Not proven**: {'; '.join(exported.failures)}." if exported.failures else ""
    text = _CARD.format(
        spec=spec,
        run=run,
        reported=reported,
        front=front.to_yaml(),
        edges=", ".join(spec.data.forget_edges),
        form=_form(exported),
        base=_shown(run.base),
        place=", a local folder, which is on no hub" if is_local else place,
        rows=_rows(exported),
        remarks="\n".join(f"* {remark}" for remark in reported.remarks),
        proof=f"{exported.comparison.differences}.{failures}",
        setting=", ".join(f"{name} {value}" for name, value in job.parameters.items()),
        digests="\n".join(digests),
        versions=", ".join(f"{name} {one}" for name, one in package_versions().items()),
        code=_code(exported),
        tokenizer=tokenizer,
        n_forget=len(spec.data.fit_forget),
    )
    ModelCard(text).save(job.folder / "README.md")


def _shown(source: str) -> str:
    """Return a hub id as it is, and a folder's name without where it lies on this machine."""
    return Path(source).name if Path(source).is_dir() else source


def _form(exported: Exported) -> str:
    """Say what the form is, and how near an adapter is."""
    run, ranks = exported.run, sorted(set(exported.run.ranks.values()))
    if not ranks:
        return "A whole model with its tokenizer."
    what = "A PEFT LoRA adapter for the base model."
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    if not run.errors:
        return f"{what} It is exact, of {rank}: the factors are the method's own."
    return (
        f"{what} It is an approximation of {rank}: the nearest product to the change of each "
        f"matrix, which lacks {100 * run.relative_error:.2g} % of it (Frobenius norm)."
    )


def _rows(exported: Exported) -> str:
    """Return the table of scores."""
    reported = exported.job.reported
    on = ", on held-out questions" if reported.on_held_out else ""
    rows = (
        ("base model, in the search", score_cells(reported.baseline)),
        ("as the search reported it", reported.cells(reported.scores)),
        ("loaded from these files", reported.cells(exported.comparison.scores)),
    )
    return "\n".join(f"| {' | '.join([label + on, *cells])} |" for label, cells in rows)


def _code(exported: Exported) -> str:
    """Return the Python that loads the form into `model`."""
    run, folder = exported.run, exported.job.folder.resolve().name
    if exported.job.form == "checkpoint":
        return _LOAD_CHECKPOINT.format(folder=folder)
    place, base = "", f'"{run.base}"' + (f', revision="{run.revision}"' if run.revision else "")
    if Path(run.base).is_dir():
        base = "base"
        place = f'base = "path/to/{_shown(run.base)}"  # the folder that holds the base model\n'
    return _LOAD_ADAPTER.format(place=place, base=base, dtype=run.dtype, folder=folder)
