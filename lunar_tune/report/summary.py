"""What the search says before its first trial and after its last."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lunar_tune.config.options import BEST_FILTER, SearchConfig
from lunar_tune.display import encodable
from lunar_tune.metrics.goal import score_label
from lunar_tune.metrics.means import errors_of
from lunar_tune.report.findings import LEAST_TO_FORGET, Findings, cautions
from lunar_tune.report.results import SearchResults
from lunar_tune.study.rows import ERROR, FAILED, HEADLINE_SCORES, TrialRow, score_cells
from lunar_tune.trial.spec import TrialSpec


def print_plan(console: Console, facts: Mapping[str, str]) -> None:
    """Show the plan."""
    table = Table.grid(padding=(0, 2))
    for label, value in facts.items():
        table.add_row(f"[bold]{escape(label)}[/bold]", escape(value))
    console.print(table)


def print_baseline(console: Console, scores: Mapping[str, float], note: str | None) -> None:
    """Show the base model's scores, and why answers are decoded plainly if they are."""
    factual = f", factual {scores['factual_rouge1']:.3f}" if "factual_rouge1" in scores else ""
    console.print(
        f"base model: forget ROUGE-1 {scores['forget_rouge1']:.3f}, "
        f"retain {scores['retain_rouge1']:.3f}{factual}"
    )
    if note is not None:
        console.print(f"answers are decoded from their first token on: {escape(note)}")


def baseline_problem(
    scores: Mapping[str, float], floor: float | None, spec: TrialSpec
) -> tuple[str, str] | None:
    """Say why a search on this model is bound to fail or pointless, and what to do, if it is."""
    retain, forget = scores["retain_rouge1"], scores["forget_rouge1"]
    if floor is not None and retain < floor:
        learn = "fine-tune it on them first and give the result with --model-path"
        if spec.model.weights is not None:
            learn = "the weights of --model-path need more training on them"
        return (
            f"the base model has retain ROUGE-1 {retain:.3f} on {spec.data.name}, below the "
            f"constraint of {floor:g}: unlearning only lowers it, so no trial could be feasible.",
            f"The model does not know these data: {learn} (or check --chat-template).",
        )
    if forget < LEAST_TO_FORGET:
        return (
            f"the base model has forget ROUGE-1 {forget:.3f} on "
            f"{', '.join(spec.data.forget_edges)}: there is nothing to forget.",
            "Choose another --forget-edge or a model that knows the answers.",
        )
    return None


def print_result(
    console: Console, results: SearchResults, *, folder: Path, commands: Mapping[str, Sequence[str]]
) -> None:
    """Show what came out and what to do next."""
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    say()
    say(Text(results.outcome, "bold yellow" if results.best is None else "bold green"))
    origin = (results.facts.get(name) for name in ("model", "number format", "origin"))
    say(f"base model: {', '.join(filter(None, origin))}")
    console.print(_score_table(results))
    say(_times(results.rows))
    if results.outlook is not None:
        say(f"by what these say, {results.outlook}")
    for sentence in filter(None, (results.equals, results.kept_again)):
        say(sentence)
    first = next(iter(results.ranked), None)
    if first is not None:
        findings = Findings.of(results, first)
        for text, name in ((findings.endings, "forget"), (findings.losses, "retain")):
            if text:
                say(Text(f"\n{text}", "bold"))
            for example in findings.examples(name):
                _print_example(console, example)
        say()
    for caution in cautions(results):
        say(Text.assemble(("caution: ", "bold yellow"), caution))
    say(Text.assemble("results are in ", (_shown(folder), "bold")))
    for purpose, command in commands.items():
        say(Text(purpose, "bold"))
        say("  " + " ".join(map(shlex.quote, command)))


def _score_table(results: SearchResults) -> Table:
    """Return the scores of base model and best setting: the headline's, and those of the goal."""
    names = results.known(*HEADLINE_SCORES, *results.goal.metrics)
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(score_label(name), justify="right", min_width=7, overflow="fold")
    for who, scores in results.compared.items():
        table.add_row(who, *score_cells(scores, names))
    if errors := errors_of(scores):  # of the last, which is the best
        table.add_row(ERROR, *score_cells(errors, names), style="dim")
    return table


def _print_example(console: Console, example: Mapping[str, str | None]) -> None:
    """Print a question and who answers what, in lines of the console's width; equals share one."""
    said: dict[str, list[str]] = {}
    names = {"true_answer": "true", "base_model": "base model", "unlearned": "unlearned"}
    for name, who in names.items():
        if (answer := example[name]) is not None:
            said.setdefault(encodable(answer, console) or "(nothing)", []).append(who)
    lines = [f"  {encodable(example['question'] or '', console)}"]
    lines += [f"    {', '.join(who):<16}  {text}" for text, who in said.items()]
    for line in lines:
        console.print(line, markup=False, no_wrap=True, overflow="ellipsis")


def next_commands(
    config: SearchConfig, folder: Path, results: SearchResults, arguments: Sequence[str]
) -> dict[str, list[str]]:
    """Return the exact commands that a user may want next, by their purpose.

    `arguments` are the options that would give the search again, but for its seed.
    """
    commands, here, first = {}, _shown(folder), next(iter(results.ranked), None)

    def command(name: str, *more: str) -> list[str]:
        return [_shown(Path(sys.executable)), "-m", f"lunar_tune.{name}", *more]

    if results.ending is not None:
        commands["resume the search:"] = command("search", *config.resuming(Path(here)))
    if first is not None:
        purpose = f"compare the trials in MLflow ({BEST_FILTER} filters the best):"
        commands[purpose] = command("compare", here, *config.permitting("tracking_uri"))
    else:  # MLflow compares scores, of which there are none
        page = _shown(folder / "page.html")
        commands["see the trials on a page:"] = command("compare", here, "--save", page)
    if first is not None and first.feasible:
        what, trial = "the best setting", list[str]()
        if results.best is None:
            what, trial = f"{what} as searched", ["--trial", str(first.number)]
        purpose = f"write the unlearned model of {what}, and prove its scores:"
        save = ["--save", _shown(folder / "model"), *config.permitting("trust_remote_code")]
        commands[purpose] = command("export", here, *trial, *save)
    outlook = results.study.notes.get("outlook")
    if results.ending is None and outlook is not None and outlook.get("more", False):
        more = ["--num-trials", str(2 * config.num_trials)]
        again = command("search", *config.resuming(Path(here)), *more)
        commands["go on, there is something to gain:"] = again
    if results.ending is None:
        seed = str(config.seed + 1)
        commands["search again with another seed:"] = command("search", *arguments, "--seed", seed)
    return commands


def _times(rows: Sequence[TrialRow]) -> str:
    ended = [row for row in rows if "trial" in row.seconds]
    failed = sum(row.state == FAILED and row.counts for row in rows)
    if not ended:
        return f"{sum(row.counts for row in rows)} trials, {failed} failed"
    trial, suggest = (fmean(row.seconds[part] for row in ended) for part in ("trial", "suggest"))
    text = f"{len(ended)} trials of {trial:.2f} s, the sampler {suggest:.2f} s each"
    return text + (f", {failed} failed" if failed else "")


def _shown(path: Path) -> str:
    """Return a path relative to the current folder where that is shorter."""
    return min(str(path.absolute()), os.path.relpath(path), key=len)
