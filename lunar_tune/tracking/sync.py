"""MLflow's runs of a search, made to say what its study and its answers say.

A parent run for the search, a child run for each trial that has ended, and nothing else; and an
exported model as a version in the registry.
"""

from __future__ import annotations

import dataclasses
import getpass
import importlib.metadata
import itertools
import logging
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lunar_tune import __version__
from lunar_tune.errors import InputError, Problems
from lunar_tune.study.rows import COMPLETE, RUNNING, TrialRow
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import keep_note
from lunar_tune.tracking import address, artifacts, places, runs, store
from lunar_tune.tracking.ui import Shown, keep_lists

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

_MOST_RUNS = 50_000  # that MLflow gives at once
_REFUSED = set("/:'")  # MLflow refuses two, and its filters of names have no escape for the third
_AWAY = 30.0  # seconds for which a store that has failed is left alone: trials do not wait for it
_SHARE = 10  # a store that has failed after some seconds is left alone for so many times as long
_PATIENCE = 60.0  # seconds after which nothing more is written at once to a store that is slow
logger = logging.getLogger(__name__)


class Tracker:
    """Writes runs of what is computed; a store that fails is warned of once and ends nothing."""

    def __init__(self, uri: str, experiment: str, name: str) -> None:
        """Open the store, or raise an InputError, in which `name` says what is computed."""
        self.uri = address.with_password(uri, name)
        self._away_until = 0.0  # it has never failed
        self._has_all = False
        artifacts.bring_artifacts(self.uri)
        with store.opened_store(self.uri) as client:
            name = store.chosen_experiment(client, experiment)
            self.experiment = str(store.open_experiment(client, name).name)

    def place(self, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what a search notes of its place in MLflow, with the identity that it had."""
        place = {"uri": address.kept_uri(self.uri), "experiment": self.experiment}
        return {"id": uuid.uuid4().hex, "origin": _origin(), **(before or {}), **place}

    def search(
        self,
        search: StoredSearch,
        *,
        note: str | None = None,
        status: str | None = None,
        trial: int | None = None,
    ) -> bool:
        """Write a search's runs, and say whether MLflow has all of them; see `sync`.

        A trial's number says that nothing else is new; all is looked at where MLflow lacks more.
        When the search has ended, MLflow's menu of views has the lists that show its scores.
        """

        def write(client: MlflowClient) -> None:
            # One that has all its runs has an identity of its own.
            mine = search if self._has_all else claimed(search, client)
            sync(mine, client, note=note, status=status, trial=trial)
            if status is None and (found := shown(client, mine)) is not None:
                keep_lists(client, found.parent.info.experiment_id, [found])

        if status == "RUNNING" and time.monotonic() < self._away_until:
            return False
        trial = trial if self._has_all else None
        self._has_all = self._tolerating(write)
        return self._has_all

    def write(self, content: runs.RunContent) -> bool:
        """Write one run that is over, and say whether MLflow has it."""
        return self._tolerating(
            lambda client: runs.bring(
                client, store.find_experiment(client, self.experiment), (), content
            )
        )

    def _tolerating(self, writing: Callable[[MlflowClient], object]) -> bool:
        started, has_failed = time.monotonic(), self._away_until > 0
        try:
            with store.opened_store(self.uri, is_away=has_failed and not self._has_all) as client:
                writing(cast("MlflowClient", _Hurried(client, started + _PATIENCE)))
        except InputError as error:
            if not has_failed:
                first_line = str(error).partition("\n")[0]
                logger.warning("MLflow cannot be written, the work goes on: %s", first_line)
            now = time.monotonic()
            self._away_until = now + max(_AWAY, _SHARE * (now - started))
            return False
        return True


class _Hurried:
    """A client that refuses calls from a time of `time.monotonic` on."""

    def __init__(self, client: MlflowClient, until: float) -> None:
        self._client, self._until = client, until

    def __getattr__(self, name: str) -> Any:
        if time.monotonic() > self._until:
            raise TimeoutError(f"it took more than {_PATIENCE:g} s, and the rest waits")
        return getattr(self._client, name)


def _origin() -> dict[str, str]:
    """Return where a run comes from that is started here and now, some for MLflow's own columns."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    command = str(spec.name).removesuffix(".__main__") if spec is not None else ""
    tags = {
        "mlflow.source.name": command if command.startswith("lunar_tune") else "lunar_tune",
        "mlflow.source.type": "LOCAL",
        "version.lunar_tune": __version__,
    }
    with suppress(KeyError, OSError, ImportError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if (commit := code_commit(Path(__file__).parents[1])) is not None:
        tags["mlflow.source.git.commit"] = commit
    for package in ("torch", "transformers", "ray", "optuna"):
        with suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    return tags


def code_commit(package: Path) -> str | None:
    """Return the commit of a package's own checkout; None where no repository has its files."""
    # Of its file as well: an installed package may lie below the repository of something else.
    command = ["git", "-C", str(package), "rev-parse", "HEAD", "HEAD:./__init__.py"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split()[0]


def sync(
    search: StoredSearch,
    client: MlflowClient,
    *,
    note: str | None = None,
    status: str | None = None,
    trial: int | None = None,
) -> Run:
    """Make MLflow's runs say what a search's study says; what is right is not written again.

    It is for the process that holds the lock of a search, which is `claimed`. Without a note in
    Markdown the search's run keeps the one that it has; without a status it takes the one with
    which the search ended. With a trial's number only its run and the search's are looked at.
    """
    experiment, found, by_trial = _runs_of(client, search, trial)
    about = runs.search_content(search, client.tracking_uri, note, status)
    parent = runs.bring(client, experiment, found, about)
    for row in search.rows:
        if row.state != RUNNING and trial in (None, row.number):
            content = runs.trial_content(search, row, parent.info.run_id)
            runs.bring(client, experiment, by_trial.pop(str(row.number), []), content)
    for run in itertools.chain.from_iterable(by_trial.values()):  # of no trial that has ended
        client.delete_run(run.info.run_id)
    return parent


def claimed(search: StoredSearch, client: MlflowClient) -> StoredSearch:
    """Return a search whose runs are its folder's own: that of a copy has a new identity.

    The runs that a store has of its identity are left to the original, and a word says so.
    """
    _, found, by_trial = _runs_of(client, search)
    folder, notes, uri = search.folder, search.study.notes, client.tracking_uri
    run = next(itertools.chain(found, *by_trial.values()), None)
    if run is None:
        return search
    owner, here = places.other_owner(run, folder, notes["mlflow"]["id"], uri), folder.path
    if owner is None:
        if run.data.tags.get(places.FOLDER, tag := places.Place.of(here, uri).tag) != tag:
            logger.warning("%s was moved or renamed: its runs in MLflow go on", here)
        return search
    told = "%s is a copy of %s, whose runs in MLflow are left alone: it gets its own"
    logger.warning(told, here, owner)
    place = {**notes["mlflow"], "id": uuid.uuid4().hex}
    keep_note(folder.journal, "mlflow", place)
    study = dataclasses.replace(search.study, notes={**notes, "mlflow": place})
    return dataclasses.replace(search, study=study)


def remove(search: StoredSearch, client: MlflowClient) -> None:
    """Delete the run of a search that has no trial."""
    for run in _runs_of(client, search)[1]:
        client.delete_run(run.info.run_id)


def shown(client: MlflowClient, search: StoredSearch) -> Shown | None:
    """Return a search's runs in a store; None where that has no run of a completed trial."""
    _, found, by_trial = _runs_of(client, search)
    completed = [str(row.number) for row in search.rows if row.state == COMPLETE]
    trials = [by_trial[one][0] for one in completed if one in by_trial]
    return Shown(search, found[0], trials) if found and trials else None


def _runs_of(
    client: MlflowClient, search: StoredSearch, trial: int | None = None
) -> tuple[Experiment, list[Run], dict[str, list[Run]]]:
    """Return the experiment, the runs that claim to be the search's, and those by trial."""
    one = "" if trial is None else f" and tags.trial = '{trial}'"
    place = search.study.notes["mlflow"]
    experiment = store.find_experiment(client, place["experiment"])
    parents, trials = (
        client.search_runs(
            [experiment.experiment_id],
            f"tags.`{tag}` = '{place['id']}'{more}",
            max_results=_MOST_RUNS,
        )
        for tag, more in ((runs.SEARCH, ""), (runs.TRIAL_OF, one))
    )
    by_trial: dict[str, list[Run]] = defaultdict(list)
    for run in trials:
        by_trial[run.data.tags.get("trial", "")].append(run)
    return experiment, list(parents), by_trial


def check_registrable(search: StoredSearch, name: str, *, tracking_uri: str | None = None) -> None:
    """Check that a model of a search can be registered by a name, or raise an InputError."""
    problems = Problems()
    if not name.strip() or name in {".", ".."} or set(name) & _REFUSED:
        problems.add(f"--register {name}: must not be empty, . or .., and must not hold / : or '.")
    with problems.collect(), store.opened_store(address.store_of(search, tracking_uri)) as client:
        store.open_experiment(client, search.study.notes["mlflow"]["experiment"])
        with store.opened_store(client.tracking_uri, registering=True) as registry:
            registry.search_registered_models(max_results=1)
    problems.raise_if_any()


def register_model(
    search: StoredSearch,
    folder: Path,
    name: str,
    *,
    row: TrialRow,
    scores: Mapping[str, float],
    form: str,
    tracking_uri: str | None = None,
) -> int:
    """Register a trial's exported model, with its scores, as a new version; return its number.

    The folder is kept in a place of its own among the artifacts of the search's run, so that no
    version changes with a later one. The alias `best` moves to a version of the confirmed best.
    What the store refuses is raised as an InputError.
    """
    is_best = row == search.best
    facts: dict[str, object] = {"feasible": row.feasible, "retain_exact": row.retain_exact}
    if is_best:
        feasible = search.goal.is_kept(search.confirmed or {})
        facts = {"feasible": feasible, "on_held_out": search.held_out}
    tags = {
        "search": search.folder.name,
        "trial": str(row.number),
        **{key: str(fact).lower() for key, fact in facts.items() if fact is not None},
        **search.study.notes["tags"],
        **{key: repr(value) for key, value in row.parameters.items()},
        **{key: f"{value:.6g}" for key, value in runs.shown_scores(scores).items()},
        "format": form,
    }
    place = f"model/trial-{row.number}-{form}-{uuid.uuid4().hex[:8]}"
    uri = address.store_of(search, tracking_uri)
    artifacts.bring_artifacts(uri)
    with store.opened_store(uri, registering=True) as client:
        search = claimed(search, client)
        run = next(iter(_runs_of(client, search)[1]), None) or sync(search, client)
        runs.artifacts_of(client, run).log_artifacts(str(folder), place)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description="Unlearned by lunar-tune.")
        # A server takes no source but a place among the run's own files.
        version = client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/{place}",
            run_id=run.info.run_id,
            tags=tags,
            description=f"{search.title}: {row.label}",
        )
        if is_best:
            client.set_registered_model_alias(name, "best", version.version)
    return int(version.version)
