"""The table of methods: cells, what their studies say, its files, and one that is killed."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from command_lines import without_ray
from made_outcomes import KilledError
from markdown_it import MarkdownIt
from rich.console import Console
from search_results import statuses
from test_study import GOAL, UNSTARTED, run_trials, study_in
from test_study import stored_in as read

from lunar_tune.cli.table5 import PAPER_METHODS
from lunar_tune.cli.table5 import table5 as COMMAND
from lunar_tune.config.options import SearchConfig
from lunar_tune.data.texts import divided
from lunar_tune.driver.persistence import alone, signature_of
from lunar_tune.driver.plan import plan_search
from lunar_tune.driver.table5 import TableRun, cells_of, check_names
from lunar_tune.errors import InputError
from lunar_tune.report.methods_table import (
    Cell,
    data_and_edges,
    read_table,
    write_methods_table,
)
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.stored_search import configuration_document
from lunar_tune.study.study import StoredStudy
from lunar_tune.trial.assemble import configured
from lunar_tune.trial.worker import Worker
from lunar_tune.yaml_files import read_yaml, write_yaml

CELL = Cell(model="tiny", data="mini", method="lunar", variant="adamw", seed=0)
GA = dataclasses.replace(CELL, method="ga", variant="full")
LORA = dataclasses.replace(GA, variant="lora")


# Cells


def test_every_model_meets_all_data_methods_and_seeds_in_its_own_folder(tmp_path: Path) -> None:
    cells = cells_of(["tiny", "qwen2.5-7b"], ["mini", "factual:arts"], PAPER_METHODS, seeds=2)
    assert [cell.model for cell in cells] == ["tiny"] * 24 + ["qwen2.5-7b"] * 24
    named = ["tiny-mini-lunar-adamw", "tiny-mini-lunar-adamw-seed1"]
    assert [cell.name for cell in cells[:2]] == named
    texts = ["d:\u4f5c\u4e00", "d:\u4f5c\u4e8c", "my pairs", "my-pairs", "d:" + "+".join("ab" * 99)]
    names = [dataclasses.replace(CELL, data=text).name for text in texts]
    models = [tmp_path / place / "model" for place in ("a", "b")]
    for folder in models:
        folder.mkdir(parents=True)
    names += [cell.name for cell in cells_of([str(folder) for folder in models], [], ["lunar"])]
    names += [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 120 and "/" not in name for name in names)


def test_a_cell_is_a_search_with_its_model_data_method_and_seed() -> None:
    shared = SearchConfig(retain_rows=7, num_trials=3)
    (cell,) = cells_of(["tiny"], ["factual:arts+history"], ["lunar:closed_form"], seed=4)
    config = cell.config(shared)
    edges = ("arts", "history")
    assert (config.model, config.data, config.forget_edge) == ("tiny", "factual", edges)
    variant = configured(config)[0].variant
    assert (config.method, variant, config.seed) == ("lunar", "closed_form", 4)
    assert (config.retain_rows, config.num_trials) == (7, 3)
    assert config.name == config.resume == cell.name


def test_data_and_edges_of_a_list_may_hold_the_signs_between_them(tmp_path: Path) -> None:
    rows = [
        {"edge": e, "question": f"{e}?", "answer": "B"} for e in ("Lee, Ann", "a+b", "x:y", "x")
    ]
    (file := tmp_path / "my:pairs, new.json").write_text(json.dumps(rows))
    for edges in (["Lee, Ann"], ["a+b", "x:y"], ["x:y"], []):
        one = ":".join([str(file), *filter(None, ["+".join(edges)])])
        assert data_and_edges(one) == (str(file), tuple(edges), True)
        listed = divided(f"mini,{one}, factual:arts", lambda part: data_and_edges(part.strip())[2])
        assert [part.strip() for part in listed] == ["mini", one, "factual:arts"]
    (cell,) = cells_of(["tiny"], [f"{file}:Lee, Ann"], ["lunar"])
    config = cell.config(SearchConfig())
    assert (config.data, config.forget_edge) == (str(file), ("Lee, Ann",))
    assert data_and_edges("mini:no+A_B") == ("mini", ("no", "A_B"), False)


def test_what_one_method_has_and_another_has_not_is_for_those_that_have_it() -> None:
    ranges = ("coefficient=1:2", "learning-rate=0.001:0.01")
    shared = SearchConfig(fix=("layer=1", "beta=0.5"), range=ranges)
    lunar, npo = cells_of(["tiny"], [], ["lunar", "npo"])
    assert lunar.config(shared).fix == ("solver=adamw", "layer=1")
    assert lunar.config(shared).range == shared.range
    assert npo.config(shared).fix[1:] == ("beta=0.5",)
    assert npo.config(shared).range == shared.range[1:]
    check_names([lunar, npo], shared)
    with pytest.raises(InputError, match=r"--fix beta=0\.5: no method of the table has it"):
        check_names([lunar], shared)
    with pytest.raises(InputError, match="--range coefficient=1:2: no method of the table has it"):
        check_names([npo], dataclasses.replace(shared, fix=()))


def test_what_is_wrong_with_lists_data_and_options_is_said_at_once(tmp_path: Path) -> None:
    wrong = ("--model", "tiny,bogus", "--data", "nosuch,mini,mini", "--method", "x,lunar:y,ga:half")
    wrong += ("--fix", "epochs=2", "--num-trials", "0", "--seeds", "0")
    done = without_ray(COMMAND, *wrong, "--output", tmp_path)
    assert done.exit_code == 2
    said = ("model 'bogus'", "nosuch", "method 'x'", "lunar:y", "--num-trials 0", "--seeds 0")
    said += ("ga:half: ga has lora, full.", "--data: mini is named twice.")
    for part in said:
        assert done.stderr.count(part) == 1
    assert f"{len(said)} things are wrong" in done.stderr


def test_a_signature_tells_what_decides_trials_and_not_how_many_there_are(tmp_path: Path) -> None:
    def signature(**changes: Any) -> str:
        shared = SearchConfig(output=tmp_path, **changes)
        return signature_of(plan_search(CELL.config(shared)))

    assert signature() == signature(num_trials=99, concurrency=1)
    assert signature() == signature(device="cpu", fix=("beta=0.5",))
    others: list[dict[str, Any]] = [{"sampler": "random"}, {"retain_rows": 20}, {"holdout": True}]
    others += [{"constrain": ("retain_rouge1>=0.7",)}, {"range": ("layer=1:2",)}]
    others += [{"fix": ("layer=1",)}, {"fix": ("layer=2",)}]
    assert len({signature(), *(signature(**changes) for changes in others)}) == 8


# What a study says


def told(folder: Path, outcomes: list[tuple[float, float]], **notes: Any) -> StoredStudy:
    study = study_in(folder, space=UNSTARTED)
    study.note("goal", GOAL)
    run_trials(study, *outcomes)
    for key, value in notes.items():
        study.note(key, value)
    return read(folder)


def test_a_finished_cell_says_its_confirmed_best_and_how_sharp_it_is(tmp_path: Path) -> None:
    """Trials 1 to 3 are feasible; 1 and 3 are within .05 of the best, trial 1."""
    outcomes = [(0.0, 0.5), (0.1, 0.9), (0.4, 0.95), (0.14, 0.85)]
    confirmed = {"number": 1, "scores": {"forget_rouge1": 0.12, "retain_rouge1": 0.88}}
    stored = told(tmp_path, outcomes, confirmed=confirmed, num_trials=4)
    assert read_table({CELL: stored}, 5).iloc[0]["state"] == "unfinished"
    cell = read_table({CELL: stored}, 4).iloc[0]
    assert cell["state"] == "feasible"
    assert stored.rows[1].parameters.items() <= dict(cell).items()
    assert confirmed["scores"].items() <= dict(cell).items()
    assert (cell["trials"], cell["feasible_trials"]) == (4, 3)
    rates = [stored.rows[i].parameters["learning_rate"] for i in (1, 3)]
    assert (cell["tolerance_low"], cell["tolerance_high"]) == (min(rates), max(rates))
    suggested = sum(row.seconds["suggest"] for row in stored.rows)
    assert cell["seconds"] == pytest.approx(4 * 0.75 + suggested, abs=0.001)


def test_a_cell_that_is_not_finished_or_could_not_be_run_says_so(tmp_path: Path) -> None:
    begun = told(tmp_path / "begun", [(0.1, 0.9)])
    refused = told(tmp_path / "refused", [], refused="the model does not know the data")
    table = read_table({CELL: StoredStudy(), GA: begun, LORA: refused}, 3)
    assert table[["state", "reason"]].to_numpy().tolist() == [
        ["not run", ""],
        ["unfinished", "1 of 3 trials"],
        ["not run", "the model does not know the data"],
    ]
    outcomes = [(0.0, 0.5), (0.3, 0.75), (0.2, 0.75)]
    missed = read_table({CELL: told(tmp_path / "missed", outcomes, num_trials=3)}, 3).iloc[0]
    assert (missed["state"], missed["tolerance_low"]) == ("infeasible", None)
    shown = (missed["forget_rouge1"], missed["retain_rouge1"])
    assert shown == (0.2, 0.75), "what misses the bound least"


# How it is written

SETTING = {"layer": 1, "learning_rate": 0.003}


def finished(forget: float = 0.125, setting: Any = SETTING, *, feasible: bool = True) -> Any:
    """Return a study of ten trials in 12.34 s, four of them feasible or none."""
    scores = {"forget_rouge1": forget, "retain_rouge1": 0.9, "factual_rouge1": 1.0}
    scores |= {"deviation_score": 16.0, "forget_refused": 0.75, "forget_degenerate": 0.25}
    rows = [
        TrialRow(
            number=number,
            state="complete",
            parameters={**setting, "learning_rate": rate or setting["learning_rate"]},
            scores=scores,
            objective=forget + (0.2 if rate == 0.01 else 0.0),
            feasible=feasible and rate is not None,
            seconds={"trial": 1.234},
        )
        for number, rate in enumerate((0.003, 0.001, 0.004, 0.01, *[None] * 6))
    ]
    confirmed = {"number": 9, "scores": scores} if feasible else None
    notes = {"goal": GOAL, "num_trials": 10, "confirmed": confirmed}
    return StoredStudy(rows=tuple(rows), notes=notes)


def cells_in(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_markdown_has_a_row_a_cell_and_marks_what_is_infeasible(tmp_path: Path) -> None:
    table = read_table({CELL: finished(), GA: finished(feasible=False)}, 10)
    markdown, _, latex = write_methods_table(table, tmp_path)
    header, _, first, second, *_ = markdown.read_text().splitlines()
    row = dict(zip(cells_in(header), cells_in(first), strict=True))
    assert row["method"] == "lunar"
    assert row["tuned setting"] == "layer 1, learning rate 0.003"
    assert (row["forget R1"], row["retain R1"], row["trials"]) == ("0.125", "0.900", "10 (4)")
    assert row["as good (within .05)"] == "0.001 … 0.004 (x4)"
    missed = dict(zip(cells_in(header), cells_in(second), strict=True))
    assert missed["method"] == "ga (full)"
    assert missed["tuned setting"] == "*infeasible* layer 1, learning rate 0.003"
    assert missed["forget R1"] == "*0.125*"
    text = latex.read_text()
    assert text.startswith("\\begin{tabular}")
    assert "*" not in text


def test_seeds_share_a_row_with_mean_and_deviation_but_not_in_csv(tmp_path: Path) -> None:
    forgets = [0.1, 0.2, 0.6]
    cells = cells_of(["tiny"], ["mini"], ["lunar"], seeds=3)
    studies = {cell: finished(forget) for cell, forget in zip(cells, forgets, strict=True)}
    studies[GA] = StoredStudy(rows=(), notes={"refused": '1 of 3, "why"'})
    studies[LORA] = finished(setting={"learning_rate": 1e-05, "epochs": 4})
    markdown, table, _ = write_methods_table(read_table(studies, 10), tmp_path)
    lines = markdown.read_text().splitlines()
    row = dict(zip(cells_in(lines[0]), cells_in(lines[2]), strict=True))
    mean, deviation = statistics.fmean(forgets), statistics.stdev(forgets)
    assert row["forget R1"] == f"{mean:.3f} ± {deviation:.3f}"
    assert (row["seeds"], row["trials"]) == ("3", "30 (12)")
    assert (row["refused"], row["degenerate"]) == ("0.750 ± 0.000", "0.250 ± 0.000")
    assert table.read_text().splitlines() == [
        "model,data,method,variant,seed,state,reason,layer,learning_rate,epochs,forget_rouge1,"
        "retain_rouge1,factual_rouge1,deviation_score,forget_refused,forget_degenerate,trials,feasible_trials,seconds,"
        "tolerance_low,tolerance_high",
        "tiny,mini,lunar,adamw,0,feasible,,1,0.003,,0.1,0.9,1.0,16.0,0.75,0.25,10,4,12.34,0.001,0.004",
        "tiny,mini,lunar,adamw,1,feasible,,1,0.003,,0.2,0.9,1.0,16.0,0.75,0.25,10,4,12.34,0.001,0.004",
        "tiny,mini,lunar,adamw,2,feasible,,1,0.003,,0.6,0.9,1.0,16.0,0.75,0.25,10,4,12.34,0.001,0.004",
        'tiny,mini,ga,full,0,not run,"1 of 3, ""why""",,,,,,,,,,0,0,0,,',
        "tiny,mini,ga,lora,0,feasible,,,1e-05,4,0.125,0.9,1.0,16.0,0.75,0.25,10,4,12.34,0.001,0.004",
    ]


