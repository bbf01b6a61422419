"""The card beside an exported model: `README.md` with the hub's front matter."""

from __future__ import annotations

from pathlib import Path

from lunar_tune.export.export_job import Exported, package_versions
from lunar_tune.study.rows import score_cells

__all__ = ["write_card"]

_CHECKPOINT = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
"""
_ADAPTER = """
from peft import PeftModel
from transformers import AutoModelForCausalLM

{place}model = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}")
model = PeftModel.from_pretrained(model, "{folder}")
"""
_PLACE = """base = "path/to/{name}"  # the folder that holds the base model
"""


def write_card(exported: Exported) -> None:
    """Write the card into the form's folder."""
    from huggingface_hub import ModelCard, ModelCardData

    job, base = exported.job, exported.base
    data = ModelCardData(
        base_model=None if base.is_local else base.source,
        library_name="peft" if job.form == "adapter" else "transformers",
        tags=["unlearning", "lunar-tune", job.spec.method.name],
        pipeline_tag="text-generation",
    )
    parts = [_head(exported), _scores(exported), _setting(exported), _loading(exported)]
    text = "\n\n".join([*parts, _limits(exported)])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(job.folder / "README.md")


def _head(exported: Exported) -> str:
    spec, form = exported.job.spec, exported.job.form
    edges = ", ".join(spec.data.forget_edges)
    what = (
        "A PEFT LoRA adapter for the base model."
        if form == "adapter"
        else "A whole model with its tokenizer."
    )
    base = exported.base
    more = f", revision `{base.revision}`" if base.revision else ""
    if base.is_local:
        more = ", a local folder, which is on no hub"
    return (
        f"# {spec.model.name} with {edges} of {spec.data.name} unlearned\n\n"
        f"{what}{_adapter(exported)} Base model: `{_shared(base.source)}`{more}."
    )


def _shared(source: str) -> str:
    """Return a hub id as it is, and a folder's name without where it lies on this machine."""
    return Path(source).name if Path(source).is_dir() else source


def _adapter(exported: Exported) -> str:
    """Return how near an adapter is; nothing of another form."""
    ranks = sorted(set(exported.ranks.values()))
    if not ranks:
        return ""
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    if not exported.relative_errors:
        return f" It is exact, of {rank}: the factors are the method's own."
    error = max(exported.relative_errors.values())
    return (
        f" It is an approximation of {rank}: the nearest product to the change of each matrix, "
        f"which lacks {100 * error:.2g} % of it (Frobenius norm)."
    )


def _scores(exported: Exported) -> str:
    reported, found = exported.job.reported, exported.comparison
    lines = [
        "## Scores",
        "",
        "ROUGE-1 recall of greedy answers of up to "
        f"{reported.max_new_tokens} tokens; the deviation score is in percent, lower is better.",
        "",
        "| | forget | retain | factual | deviation score |",
        "|---|---|---|---|---|",
    ]
    on = ", on held-out questions" if reported.held_out and reported.full else ""
    for label, cells in (
        ("base model, in the search", score_cells(reported.vanilla)),
        ("as the search reported it", reported.cells(reported.scores)),
        ("loaded from these files", reported.cells(found.scores)),
    ):
        lines.append(f"| {' | '.join([label + on, *cells])} |")
    lines += ["", *(f"* {remark}" for remark in reported.remarks)]
    proof = f"Beside what the search recorded, {found.differences}."
    if exported.failures:
        proof += f" **Not proven**: {'; '.join(exported.failures)}."
    return "\n".join([*lines, "", proof])


def _setting(exported: Exported) -> str:
    job = exported.job
    setting = ", ".join(f"{name} {value}" for name, value in job.parameters.items())
    versions = ", ".join(f"{name} {one}" for name, one in package_versions().items())
    lines = [
        "## Method",
        "",
        f"* method: {job.spec.method.name} ({job.spec.method.variant})",
        f"* setting: {setting}; seed {job.spec.seed}",
        f"* data: {job.spec.data.name}, forget {', '.join(job.spec.data.forget_edges)}",
        *(f"  * SHA-256 of the {name} set: `{one}`" for name, one in job.digests.items()),
        f"* search {job.reported.search}, trial {job.reported.trial}: {job.reported.goal}",
        f"* fingerprint of the base weights: `{exported.base.fingerprint}`",
        f"* versions: {versions}",
    ]
    return "\n".join(lines)


def _loading(exported: Exported) -> str:
    """Return the Python that loads the form into `model`."""
    base, folder = exported.base, exported.job.folder.resolve().name
    lines, words = _CHECKPOINT.format(folder=folder), ""
    if exported.job.form == "adapter":
        revision = f', revision="{base.revision}"' if base.revision else ""
        lines = _ADAPTER.format(
            folder=folder,
            place=_PLACE.format(name=_shared(base.source)) if base.is_local else "",
            base="base" if base.is_local else f'"{base.source}"{revision}',
            dtype=exported.dtype,
        )
        words = f" The tokenizer is `{_shared(base.tokenizer)}`'s."
    code = f"```python\n{lines.strip()}\n```"
    return f"## Loading\n\n{code}\n\nScores: {exported.dtype} weights.{words}"


def _limits(exported: Exported) -> str:
    data = exported.job.spec.data
    return (
        "## Limits\n\n"
        f"Unlearned are answers to {len(data.fit_forget)} questions. The scores are ROUGE recall "
        "on these questions and on those to keep; they do not show that the knowledge cannot be "
        "brought back by other questions, further training or changes of the weights."
    )
