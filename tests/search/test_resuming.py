"""Going on with a search: what it was told comes back whole, and what decides scores stays."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shlex
import signal
import typing
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import optuna
import pytest
from command_lines import small_data
from made_outcomes import base_model, ended, failed
from made_search import ONE_CPU, session_of
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from test_study import run_trials, study_in

import lunar_tune as lt
from lunar_tune import __version__
from lunar_tune.config.fields import flag_of, options_again, options_of, types_of
from lunar_tune.config.options import SearchConfig
from lunar_tune.driver.loop import SearchLoop
from lunar_tune.driver.persistence import (
    BusySearchError,
    alone,
    check_unchanged,
    is_finished,
    resumed,
    search_document,
    signature_of,
    unfinished_like,
)
from lunar_tune.driver.plan import SearchPlan, make_folder, plan_search
from lunar_tune.driver.run import run_search
from lunar_tune.errors import InputError, Problems
from lunar_tune.metrics.goal import goal_of
from lunar_tune.secrets import without_password
from lunar_tune.study.folder import Folder, find_search
from lunar_tune.study.stored_search import StoredConfig, StoredSearch, configuration_document
from lunar_tune.study.study import StoredStudy, keep_note
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import Task
from lunar_tune.yaml_files import read_yaml, write_yaml

SEVERAL = SearchConfig(
    model="qwen2.5-7b",
    forget_edge=("A_B", "C_D"),
    method="npo",
    fix=("trained=full", "weight_decay=1e-5", "beta=0.2"),
    max_new_tokens=64,
    engine="plain",
    cache_limit=0.5,
    metrics=("forget_mrr",),
    system_prompt="Answer: in one word — 日本",
    seed=7,
    num_trials=12,
    time_budget=1e-4,
    range=("learning_rate=1e-5:1e-3",),
    minimise="forget_mrr",
    constrain=("retain_rouge1>=0.9", "retain_mrr>=0.5"),
    gpus_per_trial=0.5,
)


def written(config: SearchConfig, path: Path, **resolved: Any) -> Folder:
    """Write a search's configuration as the search does, with everything given."""
    folder = Folder(path.resolve())
    folder.path.mkdir(parents=True)
    given = dict.fromkeys(options_of(SearchConfig), "command line")
    document = configuration_document(config, given=given, derived={}, resolved=resolved)
    folder.config.write_text(document, encoding="utf-8")
    return folder


@pytest.mark.parametrize("config", [SearchConfig(), SEVERAL], ids=["defaults", "several"])
def test_a_configuration_comes_back_as_it_was(config: SearchConfig, tmp_path: Path) -> None:
    """What was derived is derived again."""
    folder = written(config, tmp_path / "runs/n")
    stored = StoredConfig.read(folder).search
    assert stored == dataclasses.replace(config, output=(tmp_path / "runs").resolve(), name="n")
    derived = {"concurrency": 2, "tracking_uri": "sqlite:////elsewhere/mlflow.db"}
    text = configuration_document(config, given={}, derived=derived, resolved={})
    folder.config.write_text(text)
    stored = StoredConfig.read(folder).search
    assert (stored.concurrency, stored.tracking_uri) == (None, None)


def test_files_and_a_store_named_relative_to_another_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    (there / "tuned").mkdir(parents=True)
    here.mkdir()
    small_data(there)
    config = SearchConfig(data="pairs.json", refusals="refusals")
    folder = written(config, tmp_path / "n", working_folder=str(there), weights="tuned")
    monkeypatch.chdir(here)
    small_data(here)
    (there / "refusals").touch()
    stored = StoredConfig.read(folder)
    assert stored.search.data == str(there / "pairs.json"), "one of that name here is another"
    assert stored.search.refusals == "refusals", "a shipped name stays a name"
    assert stored.trial_options.model_path == str(there / "tuned")
    (there / "pairs.json").unlink()
    assert StoredConfig.read(folder).search.data == "pairs.json"

    options: dict[str, Any] = {"name": "n", "uri": "sqlite:///here.db", "baseline": {}}
    plan = plan_search(SearchConfig(output=tmp_path / "runs", tracking_uri=options["uri"]))
    given = {"tracking_uri": "command line"}
    folder.config.write_text(search_document(plan, **options, resources=ONE_CPU, given=given))
    uri = StoredConfig.read(folder).permissions["tracking_uri"]
    assert uri == f"sqlite:///{here.resolve() / 'here.db'}"


