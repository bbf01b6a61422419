"""What is kept of a search, and going on with it: what it was told, and what may change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic_core import to_jsonable_python

from lunar_tune import __version__
from lunar_tune.config.fields import flag_of, options_of
from lunar_tune.config.options import AUTO, SearchConfig
from lunar_tune.data.records import prompts_digest, records_digest
from lunar_tune.driver.plan import SearchPlan
from lunar_tune.driver.space_sources import LOST_SPACE, WHOLE_SPACE
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import write_atomically
from lunar_tune.metrics.goal import goal_of
from lunar_tune.models.catalog import read_lineage
from lunar_tune.study.folder import Folder, find_search, searches_in, write_trials
from lunar_tune.study.stored_search import (
    OWN_DATA,
    StoredConfig,
    StoredSearch,
    configuration_document,
)
from lunar_tune.study.study import StoredStudy
from lunar_tune.tracking.address import kept_uri, of_environment, with_password
from lunar_tune.trial.references import References
from lunar_tune.trial.spec import with_own_data
from lunar_tune.yaml_files import write_yaml

if TYPE_CHECKING:
    from lunar_tune.driver.backends import Resources
    from lunar_tune.report.results import SearchResults


def search_document(
    plan: SearchPlan,
    *,
    name: str,
    uri: str,
    resources: Resources,
    given: Mapping[str, str],
    baseline: Mapping[str, float],
) -> str:
    """Return `config.yaml` of a search under way; `given` are origins of options."""
    config, spec, data, prior = plan.config, plan.spec, plan.spec.data, plan.prior
    if config.tracking_uri is not None:
        config = dataclasses.replace(config, tracking_uri=kept_uri(config.tracking_uri))
    named = with_own_data(config, spec.model)
    derived = {
        **{option: getattr(named, option) for option in OWN_DATA},
        "name": name,
        "tracking_uri": kept_uri(uri),
        "gpus_per_trial": resources.gpus,
        "concurrency": resources.concurrency,
        "space": plan.space.origin,
        "forget_edge": data.forget_edges,
    }
    resolved: dict[str, Any] = {
        "space": plan.space.to_dict(),
        "n_layers": plan.n_layers,
        "model_source": spec.model.checkpoint,
        "weights": spec.model.weights,
        "working_folder": str(Path.cwd()),
        "rows": _rows(plan),
        "digests": data.digests(),
        "baseline": dict(baseline),
        "version": __version__,
    }
    if spec.model.origin:
        resolved["model_origin"] = spec.model.origin
    if plan.whole_space is not None:
        resolved[WHOLE_SPACE] = plan.whole_space.to_dict()
    if prior is not None:
        resolved["layer_prior"] = {"made_of_it": plan.layers, **prior.model_dump(mode="json")}
    if (lineage := read_lineage(spec.model.checkpoint)) is not None:
        resolved["lineage"] = dataclasses.asdict(lineage)
    return configuration_document(config, given=given, derived=derived, resolved=resolved)


def tracked_description(plan: SearchPlan, references: References | None) -> dict[str, Any]:
    """Return what MLflow shows of a search and its study does not say otherwise."""
    config, spec, digests = plan.config, plan.spec, plan.spec.data.digests()
    lineage, found = read_lineage(spec.model.checkpoint), dict[str, str]()
    if references is not None:
        used = references.chosen(spec.data.reference_prompts, config.reference_check)
        told = f"{references.summary(config.reference_check)}, SHA-256 {prompts_digest(used)[:16]}"
        found["reference_prompts"] = told
    return {
        "parameters": {
            **spec.tags,
            "goal": str(goal_of(config)),
            "sampler": config.sampler,
            "seed": config.seed,
            **{f"space.{name}": text for name, text in plan.space.describe()},
            **found,
        },
        "num_trials": config.num_trials,
        "data": {name: (digests[name], count) for name, count in _rows(plan).items()},
        "lineage": lineage.tags() if lineage is not None else {},
    }


def _rows(plan: SearchPlan) -> dict[str, int]:
    """Return the number of questions of each set."""
    data = plan.spec.data
    return {"forget": len(data.forget), "retain": len(data.retain), "factual": len(data.factual)}


def write_mirrors(folder: Folder, results: SearchResults) -> None:
    """Write table, pictures, report and page from the rows."""
    write_trials(folder.trials, results.rows)  # first: it needs nothing to be loaded

    from lunar_tune.report.charts import write_charts  # loads Altair
    from lunar_tune.report.results import write_report, write_static_page

    write_report(results, folder.path / "report.md", write_charts(results, folder.pictures))
    write_static_page([results], folder.path / "page.html")


def write_best(search: StoredSearch, plan: SearchPlan) -> None:
    """Write `best.yaml`: the confirmed setting, its scores in full, and as the trial saw them."""
    spec, goal, row = plan.spec, search.goal, search.trial()
    confirmed = search.study.notes["confirmed"]
    shown = ("max_new_tokens", "scores", "baseline", "repeating", "whole_cost")
    document = {
        "model": spec.model.name,
        "n_layers": plan.n_layers,
        "data": spec.data.name,
        "forget_edges": list(spec.data.forget_edges),
        "method": spec.method.name,
        "solver": spec.method.variant,
        "number_format": search.number_format,
        "trial": row.number,
        "parameters": dict(row.parameters),
        "minimise": goal.objective.name,
        "constraints": [str(one) for one in goal.constraints],
        "feasible": goal.is_kept(confirmed["scores"]),
        "confirmed": {key: confirmed[key] for key in shown if confirmed[key] is not None},
        "as_searched": {"max_new_tokens": row.max_new_tokens, "scores": dict(row.scores)},
        "baseline": dict(search.baseline),
        "seed": spec.seed,
    }
    write_atomically(search.folder.best, write_yaml(document).encode())


_LOOKED_AT = 5


class BusySearchError(InputError):
    """Another process works on the same search."""


def resumed(given: Mapping[str, Any], problems: Problems) -> tuple[SearchConfig, Mapping[str, str]]:
    """Return the configuration of a search that has begun, changed by what is given, and origins.

    Of `given`, options by field, `resume` names the search, and names are looked up in `output`.
    That an option cannot change any more is noted in `problems`; an InputError says that there is
    no such search, or that what it was told cannot be read.
    """
    folder = find_search(given["resume"], given.get("output", SearchConfig().output))
    stored, known = StoredConfig.read(folder), options_of(SearchConfig)
    changed: dict[str, Any] = {}
    for name, value in given.items():
        if name == "force" or (name in known and known[name].resume):
            changed[name] = value
        elif name != "resume" and _joined(value) != _joined(getattr(stored.search, name)):
            problems.add(
                f"{flag_of(name)}: {folder.name} was begun with another value or none, and new "
                "trials would not compare. Leave the option out, or start a new search."
            )
    changed["output"] = folder.path.parent
    with problems.collect():
        changed |= _permitted(stored, given, folder)
    config = dataclasses.replace(stored.search, resume=folder.name, **changed)
    return config, stored.origins


def _permitted(stored: StoredConfig, given: Mapping[str, Any], folder: Folder) -> Mapping[str, Any]:
    """Return the permissions of a search that this run gives again, or raise an InputError."""
    permitted = {name: given.get(name) for name in stored.permissions}
    if given.get("in_process"):
        permitted.pop("address", None)
    if (kept := stored.permissions.get("tracking_uri")) is not None:
        permitted["tracking_uri"] = given.get("tracking_uri") or of_environment(kept)
    command = ("python", "-m", "lunar_tune.search", "--resume", str(folder.path))
    stored.check_permitted(permitted, command=shlex.join(command))
    if (uri := permitted.get("tracking_uri")) is not None:
        permitted["tracking_uri"] = with_password(uri, folder.name)
    return permitted


def _joined(value: Any) -> Any:
    """Return a value, several texts as they can be given in one."""
    return ",".join(value) if isinstance(value, tuple) else value


def check_unchanged(plan: SearchPlan, folder: Folder) -> str | None:
    """Raise an InputError if earlier trials do not compare with a plan; return a mere doubt.

    A plan whose model is to be asked first compares when it was.
    """
    before = StoredStudy.read(folder.journal).notes.get("signature")
    if before is None or plan.spec.data.unanswered or before == signature_of(plan):
        return None
    told: Mapping[str, Any] = {}
    with suppress(InputError):  # a mirror, which may be missing
        told = StoredConfig.read(folder).resolved
    version = told.get("version")
    if version not in (None, __version__):
        return (
            f"{folder.name} was begun with lunar-tune {version}, whose defaults may differ from "
            f"those of {__version__}"
        )
    advice = "Put back the data and space that the search had, or start a new search."
    if plan.config.layer_prior == AUTO and WHOLE_SPACE not in told:
        advice += f" {LOST_SPACE}"
    raise InputError(
        f"{folder.path} was searched with other settings or data, so new trials would not compare. "
        f"{advice}"
    )


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
        if said.decides and (said.before is None or getattr(config, name) != said.before)
    }
    # Of the space what is tried, not the file that says so, and not what comes first.
    left_out = {"origin", "starting_points"}
    space = {key: value for key, value in plan.space.to_dict().items() if key not in left_out}
    model_path, embedding_model = (
        None if path is None else Path(path).name
        for path in (config.model_path, spec.embedding_model)
    )
    parts: list[Any] = [
        [spec.model.name, spec.model.revision, model_path],
        [spec.chat.template, spec.chat.system_prompt, *["second BOS"] * spec.chat.second_bos],
        [list(spec.metrics), embedding_model],
        decided,
        space,
        [records_digest(one) for one in records],
        [list(data.reference_prompts), list(data.refusals)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def alone(folder: Folder, what: str = "search", option: str = "--name") -> Iterator[None]:
    """Inside, no other living process works on a search or a table, or raise a BusySearchError."""
    try:
        with FileLock(folder.lock, timeout=0):
            yield
    except Timeout as error:
        raise BusySearchError(
            f"{folder.name}: another process works on this {what} ({folder.path}). Wait until "
            f"that process ends, or choose another {option}."
        ) from error


def is_finished(folder: Folder, config: SearchConfig) -> bool:
    """Say whether a search has ended by itself, with as many trials as it is to have."""
    stored = StoredStudy.read(folder.journal)
    enough = config.stop == AUTO and stored.knows_enough
    have = sum(row.counts for row in stored.rows)
    return stored.has_ended(1) and (enough or have >= config.num_trials)


def unfinished_like(signature: str, output: Path) -> Folder | None:
    """Return the last unfinished search with a signature, of the few that were written to last."""
    for folder in searches_in(output)[:_LOOKED_AT]:
        with suppress(InputError, OSError):  # another search's damage is not this one's affair
            notes = StoredStudy.read(folder.journal).notes
            if notes.get("signature") == signature and notes.get("num_trials") is None:
                return folder
    return None
