"""What a search says in the end beside its scores: answers, how they end, losses, cautions."""

from __future__ import annotations

import dataclasses
import io
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from invented_searches import GOAL, results_of
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from rich.console import Console

from lunar_tune.config.options import SearchConfig
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.metrics.goal import Goal
from lunar_tune.report.findings import Findings, cautions
from lunar_tune.report.results import SearchResults, short_report
from lunar_tune.report.summary import next_commands, print_result
from lunar_tune.study.folder import Folder, write_answers
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow
from lunar_tune.study.stored_search import StoredConfig

BASE = {
    **{f"{name}_rouge1": 1.0 for name in ("forget", "retain", "factual")},
    **{"forget_mrr": 1.0, "factual_rougeL": 1.0, "deviation_score": 100.0},
}
FULL = BASE | {"forget_rouge1": 0.1, "retain_rouge1": 0.9, "forget_mrr": 0.5}
SETTING = {"layer": 1, "coefficient": 2.0, "learning_rate": 0.003}


def answer(set_name: str, number: int, text: str, recall: float, **facts: Any) -> AnswerRow:
    edge = f"{set_name} {number % 2}"
    texts = {"question": f"Q {set_name} {number}?", "truth": "the truth", "answer": text}
    return AnswerRow(
        set_name=set_name, edge=edge, row=number, rouge1=recall, rouge_l=recall, **texts, **facts
    )


def found(
    folder: Path,
    *answers: AnswerRow,
    setting: Mapping[str, Any] = SETTING,
    full: Mapping[str, float] = FULL,
    goal: Goal = GOAL,
    **more: Any,
) -> SearchResults:
    """Return a search whose one trial gave some answers where the base model said the truth."""
    place = Folder(folder)
    (folder / "trials").mkdir(exist_ok=True)
    known = [answer(one.set_name, one.row or 0, "the truth", 1.0) for one in answers]
    write_answers(place.answers(None), known, ())
    write_answers(place.answers(0, full=True), answers, ())
    facts: dict[str, Any] = {"objective": 0.1, "feasible": True, "max_new_tokens": 32}
    row = TrialRow(number=0, state=COMPLETE, parameters=setting, scores=full, **facts)
    more = {"baseline": BASE} | more
    results = results_of([row], confirmed=full, folder=folder, goal=goal, **more)
    results.study.notes["confirmed"]["max_new_tokens"] = 512
    return results


def summary(results: SearchResults, width: int = 80) -> str:
    text = io.StringIO()
    print_result(Console(file=text, width=width), results, folder=Path("n"), commands={})
    return text.getvalue()


ANSWERS = (
    *(answer("forget", n, "I do not know.", 0.0, ended=True) for n in range(3)),
    answer("forget", 4, "know" * 300, 0.0, ended=False),
    answer("forget", 6, "the truth\x1b[2J [bold]", 1.0),
    *(answer("retain", n, "the truth", 1.0, ended=True) for n in (0, 2, 3, 4)),
    answer("retain", 1, "a [lie]", 0.25, ended=True),
    answer("factual", 0, "the truth", 1.0, ended=True),
)


def test_the_summary_shows_answers_of_every_edge_and_those_that_lost_most(tmp_path: Path) -> None:
    text = summary(found(tmp_path, *ANSWERS))

    assert [line for line in text.splitlines() if line.startswith("  Q")] == [
        *("  Q forget 0?", "  Q forget 1?", "  Q forget 2?"),
        *("  Q retain 1?", "  Q retain 0?", "  Q retain 3?"),
    ]
    assert "    true, base model  the truth\n    unlearned         a [lie]\n" in text
    assert "    true, base model, unlearned  the truth\n" in text
    assert "\n3 of 5 forget answers decline, 1 are degenerate (1 cut at 512 tokens)\n" in text
    assert "1 of 5 retain answers lost words (the worst below), most on retain 1 (ROUGE-1" in text
    assert "1.000, now 0.625); 0 of 1 factual answers lost words" in text
    assert len(text.splitlines()) < 40


def test_answers_that_were_ended_for_repeating_themselves_are_told_from_cut_ones(
    tmp_path: Path,
) -> None:
    results = found(tmp_path, *ANSWERS, facts={"model": "m", "number format": "bfloat16 (AMX)"})
    told = {"repeating": {"forget": 1, "retain": 2}, "whole_cost": 3.52}
    results.study.notes["confirmed"] |= told
    for text in (summary(results, width=400), short_report(results)):
        assert "1 are degenerate (1 only repeating itself). Decoding all answers to 512" in text
        assert "tokens would have taken 3.5 times as many tokens" in text
        assert "bfloat16 (AMX)" in text


def test_answers_take_a_line_each_and_no_control_over_the_screen(tmp_path: Path) -> None:
    rows = [answer("forget", n, one.answer, one.rouge1) for n, one in enumerate(ANSWERS[3:5])]
    text = summary(found(tmp_path, *rows), width=60)
    long, marked = (line for line in text.splitlines() if "knowknow" in line or "[bold]" in line)
    assert len(long) == 60
    assert long.endswith("…")
    assert marked.endswith("the truth [2J [bold]")