def test_a_configuration_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    """An option that there is not: of this format; one of another is refused as a whole."""
    folder = written(SearchConfig(num_trials=5), tmp_path / "n")
    text = folder.config.read_text()
    folder.config.write_text(text + "later: {x: 1}\n")
    assert StoredConfig.read(folder).search.num_trials == 5
    value = "{options: {num_trials: {value: many, origin: x}}, resolved: {}}"
    for wrong, said in (
        (text.replace("  num_trials:", "  num_trails:"), r"num_trails is not .* 'num_trials'"),
        ("[", r"config\.yaml: line 1"),
        ("42", "it is 42"),
        ("options: {num_trials: {value: 5, origin: x}}", "a part of the file is missing"),
        (value, "num_trials is 'many'; a whole number is needed"),
    ):
        folder.config.write_text(wrong)
        with pytest.raises(InputError, match=said):
            StoredConfig.read(folder)

    folder.config.unlink()
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        StoredConfig.read(folder)
    study = study_in(folder.path)
    with pytest.raises(InputError, match="its study has no copy of it"):
        StoredConfig.read(folder)
    study.note("configuration", text)
    assert StoredConfig.read(folder).search.num_trials == 5, "the study has a copy"


@pytest.mark.parametrize("form", [None, 1], ids=["no note", "1"])
def test_a_search_of_another_format_is_refused_by_all(form: int | None, tmp_path: Path) -> None:
    old = Folder((tmp_path / "runs" / "old").resolve())
    old.path.mkdir(parents=True)
    storage = JournalStorage(JournalFileBackend(str(old.journal)))
    study = optuna.create_study(storage=storage, study_name="s")
    study.set_user_attr("goal", ("forget_rouge1", ("retain_rouge1>=0.8",)))
    if form is not None:
        study.set_user_attr("format", form)
    old.config.write_text("{search: {}, run: {}, resolved: {}}", encoding="utf-8")
    before = old.journal.read_bytes()
    readers: list[Callable[[], Any]] = [
        lambda: StoredStudy.read(old.journal),
        lambda: StoredConfig.read(old),
        lambda: StoredSearch.read(old.path),
        lambda: study_in(old.path),
        lambda: resumed({"resume": str(old.path)}, Problems()),
    ]
    for read in readers:
        with pytest.raises(InputError, match=r"another format \(1, here 4\)") as caught:
            read()
        assert str(caught.value).startswith(f"{old.path}: was begun by another version")
        assert old.journal.read_bytes() == before


def begun(tmp_path: Path, **options: Any) -> tuple[SearchPlan, Folder]:
    """Plan a search on the tiny model, and leave its folder as if it had begun."""
    data = tmp_path / "pairs.json"
    if not data.exists():
        small_data(tmp_path)
    config = SearchConfig(data=str(data), output=tmp_path / "runs", **options)
    plan = plan_search(config)
    path = tmp_path / "runs" / "n"
    if not path.exists():
        written(config, path, version="0")
        study = study_in(path)
        study.note("goal", goal_of(config).text)
        study.note("signature", signature_of(plan))
    return plan, Folder(path.resolve())


def another(name: str, config: SearchConfig) -> Any:
    kind = types_of(SearchConfig)[name]
    if "tuple" in str(kind):
        return ("other",)
    (kind, *_) = typing.get_args(kind) or (kind,)
    changed = {str: "other", int: 7, float: 7.0, Path: Path("elsewhere")}
    return not getattr(config, name) if kind is bool else changed[kind]