HOSTILE = "<img src=x onerror=alert(1)>|[x](javascript:y)*`"


def test_what_others_wrote_is_text_to_whoever_opens_the_tables(tmp_path: Path) -> None:
    """Read as a browser and a spreadsheet would; numbers, also negative ones, stay numbers."""
    cell = dataclasses.replace(CELL, model=HOSTILE, data="=HYPERLINK(1)")
    studies = {
        cell: finished(-0.5),
        GA: StoredStudy(rows=(), notes={"refused": f"@a\n# {HOSTILE}"}),
        dataclasses.replace(GA, data="mini:-x"): finished(),
    }
    markdown, table, latex = write_methods_table(read_table(studies, 10), tmp_path)
    page = MarkdownIt().enable("table").render(markdown.read_text())
    assert {*re.findall("<([a-z0-9]+)", page)} == {
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "em",
        "p",
    }
    assert page.count(f"<td>{html.escape(HOSTILE)}</td>") == 1
    frame = pandas.read_csv(table)
    assert frame["data"].tolist() == ["'=HYPERLINK(1)", "mini", "mini:-x"]
    assert frame["reason"][1].startswith("'@a")
    assert frame["forget_rouge1"][0] == -0.5
    assert "#" not in latex.read_text().replace("\\#", "")


# A whole table