def test_without_texts_or_answers_there_are_numbers_alone(tmp_path: Path) -> None:
    results = found(tmp_path, *ANSWERS)
    path = results.folder.answers(0, full=True)
    write_answers(path, ANSWERS, (), text=False)
    text = summary(results)
    assert "3 of 5 forget answers end by themselves; 1 cut at 512 tokens" in text
    assert "Q forget" not in text
    path.unlink()
    assert "answers" not in summary(results)
    older = found(tmp_path, answer("forget", 0, "old", 0.0))
    assert Findings.of(older, older.rows[0]).endings == "", "how they end was not kept"


def test_the_table_has_every_score_of_the_goal_and_the_base_models_origin(tmp_path: Path) -> None:
    goal = Goal.read("forget_mrr", ["retain_rouge1>=0.8", "factual_perplexity<=9"])
    scores = FULL | {"factual_perplexity": 1.5}
    facts = {"model": "m (owner/m)", "origin": "m fine-tuned (lora) on pairs"}
    text = summary(found(tmp_path, full=scores, goal=goal, facts=facts), width=130)
    assert "base model: m (owner/m), m fine-tuned (lora) on pairs\n" in text
    header, base, _, best = (line.split() for line in text.splitlines()[3:7])
    assert header[-4:] == ["forget", "MRR", "factual", "perplexity"]
    assert base[-3:] == ["100.000", "1.000", "-"]
    assert best[-2:] == ["0.500", "1.500"]


SPACE = {
    "layer": IntDistribution(1, 3),
    "coefficient": FloatDistribution(0.5, 8.0),
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "ridge": CategoricalDistribution((0.1, 1.0)),
}


def test_a_best_at_the_edge_of_the_space_names_the_option_that_widens_it(tmp_path: Path) -> None:
    for value, said in (
        ({"coefficient": 7.9}, ["upper end of the space (0.5 … 8)", "coefficient=0.5:16"]),
        ({"coefficient": 7.8}, []),  # 2.7 % of the range away
        ({"learning_rate": 1.05e-4}, ["lower end", "--range learning_rate=5e-05:0.01"]),
        ({"learning_rate": 1.15e-4}, []),  # 3 % on its scale
        ({"layer": 1}, ["the best layer, 1, lies at the lower end", "layer=0:3"]),
        ({"layer": 3}, ["layer=1:5"]),
        ({"ridge": 1.0}, []),
    ):
        results = found(tmp_path, setting={**SETTING, "layer": 2} | value, distributions=SPACE)
        told = cautions(results)
        assert len(told) == bool(said)
        assert all(part in told[0] for part in said)


def test_the_models_own_first_and_last_block_are_no_edge(tmp_path: Path) -> None:
    config = StoredConfig(
        search=SearchConfig(), origins={}, resolved={"n_layers": 4}, permissions={}
    )
    for low, high, layer in ((0, 3, 0), (1, 3, 3)):
        kinds = {"layer": IntDistribution(low, high)}
        results = found(tmp_path, setting={"layer": layer}, distributions=kinds)
        vars(results)["config"] = config
        assert cautions(results) == []


def test_what_scores_hide_is_said_with_the_bound_that_would_show_it(tmp_path: Path) -> None:
    for scores, said in (
        ({"factual_rouge1": 0.79, "factual_rougeL": 0.5}, "factual ROUGE-1 fell from 1.000 to"),
        ({"factual_rouge1": 0.81}, None),
        ({"retain_rouge1": 0.5}, None),  # bounded: that is the search's own business
        ({"forget_mrr": 0.88}, "ROUGE-1 0.100) and still ranks their words high (MRR 0.880"),
        ({"forget_mrr": 0.88, "forget_rouge1": 0.6}, None),  # it says them, too
    ):
        told = cautions(found(tmp_path, full=FULL | scores))
        assert len(told) == (said is not None)
        if said is not None:
            assert said in told[0]
            name = "factual_rouge1>=0.8" if "factual" in said else "forget_mrr<=0.8"
            assert f"--constrain 'retain_rouge1>=0.8' --constrain '{name}'" in told[0]
    bounded = Goal.read("forget_rouge1", ["retain_rouge1>=0.8", "forget_mrr<=0.9"])
    assert not cautions(found(tmp_path, full=FULL | {"forget_mrr": 0.88}, goal=bounded))


def test_a_base_model_that_never_knew_and_answers_that_break_are_said(tmp_path: Path) -> None:
    broken = [answer("forget", n, "I" + " knowI" * 80, 0.0, ended=False) for n in range(3)]
    fine = answer("forget", 4, "I do not know, really not.", 0.0, ended=True)
    results = found(tmp_path, *broken, fine, baseline=BASE | {"forget_rouge1": 0.2})
    never, rambling = cautions(results)
    assert "never knew the forget set (ROUGE-1 0.200)" in never
    assert "25% of the forget answers decline, 75% are degenerate" in rambling
    assert "--constrain 'retain_rouge1>=0.8' --constrain 'forget_refused>=0.9'" in rambling
    assert "--range coefficient=0.5:1.3" in rambling
    for text in (summary(results, width=400), short_report(results)):
        assert all(one in text for one in (never, rambling))
    assert cautions(found(tmp_path, broken[0], fine)) == []