def test_what_an_option_says_of_resuming_is_what_resuming_does(tmp_path: Path) -> None:
    begun(tmp_path)
    given: dict[str, Any] = {"resume": "n", "output": tmp_path / "runs"}
    before = resumed(given, Problems())[0]
    for name in options_of(SearchConfig).keys() - {"resume", "output"}:
        value, problems = another(name, before), Problems()
        config, origins = resumed({**given, name: value}, problems)
        assert (config.resume, origins[name]) == ("n", "command line")
        may_change = options_of(SearchConfig)[name].resume or name == "force"
        assert getattr(config, name) == (value if may_change else getattr(before, name)), name
        if may_change:
            assert problems.messages == [], name
            continue
        (said,) = problems.messages
        assert said.startswith(f"{flag_of(name)}: n was begun with another value or none")
        resumed({**given, name: getattr(before, name)}, same := Problems())
        assert same.messages == [], f"{name}: what it was told may be told again"


def test_an_older_search_goes_on_with_all_reference_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was told knows no such option; its signature has none, and is the same."""
    _, folder = begun(tmp_path)
    document = read_yaml(folder.config)
    assert document["options"].pop("reference_check")["value"] == "declined"
    folder.config.write_text(write_yaml(document))
    config, origins = resumed({"resume": "n", "output": tmp_path / "runs"}, Problems())
    assert config.reference_check == "never"
    flags = options_again(config, origins.keys())
    assert flags[flags.index("--reference-check") + 1] == "never"
    plan = plan_search(config)
    assert not plan.spec.checks_references
    mine, known = signature_of(plan), options_of(SearchConfig)
    older = {name: said for name, said in known.items() if name != "reference_check"}
    monkeypatch.setattr("lunar_tune.driver.persistence.options_of", lambda _: older)
    assert signature_of(plan) == mine


PERMISSIONS = {
    "trust_remote_code": True,
    "address": "10.0.0.1:6379",
    "tracking_uri": "http://evil.example/\x1b[2J",
}


def test_what_a_folder_permits_itself_is_asked_for_with_the_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's folder would else run code, or be sent the tokens of MLflow's variables."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cret")
    monkeypatch.setattr("lunar_tune.driver.plan.check_address", lambda _: None)
    _, folder = begun(tmp_path, **PERMISSIONS)
    stored = StoredConfig.read(folder)
    assert stored.permissions == PERMISSIONS
    assert [getattr(stored.search, name) for name in PERMISSIONS] == [False, None, None]
    options: dict[str, Any] = {"resume": "n", "output": tmp_path / "runs"}
    config, _ = resumed(options, problems := Problems())
    (said,) = problems.messages
    flags = options_again(SearchConfig(**PERMISSIONS), PERMISSIONS)
    assert said.endswith(f"--resume {folder.path} {shlex.join(flags)}")
    assert (config.trust_remote_code, config.address, config.tracking_uri) == (False, None, None)
    for name in PERMISSIONS:
        without = options | {other: PERMISSIONS[other] for other in PERMISSIONS if other != name}
        resumed(without, problems := Problems())
        assert f"was searched with {flag_of(name)}" in problems.messages[0]
    config, _ = resumed(options | PERMISSIONS, problems := Problems())
    assert problems.messages == []
    assert {name: getattr(config, name) for name in PERMISSIONS} == PERMISSIONS
    assert shlex.join(config.resuming(folder.path)) == said.partition("lunar_tune.search ")[2]
    declined = {**PERMISSIONS, "trust_remote_code": False, "in_process": True}
    del declined["address"]
    config, _ = resumed(options | declined, problems := Problems())
    assert (problems.messages, config.trust_remote_code, config.address) == ([], False, None)


@pytest.mark.parametrize("name", ["search.log", ".lock", "trials", "trials/00000.parquet"])
def test_a_link_in_a_searchs_folder_is_followed_nowhere(tmp_path: Path, name: str) -> None:
    """Its log would be written to the end of any file that the link names."""
    folder = begun(tmp_path)[1].path
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "pairs.json")
    before = (tmp_path / "pairs.json").read_bytes()
    with pytest.raises(InputError, match=rf"{name}: is a link or a device"):
        lt.search(resume="n", output=tmp_path / "runs", quiet=True)
    assert (tmp_path / "pairs.json").read_bytes() == before
    (folder / name).unlink()
    os.truncate(folder / "study.journal", 2**40)
    with pytest.raises(InputError, match=r"study\.journal: has 1,099,511,627,776 bytes"):
        find_search(folder)


def test_a_file_that_goes_while_a_folder_is_looked_through_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search under way writes its files by other names at first."""
    folder = begun(tmp_path)[1].path
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: [*listed(path), path / ".gone"])
    assert find_search(folder).path == folder