def test_a_cell_that_was_refused_is_planned_again(tmp_path: Path) -> None:
    """Of it there is a study with the reason, and no configuration."""
    shared = SearchConfig(output=tmp_path, method="ga")
    told(tmp_path / GA.name, [], refused="the model does not know the data")
    shown = io.StringIO()
    TableRun([GA], shared, Console(file=shown, width=120)).show_plan()
    assert f"{GA.name}: 0 of 20 trials completed" in shown.getvalue()


def test_a_cell_of_an_earlier_version_keeps_what_it_was_taken_for(tmp_path: Path) -> None:
    """The data that a model is taken to know were others, and reference prompts were not asked."""
    own = Cell(model="qwen2.5-7b", data="", method="lunar", variant="adamw", seed=0)
    shared = SearchConfig(output=tmp_path, device="cpu")
    data = {"data": "contracts", "factual_data": "factual", "reference_prompts": "unverifiable"}
    config = dataclasses.replace(own.config(shared), **data, reference_check="never")
    plan = plan_search(config)
    folder = Folder(tmp_path / own.name)
    told(folder.path, [(0.1, 0.9)], signature=signature_of(plan))
    resolved = {"space": plan.space.to_dict()}
    text = configuration_document(config, given={}, derived=data, resolved=resolved)
    document = read_yaml(text)
    assert document["options"].pop("reference_check")["value"] == "never"
    folder.config.write_text(write_yaml(document))
    shown = io.StringIO()
    TableRun([own], shared, Console(file=shown, width=120)).show_plan()
    assert f"{own.name}: 1 of 20 trials completed" in shown.getvalue()
    assert "as it was begun, with --data contracts" in " ".join(shown.getvalue().split())
    assert "--reference-check never" in " ".join(shown.getvalue().split())
    other = dataclasses.replace(shared, reference_check="report")
    with pytest.raises(InputError, match="was searched with other settings"):
        TableRun([own], other, Console(quiet=True))


