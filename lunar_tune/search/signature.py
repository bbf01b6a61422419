"""What decides a search's trials, as a digest: trials under one signature compare.

Covers: model, data, method, goal, sampler, space; not resources, which decide no score, and not
where things lie, so that a folder may move to another machine.
Does not cover: what follows from a difference (`resume`, `table_run`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lunar_tune.config.search_config import plain
from lunar_tune.data.records import records_digest
from lunar_tune.metrics.goal import goal_of
from lunar_tune.search.plan import SearchPlan

__all__ = ["signature_of"]


def signature_of(plan: SearchPlan) -> str:
    """Return a digest of all that decides a search's trials, but for how many there are."""
    config, spec, data = plan.config, plan.spec, plan.spec.data
    settings = config.run.lunar if config.run.method == "lunar" else config.run.gradient
    held = data.held_out
    records = (
        *(data.fit_forget, data.fit_retain, data.forget, data.retain),
        *(data.retain_sample, data.factual),
        *((held.forget, held.retain, held.factual) if held is not None else ()),
    )
    # Of the space what is tried, not the file that says so, and not what comes first: settings
    # that were tuned meanwhile are nothing to a search that has begun.
    left_out = {"origin", "starting_points"}
    space = {key: value for key, value in plan.space.to_dict().items() if key not in left_out}
    parts: list[Any] = [
        [spec.model.name, config.run.revision, _last(config.run.model_path), config.run.dtype],
        [spec.chat.template, spec.chat.system_prompt],
        {**plain(settings), "checkpointing": None},
        [config.run.decoding.max_new_tokens, config.run.decoding.repetition_penalty],
        [config.run.engine.early_exit, config.run.engine.checks, config.run.rouge_tokenizer],
        [list(spec.metrics), _last(spec.embedding_model), config.run.seed],
        plain(goal_of(config).text),
        [config.sampler, config.scheduler, config.starting_points, config.bounded],
        space,
        [records_digest(one) for one in records],
        [list(data.reference_prompts), list(data.refusals)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _last(path: str | None) -> str | None:
    return None if path is None else Path(path).name