def test_a_password_that_was_not_kept_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = begun(tmp_path, tracking_uri=without_password("http://me:secret@host"))
    options: dict[str, Any] = {"resume": "n", "output": tmp_path / "runs"}
    resumed(options, problems := Problems())
    (said,) = problems.messages
    assert "n: was searched with --tracking-uri 'http://me:***@host'. " in said
    resumed(options | {"tracking_uri": "http://me:***@host"}, problems := Problems())
    assert "n: the store http://me:***@host needs a password" in problems.messages[0]
    whole = "http://me:other@host"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", whole)
        assert resumed(options, Problems())[0].tracking_uri == whole
    options["tracking_uri"] = whole
    assert resumed(options, Problems())[0].tracking_uri == whole
    assert "secret" not in folder.config.read_text()


def test_a_search_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    begun(tmp_path)
    assert find_search(tmp_path / "runs/n").name == "n"
    with pytest.raises(InputError, match=r"m: there is no such search\. .*runs has n\."):
        find_search("m", tmp_path / "runs")
    with pytest.raises(InputError, match="is not the folder of a search"):
        find_search(tmp_path / "runs")


def test_other_data_are_refused_and_another_seed_of_nothing_is_not(tmp_path: Path) -> None:
    plan, folder = begun(tmp_path)
    assert check_unchanged(plan, folder) is None
    assert check_unchanged(begun(tmp_path, num_trials=9, concurrency=1)[0], folder) is None
    data = tmp_path / "pairs.json"
    data.write_text(data.read_text().replace("Kettle 0", "Kettle 5", 1))
    changed, _ = begun(tmp_path)
    warning = check_unchanged(changed, folder)
    assert "lunar-tune 0" in warning, "another version may have had other defaults"
    text = folder.config.read_text().replace('version: "0"', f"version: {__version__}")
    folder.config.write_text(text)
    with pytest.raises(InputError, match="other settings or data"):
        check_unchanged(changed, folder)


def test_a_search_goes_on_with_the_space_that_it_was_begun_with(tmp_path: Path) -> None:
    """Shipped spaces may be others by then."""
    plan, folder = begun(tmp_path)
    coefficient = {"type": "float", "low": 0.5, "high": 3.0, "log": True}
    kinds = plan.space.to_dict()["parameters"] | {"coefficient": coefficient}
    point = {"layer": 2, "coefficient": 1.5, "learning_rate": 0.01}
    space = plan.space.to_dict() | {"parameters": kinds, "starting_points": [point]}
    document = configuration_document(
        plan.config, given={}, derived={}, resolved={"space": space, "version": "0"}
    )
    folder.config.write_text(document)
    given = {"resume": "n", "output": tmp_path / "runs", "data": str(tmp_path / "pairs.json")}
    again = plan_search(resumed(given, Problems())[0]).space
    assert again.parameters["coefficient"] == FloatDistribution(0.5, 3.0, log=True)
    assert again.parameters["layer"] == plan.space.parameters["layer"]
    assert again.starting_points == (point,)


