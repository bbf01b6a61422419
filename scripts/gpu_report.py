"""The section of docs/benchmarks.md that says what `gpu_check` found: a function of its JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from lunar_tune.errors import InputError

__all__ = ["into_page", "section_of"]

BEGIN, END = "<!-- gpu_check: begin -->", "<!-- gpu_check: end -->"
COLUMNS = ("section", "outcome", "s", "GiB held", "estimated", "ratio", "found")


def section_of(document: Mapping[str, Any]) -> str:
    """Return the section, in Markdown."""
    versions = ", ".join(f"{name} {one}" for name, one in document["versions"].items() if one)
    command, what = "scripts/gpu_check", f"on {document['device']}"
    note = "Random weights are of the size of Qwen2.5-7B, in bfloat16."
    if document["rehearsal"]:
        command, what = "scripts/gpu_check --rehearse", "**a rehearsal on a CPU**"
        note = (
            "It shows that the script runs, not what a GPU does: random weights of a few million "
            "parameters, the tests and the search with a CPU in the place of a GPU."
        )
    lines = [
        f"`{command}`, {what}, {document['cores']} cores, {document['date']}: {versions}. {note}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(_row(name, one))} |" for name, one in document["sections"].items()),
    ]
    return "\n".join(lines)


def into_page(text: str, page: Path) -> None:
    """Put the section between its marks; a page without them is an InputError."""
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"--into {page}: must hold the lines {BEGIN} and {END}.")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _row(name: str, outcome: Mapping[str, Any]) -> list[str]:
    figures, memory = outcome.get("figures", {}), outcome.get("memory", {})
    gib = (memory.get("measured_gib"), figures.get("estimate_gib"), memory.get("ratio"))
    found = FOUND[name](figures) if figures else ""
    reason = "; ".join(part for part in (found, outcome.get("reason", "")) if part)
    return [
        name,
        outcome["state"],
        f"{outcome['seconds']:.0f}",
        *("-" if one is None else f"{one:.2f}" for one in gib),
        " ".join(reason.replace("|", "\\|").split()),
    ]


def _tests(figures: Mapping[str, Any]) -> str:
    return f"{figures['passed']} of {figures['tests']} passed"


def _memory(figures: Mapping[str, Any]) -> str:
    budget = figures["budget_gib"]
    limit = "no budget" if budget is None else f"a budget of {budget:.2f} GiB"
    return (
        f"{figures['parameters'] / 1e6:.0f} million parameters, weights "
        f"{figures['weights_gib']:.2f} GiB, {limit}: base model "
        f"{figures['base_model_seconds']:.1f} s, first trial {figures['first_trial_seconds']:.1f} s"
    )


def _search(figures: Mapping[str, Any]) -> str:
    formats = [f"{name}: {_compared(figures[name])}" for name in ("float32", "bfloat16")]
    return f"{figures['model']} against float32 on a CPU; {'; '.join(formats)}"


def _compared(one: Mapping[str, Any]) -> str:
    far = {name: max(abs(new - old) for old, new in one[name]) for name in ("forget", "retain")}
    there, here = one["seconds_of_trials"]
    return (
        f"{one['answers_that_differ']} of {one['answers']} answers differ, forget by "
        f"{far['forget']:.3f} and retain by {far['retain']:.3f} at most, best trial "
        f"{one['best'][1]} (CPU: {one['best'][0]}), {one['trials']} trials {here:.1f} s "
        f"(CPU: {there:.1f} s)"
    )


def _trial(figures: Mapping[str, Any]) -> str:
    warm = median(one["trial"] for one in figures["warm"])
    parts = [f"plain {one['total']:.2f} s" for one in figures["plain"]]
    parts += [f"first {figures['first']['trial']:.2f} s", f"warm {warm:.2f} s"]
    if figures["floor"] is not None:
        parts.append(f"floor {sum(figures['floor'].values()):.2f} s")
    rows = [f"{share:.1%} of rows differ at {name}" for name, share in figures["differing"].items()]
    parts += [] if figures["ratio"] is None else [f"plain / warm {figures['ratio']}"]
    return ", ".join([*parts, *rows])


def _steps(figures: Mapping[str, Any]) -> str:
    rows = [
        f"{row['method']} ({row['variant']}) {1000 * row['step']:.0f} ms a step"
        + ("" if row["peak_gib"] is None else f", peak {row['peak_gib']:.1f} GiB")
        for row in figures["rows"]
    ]
    return "; ".join(rows)


def _ray(figures: Mapping[str, Any]) -> str:
    confirmed = "confirmed" if figures["confirmed"] else "not confirmed"
    return f"trials {', '.join(figures['states'])}; {confirmed}"


FOUND: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "tests": _tests,
    "memory": _memory,
    "memory_budget": _memory,
    "search": _search,
    "trial_closed_form": _trial,
    "trial_adamw": _trial,
    "steps": _steps,
    "steps_full": _steps,
    "ray": _ray,
}
