"""One trial of a search, run again, written in a form that needs no lunar-tune, and proved.

The study keeps no weights; seed, data and setting decide them. One model is in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from markupsafe import Markup
from rich.console import Console
from torch import Tensor

from lunar_tune.display import markdown, say
from lunar_tune.errors import InputError
from lunar_tune.export.export_job import ExportJob, ExportRun
from lunar_tune.export.proof import Exported, ask, prove, weight_digest
from lunar_tune.files import write_json
from lunar_tune.metrics.means import errors_of
from lunar_tune.models.catalog import Lineage, read_lineage
from lunar_tune.models.device import give_back
from lunar_tune.models.fingerprint import fingerprint
from lunar_tune.models.loading import LoadedModel
from lunar_tune.study.rows import score_cells
from lunar_tune.training.adapting import Factors
from lunar_tune.training.checkpoints import save_checkpoint
from lunar_tune.trial.assemble import materialise
from lunar_tune.trial.worker import Worker

if TYPE_CHECKING:
    from lunar_tune.methods.contract import Edit

LARGEST_ERROR = 0.01
"""Relative Frobenius error up to which a product counts as the difference itself."""
_CARD = Path(__file__).with_name("card.md.j2")
_LARGEST_RANK = 512  # that is chosen here: a seventh of a 7B model's d_model


def export(job: ExportJob, console: Console) -> Exported:
    """Write a trial's unlearned model and prove that what was written gives what was reported.

    Where it does not, `export.json` in the folder says so. What cannot be used is an InputError.
    """
    layers = job.row.parameters.get("layer", ()) if job.spec.method.edits_one_layer else ()
    spec = dataclasses.replace(
        materialise(job.spec, console),
        layers=tuple(map(int, layers if isinstance(layers, list | tuple) else [layers])),
        retain_floor=job.search.goal.stoppable_floor,  # it may have ended the trial's fit early
    )
    job = dataclasses.replace(job, spec=spec)
    say(console, "running the trial again")
    run = _run_again(job)
    give_back()
    say(console, f"asking the {job.form} as it is loaded from {job.folder}")
    exported = prove(job, run)
    write_json(job.folder / "export.json", exported.document)
    write_card(job, run, exported)
    if job.form == "checkpoint":
        _lineage(job, exported.document).write(job.folder)
    return exported


def _run_again(job: ExportJob) -> ExportRun:
    """Run the trial and write the form; no weight of the model is referred to afterwards."""
    worker, full, spec = Worker(job.spec), job.full, job.spec.model
    model: Any = worker.loaded.model
    own = spec.weights is not None and (Path(spec.weights) / "tokenizer_config.json").is_file()
    commit = getattr(model.config, "_commit_hash", None) or spec.revision
    run = ExportRun(
        base=spec.checkpoint,
        revision=None if Path(spec.checkpoint).is_dir() else commit,
        fingerprint=fingerprint(worker.loaded),
        tokenizer=str(spec.weights) if own else spec.source,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(model.config._attn_implementation),
    )
    factors: dict[str, Factors] = {}
    weights: dict[str, Tensor] = {}  # those of which an adapter has to be made

    def take(loaded: LoadedModel, edit: Edit) -> None:
        new = edit.weights()
        run.digests = {name: weight_digest(weight) for name, weight in new.items()}
        run.merged = edit.merged
        run.answers = ask(loaded, job.spec, full=full)
        if job.form == "checkpoint":
            data = job.spec.data
            questions = [record.question for record in (*data.forget, *data.retain)]
            save_checkpoint(loaded, job.folder, texts=questions)
        elif edit.factors is not None:
            for name, one in edit.factors().items():
                first, second = one.first.to("cpu", copy=True), one.second.to("cpu", copy=True)
                factors[name] = dataclasses.replace(one, first=first, second=second)
        else:
            weights.update({name: weight.to("cpu", copy=True) for name, weight in new.items()})

    worker.run(job.row.parameters, full=full, bounded=not full, inside=take)
    for name, weight in weights.items():
        old = model.get_parameter(name).detach()
        path = name.removesuffix(".weight")
        change = weight.to(old.device).double() - old.double()
        factors[path], run.errors[path] = nearest_factors(change, rank=job.rank)
    if job.form == "adapter":
        run.ranks = {name: one.rank for name, one in factors.items()}
        write_adapter(job.folder, factors, base=run.base, revision=run.revision)
    return run


def nearest_factors(
    change: Float[Tensor, "rows columns"], *, rank: int | None = None
) -> tuple[Factors, float]:
    """Return the product that is nearest to a matrix, and its relative Frobenius error.

    That is the truncated singular value decomposition (Eckart and Young), in float64, by the
    eigenvectors of the matrix times its transpose, which has d_model rows instead of d_ff columns.
    No rank is the smallest with an error of at most `LARGEST_ERROR`, up to `_LARGEST_RANK`.
    """
    matrix = change.double()
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    if rank is None:
        left = squares.sum() - squares.cumsum(0)
        near = (left <= LARGEST_ERROR**2 * squares.sum()).nonzero()
        rank = min(int(near[0]) + 1 if len(near) else len(squares), _LARGEST_RANK)
    chosen = vectors[:, :rank]
    factors = Factors(first=(chosen.T @ matrix).float(), second=chosen.float())
    product = factors.second.double() @ factors.first.double()
    size = float(matrix.norm())
    return factors, float((matrix - product).norm()) / size if size else 0.0


def write_adapter(
    folder: Path, factors: Mapping[str, Factors], *, base: str, revision: str | None
) -> None:
    """Write factors, by linear map, as a PEFT adapter of a hub id or folder, in float32."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    ranks = {name: one.rank for name, one in factors.items()}
    alphas: dict[str, float] = {name: one.scale * one.rank for name, one in factors.items()}
    alphas = {name: int(one) if one == int(one) else one for name, one in alphas.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    options: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(factors),
        "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": factor.detach().float().cpu().contiguous()
        for name, one in factors.items()
        for part, factor in (("A", one.first), ("B", one.second))
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        LoraConfig(**options).save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    except OSError as error:
        raise InputError(f"--save {folder}: cannot be written ({error}).") from error


def write_card(job: ExportJob, run: ExportRun, exported: Exported) -> None:
    """Write the hub's card of a form, `README.md`, beside it."""
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import Template

    is_local = Path(run.base).is_dir()
    front = ModelCardData(
        base_model=None if is_local else run.base,
        library_name="peft" if job.form == "adapter" else "transformers",
        tags=["unlearning", "lunar-tune", job.spec.method.name],
        pipeline_tag="text-generation",
    )
    text = Template(_CARD.read_text(encoding="utf-8"), finalize=markdown).render(
        front=Markup(front.to_yaml()),  # noqa: S704  # YAML, which quotes what needs it
        job=job,
        exported=exported,
        **exported.document,
        is_local=is_local,
        # Without where a folder lies on this machine.
        base_name=Path(run.base).name if is_local else run.base,
        tokenizer=Path(run.tokenizer).name if Path(run.tokenizer).is_dir() else run.tokenizer,
        score_cells=score_cells,
        errors_of=errors_of,
    )
    ModelCard(text).save(job.folder / "README.md")


def _lineage(job: ExportJob, said: Mapping[str, Any]) -> Lineage:
    """Return where the checkpoint comes from, with what its model had come from."""
    model = job.spec.model
    names = ("forget_edges", "method", "variant", "parameters", "seed", "search", "trial", "scores")
    unlearned = {
        "data": said["data"],
        "data_digest": said["data_digests"]["forget"],
        **{name: said[name] for name in names},
    }
    before = read_lineage(model.checkpoint) or Lineage(
        base=model.name,
        source=model.source,
        weights=model.weights,
        revision=said["base_revision"],
        fingerprint=said["base_fingerprint"],
        data=said["data"],
        data_digest=said["data_digests"]["retain"],
        settings={},
        versions=said["versions"],
    )
    return dataclasses.replace(before, unlearned=unlearned)