@pytest.mark.parametrize("named", [None, "tiny", "not-shipped-any-more"])
@pytest.mark.parametrize("prior", [None, "auto"])
def test_also_one_that_named_it_or_whose_scored_layers_narrowed_it(
    prior: str | None, named: str | None, tmp_path: Path
) -> None:
    plan, folder = begun(tmp_path)
    whole = plan.space.to_dict()
    whole["parameters"] = whole["parameters"] | {"layer": {"type": "int", "low": 0, "high": 2}}
    whole["starting_points"] = []
    resolved = {"space": whole, "version": __version__}
    if prior is not None:
        narrow = whole["parameters"] | {"layer": {"type": "int", "low": 2, "high": 2}}
        resolved |= {"space": whole | {"parameters": narrow}, "space_before_layers": whole}
    config = dataclasses.replace(plan.config, space=named, layer_prior=prior)
    given = {"resume": "n", "output": tmp_path / "runs"}

    def again(**kept: Any) -> SearchPlan:
        facts = {"given": {}, "derived": {}, "resolved": kept}
        folder.config.write_text(configuration_document(config, **facts))
        return plan_search(resumed(given, Problems())[0])

    assert again(**resolved).space.values_of("layer") == (0, 1, 2)
    if prior is not None:  # an older version has not kept it
        resolved.pop("space_before_layers")
        keep_note(folder.journal, "signature", "of another space")
        with pytest.raises(InputError, match="not kept the space in which its layers were scored"):
            check_unchanged(again(**resolved), folder)


def test_a_search_is_finished_when_it_has_ended_with_as_many_trials(tmp_path: Path) -> None:
    plan, folder = begun(tmp_path)
    study = study_in(folder.path)
    run_trials(study, *[(0.2, 0.9)] * 3)
    other = folder.path.parent / "other"
    other.mkdir()
    (other / "study.journal").write_bytes(b"{}\nnonsense\n")  # damaged, and not this one's affair
    signature, runs = signature_of(plan), tmp_path / "runs"
    assert unfinished_like(signature, runs) == folder
    assert unfinished_like("another", runs) is None
    for noted, finished in ((None, False), (3, True)):  # None: begun, and did not end by itself
        study.note("num_trials", noted)
        assert is_finished(folder, SearchConfig(num_trials=3)) is finished
    more = SearchConfig(num_trials=4)
    assert not is_finished(folder, more)
    study.note("outlook", {"chance": 0.01, "gain": 0.01, "enough": True})
    assert is_finished(folder, more), "it would gain nothing"
    assert not is_finished(folder, dataclasses.replace(more, stop="never"))
    assert unfinished_like(signature, runs) is None


def _hold(path: Path, ready: Any) -> None:
    with alone(Folder(path)):
        ready.set()
        signal.pause()


def test_a_search_has_one_process_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    """What is refused is left alone: its folder is nearly empty while the base model is judged."""
    plan = plan_search(SearchConfig(output=tmp_path, name="n"))
    folder = Folder((tmp_path / "n").resolve())
    folder.answers(None).parent.mkdir(parents=True)
    folder.answers(None).touch()
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=_hold, args=(folder.path, ready))
    other.start()
    assert ready.wait(30)
    with pytest.raises(BusySearchError, match="another process works on this search"):
        run_search(plan, Console(quiet=True), given={}, arguments=())
    assert folder.answers(None).exists()
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    with alone(folder):
        pass


def test_a_search_that_finds_nothing_says_so_and_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full evaluation fails, and the next misses the bound; or all trials fail."""
    monkeypatch.setattr("lunar_tune.driver.session.write_mirrors", lambda *_: None)
    for told, code, said in (
        (
            [ended()] * 8 + [failed("no memory")] + [ended(retain=0.5)] * 7,
            3,
            "A full evaluation failed (no",
        ),
        ([failed("the loss became NaN")] * 5, 4, "Stopped after 5 failed trials in a row"),
    ):
        outcomes = iter([base_model(), *told])

        def scripted(loop: SearchLoop, _spec: TrialSpec, outcomes: Any = outcomes) -> None:
            while isinstance(loop.next("id"), Task):
                loop.take("id", next(outcomes))

        plan = plan_search(
            SearchConfig(output=tmp_path, name=f"n{code}", num_trials=8, stop="never")
        )
        folder = make_folder(plan.config, plan.spec)
        console = Console(record=True, file=StringIO(), width=200)
        assert session_of(plan, folder, scripted, console=console).run() == code
        assert said in console.export_text()
        assert not is_finished(folder, plan.config)
        assert not folder.best.exists()
        assert next(outcomes, None) is None
