"""The table of methods, with the columns of `table.csv`: cell, state, setting, scores, counts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tabulate import tabulate

from lunar_tune.config.options import LONGEST_NAME, SearchConfig
from lunar_tune.data.data_catalog import read_data
from lunar_tune.data.splits import edges_of, read_groups
from lunar_tune.data.texts import names_in
from lunar_tune.display import markdown, printable
from lunar_tune.errors import DataError
from lunar_tune.files import safe_name, write_atomically
from lunar_tune.methods.contract import METHODS
from lunar_tune.metrics.goal import METRICS, Goal, is_score
from lunar_tune.metrics.means import error_name
from lunar_tune.report.results import template
from lunar_tune.study.rows import (
    COMPLETE,
    FAILED,
    HEADLINE_SCORES,
    TrialRow,
    best_first,
    nearest_first,
    score_cells,
    shown_score,
)
from lunar_tune.study.study import StoredStudy

if TYPE_CHECKING:
    import pandas as pd

FEASIBLE, INFEASIBLE, UNFINISHED, REFUSED = "feasible", "infeasible", "unfinished", "not run"
_STATES = [FEASIBLE, INFEASIBLE, UNFINISHED, REFUSED]
FINISHED = {FEASIBLE, INFEASIBLE}
_CELL = ("model", "data", "method", "variant", "seed", "state", "reason")
_COUNTS = ("trials", "feasible_trials", "seconds", "tolerance_low", "tolerance_high")
AS_GOOD = 0.05  # by how much of the objective a trial may be worse than the best and count as good
_FORMULA = (
    r"^(?=[=+\-@\t\r])"  # before a text that a spreadsheet would compute, as OWASP lists them
)
STRENGTHS = ("learning_rate", "ridge")
_SHOWN = {  # scores, and what their columns are called
    "forget_rouge1": "forget R1",
    "retain_rouge1": "retain R1",
    "factual_rouge1": "factual R1",
    "deviation_score": "deviation",
    "forget_refused": "refused",
    "forget_degenerate": "degenerate",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One study of the table."""

    model: str
    data: str  # `NAME` or `NAME:EDGE+EDGE`; empty for the model's own data
    method: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """The search's name and folder."""
        model, data = _short(self.model), _short(self.data or "own")
        seed = f"-seed{self.seed}" if self.seed else ""
        text = f"{model}-{data}-{self.method}-{self.variant}{seed}"
        name = safe_name(text)
        if name == text and len(name) <= LONGEST_NAME:
            return name
        # Characters were left out, or are too many: other text may look the same.
        return f"{name[: LONGEST_NAME - 8]}-{_digest(text)}"

    def has(self, assignment: str) -> bool:
        """Say whether the method has the parameter or setting of a text `NAME=…`."""
        name = assignment.partition("=")[0].strip().replace("-", "_")
        return name in METHODS[self.method].names_in_use(self.variant)

    def config(self, shared: SearchConfig) -> SearchConfig:
        """Return the cell's search, in which is fixed and narrowed what the method has."""
        name, edges, _ = data_and_edges(self.data, shared.edge)
        variant = f"{METHODS[self.method].variant_setting}={self.variant}"
        return dataclasses.replace(
            shared,
            model=self.model,
            data=name or shared.data,
            forget_edge=edges or shared.forget_edge,
            method=self.method,
            fix=(variant, *filter(self.has, shared.fix)),
            range=tuple(filter(self.has, shared.range)),
            seed=self.seed,
            name=self.name,
            resume=self.name,
        )


def data_and_edges(text: str, edge: str | None = None) -> tuple[str, tuple[str, ...], bool]:
    """Return the data and the edges that `NAME` or `NAME:EDGE+EDGE` names, and whether all exist.

    Names of files and edges may hold any of these signs; `edge` is that of rows that have none.
    """
    for end in (len(text), *(i for i, sign in enumerate(text) if sign == ":")):
        with suppress(DataError):
            path, records = read_data(text[:end], default_edge=edge)
            known = {*edges_of(records), *read_groups(path)}
            edges = names_in(text[end + 1 :], known, "+")
            if known.issuperset(edges) and bool(edges) == (end < len(text)):
                return text[:end], tuple(edges), True
    name, _, rest = text.partition(":")
    return name, tuple(names_in(rest, (), "+")), False