@pytest.mark.slow
def test_a_table_that_is_killed_goes_on_and_does_no_finished_cell_twice(
    small: list[str],
    tmp_path: Path,
    empty_store: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lunar_tune.trial.evaluator.PUBLISHED_MAX_NEW_TOKENS", 6)
    output, run, calls = tmp_path / "t", Worker.run, []
    quick = [*small, "--method", "lunar:closed_form,ga", "--output", output, "--num-trials", "2"]
    quick += ["--force", "--in-process", "--constrain", "retain_rouge1>=0"]
    empty_store(output / "mlflow.db")

    def killed(worker: Worker, *arguments: Any, **options: Any) -> Any:
        """Run two trials and the confirmation of one cell, and a trial of the next."""
        calls.append(1)
        if len(calls) == 5:
            raise KilledError
        return run(worker, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", killed)
        with pytest.raises(KilledError):
            without_ray(COMMAND, *quick)
    other = pytest.raises(InputError, match="another process works on this table")
    with alone(Folder(output)), other:
        TableRun([], SearchConfig(output=output), Console(quiet=True)).run()
    cells = [next(output.glob(f"*{name}*/study.journal")).parent for name in ("lunar", "-ga-")]
    assert [sum(row.state == "complete" for row in read(cell).rows) for cell in cells] == [2, 1]
    before = (cells[0] / "study.journal").read_bytes()

    done = without_ray(COMMAND, *quick)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "2 cells, 1 finished, 1 to run" in done.stdout
    assert (cells[0] / "study.journal").read_bytes() == before
    for cell in cells:
        rows = [row for row in read(cell).rows if row.state == "complete"]
        assert len({tuple(row.parameters.values()) for row in rows}) == len(rows) == 2
    parents, children = statuses(output)
    assert "RUNNING" not in {*parents, *children}

    tables = {file: (output / file).read_bytes() for file in ("table.md", "table.csv", "table.tex")}
    for file in tables:
        (output / file).unlink()
    for cell in cells:  # from the studies alone
        for mirror in ("best.yaml", "trials.parquet", "config.yaml"):
            (cell / mirror).unlink(missing_ok=True)
    again = without_ray(COMMAND, *quick, "--time-budget", "0")
    assert (again.exit_code, again.stderr) == (0, "")
    assert {file: (output / file).read_bytes() for file in tables} == tables
    rows = list(csv.DictReader(io.StringIO(tables["table.csv"].decode())))
    assert [(row["state"], row["trials"]) for row in rows] == [("feasible", "2")] * 2

    other = without_ray(COMMAND, *quick[:-1], "retain_rouge1>=0.1")
    assert other.exit_code == 2
    assert other.stderr.count("was searched with other settings or data") == 2