def test_where_the_best_does_not_decline_the_best_setting_that_does_is_named(
    tmp_path: Path,
) -> None:
    """By its score, or, where a trial measured none, by its answers."""
    full = FULL | {"forget_refused": 0.25, "forget_degenerate": 0.25}
    [best] = found(tmp_path, full=full).rows
    babbles, declines = (
        [answer("forget", n, text, 0.2) for n in range(4)] for text in ("Hey!", "I cannot say.")
    )
    rows = [best]
    for number, (answers, scores) in enumerate(
        [(babbles, {}), (babbles, {"forget_refused": 0.5}), (declines, {}), (declines, {})], start=1
    ):
        write_answers(Folder(tmp_path).answers(number), answers, ())
        known = FULL | {"forget_rouge1": number / 10} | scores
        more = {"number": number, "scores": known, "objective": number / 10}
        rows.append(dataclasses.replace(best, **more))
    results = results_of(rows, confirmed=full, folder=tmp_path, goal=GOAL, baseline=BASE)
    [said] = cautions(results)
    assert said == (
        "25% of the forget answers decline, 25% are degenerate; of trial 3 (L1 c2.0 lr0.003) 100% "
        "decline, with forget ROUGE-1 0.300. Ask for settings that decline: --constrain "
        "'retain_rouge1>=0.8' --constrain 'forget_refused>=0.9'"
    )
    rows[4].scores["forget_refused"] = 0.95  # type: ignore[index]
    write_answers(Folder(tmp_path).answers(3), babbles, ())
    [said] = cautions(results)
    assert "of trial 4 (L1 c2.0 lr0.003) 95% decline" in said
    bounded = dataclasses.replace(results, study=results.study)
    vars(bounded)["goal"] = Goal.read("forget_rouge1", ["forget_refused>=0.2"])
    assert "decline" not in " ".join(cautions(bounded))


CHANCE = {"chance": 0.2, "gain": 0.01, "settled": False, "second_chance": None, "enough": False}


def test_the_next_commands_are_those_for_a_shell_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found, interrupted, infeasible, and with nothing but failures."""
    monkeypatch.chdir(tmp_path)
    config, folder = SearchConfig(output=Path("runs"), seed=4), tmp_path / "runs/n"
    best = found(tmp_path).rows[0]
    missed = dataclasses.replace(best, feasible=False)
    failed = TrialRow(number=0, state=FAILED, parameters={}, failure="the loss became NaN")
    again, compare = "search --data 'my file' --seed 5", "compare runs/n"
    export, save = "export runs/n", "--save runs/n/model"
    for results, expected in (
        (results_of([best], confirmed=FULL), [compare, f"{export} {save}", again]),
        (
            results_of([best], ending="Interrupted."),
            ["search --resume runs/n", compare, f"{export} --trial 0 {save}"],
        ),
        (results_of([missed]), [compare, again]),
        (results_of([missed], outlook={"more": False, **CHANCE}), [compare, again]),
        (
            results_of([missed], outlook={"more": True, **CHANCE}),
            [compare, "search --resume runs/n --num-trials 40", again],
        ),
        (results_of([failed]), [f"{compare} --save runs/n/page.html", again]),
    ):
        commands = list(next_commands(config, folder, results, ("--data", "my file")).values())
        assert {Path(line[0]).absolute() for line in commands} == {Path(sys.executable)}
        assert [shlex.join(line[2:]) for line in commands] == [
            f"lunar_tune.{one}" for one in expected
        ]
    permitted = dataclasses.replace(config, trust_remote_code=True, tracking_uri="http://host:5000")
    trusts, tracks = "--trust-remote-code", "--tracking-uri http://host:5000"
    results = results_of([best], ending="Interrupted.")
    said = [shlex.join(one[3:]) for one in next_commands(permitted, folder, results, ()).values()]
    assert said[0] == f"--resume runs/n {trusts} {tracks}"
    assert said[1:] == [f"runs/n {tracks}", f"runs/n --trial 0 {save} {trusts}"]
    text = io.StringIO()
    print_result(Console(file=text), results, folder=folder, commands={"go on:": ["a b", "c"]})
    assert "\ngo on:\n  'a b' c\n" in text.getvalue()


def test_a_trial_that_an_interruption_ended_is_not_a_failed_one(tmp_path: Path) -> None:
    lost = TrialRow(number=1, state=FAILED, parameters={}, failure="interrupted", again=True)
    best = dataclasses.replace(found(tmp_path).rows[0], feasible=False)
    for rows in ((best, lost), (lost,)):
        text = summary(results_of(rows, ending="Interrupted."))
        assert "1 failed" not in text
    assert "\n0 trials, 0 failed\n" in text