def _short(text: str) -> str:
    """Return a name for folders; of a path its last part and a digest, for others may share it."""
    return f"{Path(text).stem}-{_digest(text)}" if "/" in text else text.replace(":", "-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def read_table(studies: Mapping[Cell, StoredStudy], num_trials: int) -> pd.DataFrame:
    """Return a row a cell: what its study says; a finished one has so many trials."""
    import pandas as pd

    table = pd.DataFrame(
        [_read(cell, stored, num_trials) for cell, stored in studies.items()], dtype=object
    )
    names = (*HEADLINE_SCORES, *METRICS, *map(error_name, METRICS))
    scores = dict.fromkeys(name for name in names if name in table)
    return table[[*_CELL, *_setting(table), *scores, *_COUNTS]]


def _setting(table: pd.DataFrame) -> list[str]:
    """Return the columns of parameters."""
    return [name for name in table if not is_score(name) and name not in {*_CELL, *_COUNTS}]


def _read(cell: Cell, stored: StoredStudy, num_trials: int) -> dict[str, Any]:
    """Return a cell's row.

    The setting is the tuned one, confirmed in full; of an infeasible cell the one that misses
    least, as searched. The time is that of all trials and suggestions.
    """
    rows, notes = stored.rows, stored.notes
    complete = [row for row in rows if row.state == COMPLETE]
    failures = Counter(row.failure for row in rows if row.state == FAILED)
    failed = f"{failures.total()} failed: {failures.most_common(1)[0][0]}" if failures else ""
    state, reason = INFEASIBLE, ""
    setting: Mapping[str, Any] = {}
    scores: Mapping[str, float] = {}
    low, high = None, None
    if not stored.has_ended(num_trials):
        state, reason = REFUSED, notes.get("refused", "")
        if notes and not reason:
            ended = f"{len(complete)} of {num_trials} trials"
            state, reason = UNFINISHED, f"{ended}; {failed}" if failed else ended
    elif (confirmed := notes.get("confirmed")) is not None:
        state, scores = FEASIBLE, confirmed["scores"]
        setting, (low, high) = rows[confirmed["number"]].parameters, _tolerance(complete)
    elif complete:
        nearest = nearest_first(complete, Goal.read(*notes["goal"]))[0]
        setting, scores = nearest.parameters, nearest.scores
    else:
        reason = failed
    seconds = sum(row.seconds.get(part, 0.0) for row in rows for part in ("trial", "suggest"))
    feasible = sum(bool(row.feasible) for row in complete)
    counts = (len(complete), feasible, round(seconds, 3), low, high)
    return {
        **dataclasses.asdict(cell),
        "state": state,
        "reason": reason,
        **setting,
        **dict.fromkeys(_SHOWN),
        **{name: score for name, score in scores.items() if is_score(name)},
        **dict(zip(_COUNTS, counts, strict=True)),
    }


def _tolerance(complete: Sequence[TrialRow]) -> tuple[float | None, float | None]:
    """Return between which values of its strength a method does nearly as well as at its best."""
    feasible = best_first(complete)
    name = next((name for name in STRENGTHS if feasible and name in feasible[0].parameters), None)
    if name is None:
        return None, None
    limit = (feasible[0].objective or 0.0) + AS_GOOD
    values = [row.parameters[name] for row in feasible if (row.objective or 0.0) <= limit]
    return min(values), max(values)


def write_methods_table(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `table.md`, `table.csv` and `table.tex`; return their paths.

    Markdown and LaTeX have a row a cell, with mean and standard deviation over seeds; CSV has a
    row for each seed.
    """
    shown = Markup(_readable(table, "github", markdown, italic="*{}*"))  # noqa: S704  # is escaped
    texts = {
        "table.md": template("methods_table.md.j2").render(table=shown) + "\n",
        "table.csv": table.replace(regex=_FORMULA, value="'").to_csv(index=False),
        "table.tex": _readable(table, "latex_booktabs", printable, italic="{}") + "\n",
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [folder / name for name in texts]


def print_methods_table(console: Console, table: pd.DataFrame) -> None:
    """Show the cells of every seed."""
    several = table["seed"].nunique() > 1
    shown = Table("model", "data", "method", "", box=None, pad_edge=False, header_style="bold")
    for column in _SHOWN.values():
        shown.add_column(column.removesuffix(" R1"), justify="right")
    for one in table.to_dict("records"):
        method = f"{one['method']} ({one['variant']})" + (f" seed {one['seed']}" if several else "")
        names = escape(one["model"]), escape(one["data"] or "own")
        shown.add_row(*names, method, one["state"], *score_cells(one, _SHOWN))
    console.print(shown)


def _readable(table: pd.DataFrame, form: str, escape: Callable[[str], str], *, italic: str) -> str:
    """Return the readable table in one of tabulate's forms, which may escape texts itself."""
    cells = table.groupby(["model", "data", "method", "variant"], sort=False)
    rows = [_row(seeds, escape, italic) for _, seeds in cells]
    if len(rows) == len(table):
        rows = [{key: text for key, text in row.items() if key != "seeds"} for row in rows]
    if form == "github":
        rows = [{key: text.replace("|", "\\|") for key, text in row.items()} for row in rows]
    return str(tabulate(rows, "keys", tablefmt=form, disable_numparse=True))


def _row(seeds: pd.DataFrame, escape: Callable[[str], str], italic: str) -> dict[str, str]:
    """Return one row of the readable tables, by column; the setting is the best seed's."""
    goodness = seeds.assign(order=seeds["state"].map(_STATES.index))
    best = goodness.sort_values(["order", "deviation_score", "seed"]).iloc[0]
    alike, method = seeds[seeds["state"] == best["state"]], best["method"]
    if best["variant"] != METHODS[method].variants[0]:
        method += f" ({best['variant']})"
    setting = escape(
        ", ".join(
            f"{name.replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value}"
            for name, value in best[_setting(seeds)].dropna().items()
        )
    )
    scores = {column: _spread(alike, name) for name, column in _SHOWN.items()}
    if best["state"] != FEASIBLE:
        said = best["state"] + (f": {printable(best['reason'])}" if best["reason"] else "")
        setting = f"{italic.format(escape(said))} {setting}".rstrip()
        scores = {column: score and italic.format(score) for column, score in scores.items()}
    as_good, low, high = "", best["tolerance_low"], best["tolerance_high"]
    if low is not None:
        as_good = f"{low:.2g} … {high:.2g} (x{high / low:.2g})"
    of_all = f"{len(alike)} of " if len(alike) < len(seeds) else ""
    return {
        "model": escape(best["model"]),
        "data": escape(best["data"]),
        "method": escape(method),
        "tuned setting": setting,
        **scores,
        "trials": f"{seeds['trials'].sum()} ({seeds['feasible_trials'].sum()})",
        "time (s)": f"{seeds['seconds'].sum():.1f}",
        "as good (within .05)": as_good,
        "seeds": f"{of_all}{len(seeds)}",
    }


def _spread(seeds: pd.DataFrame, name: str) -> str:
    """Return a score's mean ± standard deviation over seeds, of one seed ± its standard error."""
    values = seeds[name].dropna().astype(float)
    if values.empty:
        return ""
    only = seeds.loc[values.index[0]].dropna()
    error = values.std() if len(values) > 1 else only.get(error_name(name))
    return shown_score(values.mean(), error)
