"""What decides a search's trials, as a digest: trials under one signature compare.

Resources decide no score, nor do the places where things lie, so that a folder may move.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from lunar_tune.config.fields import options_of
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.data.records import records_digest
from lunar_tune.search.plan import SearchPlan

__all__ = ["signature_of"]


def signature_of(plan: SearchPlan) -> str:
    """Return a digest of all that decides a search's trials, but for how many there are."""
    config, spec, data = plan.config, plan.spec, plan.spec.data
    held = data.held_out
    records = (
        *(data.fit_forget, data.fit_retain, data.forget, data.retain),
        *(data.retain_sample, data.factual),
        *((held.forget, held.retain, held.factual) if held is not None else ()),
    )
    decided = {
        name: to_jsonable_python(getattr(config, name))
        for name, said in options_of(SearchConfig).items()
        if said.decides
    }
    # Of the space what is tried, not the file that says so, and not what comes first.
    left_out = {"origin", "starting_points"}
    space = {key: value for key, value in plan.space.to_dict().items() if key not in left_out}
    parts: list[Any] = [
        [spec.model.name, spec.model.revision, _last(config.model_path)],
        [spec.chat.template, spec.chat.system_prompt],
        [list(spec.metrics), _last(spec.embedding_model)],
        decided,
        space,
        [records_digest(one) for one in records],
        [list(data.reference_prompts), list(data.refusals)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _last(path: str | None) -> str | None:
    return None if path is None else Path(path).name
